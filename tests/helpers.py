"""What the tests of several folders share.

Expected values come from plain PyTorch: the bare pipeline (`draw`) or module, with ordinary hooks on it (`hooked`,
`replaced`, `record`). `footprint` is all that a run could leave behind on a module.
"""

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from diffsight.errors import InputError

SEED = 3  # of the runs and of the bare pipelines that they are compared with


# Values


def first(value: Any) -> torch.Tensor:
    """Return the tensor in what a module or a scheduler returns: the value itself, or its first item."""
    return value if isinstance(value, torch.Tensor) else value[0]


def with_first(value: Any, tensor: torch.Tensor) -> Any:
    """Return the same output with another tensor in its first place."""
    if isinstance(value, torch.Tensor):
        return tensor
    if isinstance(value, tuple):
        return (tensor, *value[1:])
    return type(value)(**{**value, next(iter(value)): tensor})


def same(a: Any, b: Any) -> bool:
    """Return whether two values, nested or not, are the same to the bit and of the same types."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return type(a) is type(b) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a is b or bool(a == b)


def same_image(image: Any, other: Any) -> bool:
    """Return whether two images have the same mode and the same pixels."""
    return image.mode == other.mode and np.array_equal(np.asarray(image), np.asarray(other))


def close_image(image: Any, other: Any) -> bool:
    """Return whether no pixel differs by more than 2 of 255, as computing in a batch may change it."""
    a, b = (np.asarray(one, dtype=int) for one in (image, other))
    return a.shape == b.shape and np.abs(a - b).max() <= 2


def largest_difference(a: Any, b: Any) -> float:
    """Return the largest difference: in 255ths for images, as it is for sounds and for videos of floats."""
    a, b = (np.asarray(one if not isinstance(one, list) else np.stack(list(map(np.asarray, one)))) for one in (a, b))
    return np.abs(a.astype(float) - b.astype(float)).max()


# Bare modules and pipelines


@contextmanager
def hooked(module: nn.Module, hook: Callable) -> Iterator[None]:
    """Keep an ordinary forward hook on a module in the block, before all others."""
    handle = module.register_forward_hook(hook, prepend=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def record(module: nn.Module) -> Iterator[list[tuple[tuple, dict, Any]]]:
    """Record (args, kwargs, output) of every call of `module`, with an ordinary hook."""
    calls: list[tuple[tuple, dict, Any]] = []
    handle = module.register_forward_hook(
        lambda _, args, kwargs, out: calls.append((args, kwargs, out)), with_kwargs=True
    )
    try:
        yield calls
    finally:
        handle.remove()


def outputs(module: nn.Module, call: Callable, *args: Any, **kwargs: Any) -> list[Any]:
    """Return what `module` returned in each of its calls during `call(*args, **kwargs)`."""
    with record(module) as calls:
        call(*args, **kwargs)
    return [out for _, _, out in calls]


@contextmanager
def replaced(module: nn.Module, edit: Callable[[Any], Any], only: int | None = None) -> Iterator[None]:
    """Replace the output of `module` by `edit(output)`, in call number `only` or in all, with an ordinary hook."""
    count = -1

    def hook(_, args, out):
        nonlocal count
        count += 1
        return edit(out) if only in (None, count) else None

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def with_input(module: nn.Module, value: Any, call: Callable[[], Any]) -> Any:
    """Return `call()` with `value` as the first argument of every call of `module`, by an ordinary hook."""
    handle = module.register_forward_pre_hook(lambda _, args: (value, *args[1:]))
    try:
        return call()
    finally:
        handle.remove()


def draw(pipe: Any, inputs: dict[str, Any], seed: int = SEED) -> Any:
    """Return what the bare pipeline draws: the images, frames or sounds of one call."""
    return pipe(**inputs, generator=torch.Generator().manual_seed(seed))[0]


def drawn(run: Any) -> Any:
    """Return what a run drew: its images or its frames."""
    return run.frames if "frames" in run.result else run.images


@contextmanager
def patched(owner: Any, name: str, around: Callable) -> Iterator[None]:
    """Replace a method of one object by `around(original, *args, **kwargs)` in the block."""
    original = getattr(owner, name)
    owner.__dict__[name] = functools.wraps(original)(functools.partial(around, original))
    try:
        yield
    finally:
        del owner.__dict__[name]


@contextmanager
def recorded(owner: Any, name: str = "forward") -> Iterator[list[tuple[Any, Any]]]:
    """Record (inputs, output) of every call of a method, or of a module's forward, copied as they pass."""
    calls = []

    def keep(original, *args, **kwargs):
        inputs = copy.deepcopy((args, {k: v for k, v in kwargs.items() if k != "generator"}))
        output = original(*args, **kwargs)
        calls.append((inputs, copy.deepcopy(output)))
        return output

    with patched(owner, name, keep):
        yield calls


def module_at(pipe: Any, path: str) -> nn.Module:
    """Return the module of a pipeline at a path that begins with its component."""
    component, _, rest = path.partition(".")
    return getattr(pipe, component).get_submodule(rest)


@functools.cache
def bare_run(kind: Any) -> tuple[Any, dict[str, list]]:
    """Return what a bare pipeline of `models.diffusion` draws, and the calls of its parts.

    One run of each kind is enough for all tests, as it is built with the same weights each time.
    """
    pipe = kind.build()
    watched = {"block": (module_at(pipe, kind.denoiser_block), "forward"), "step": (pipe.scheduler, "step")}
    if kind.text_encoder_layer:
        watched["layer"] = (module_at(pipe, kind.text_encoder_layer), "forward")
    if kind.decode:
        watched["decode"] = (pipe.vae, "decode")
    with ExitStack() as stack:
        calls = {name: stack.enter_context(recorded(*method)) for name, method in watched.items()}
        return draw(pipe, kind.inputs()), calls


# Errors


def refusal(call: Callable, *args: Any, **kwargs: Any) -> str:
    """Return the message of the `InputError` that `call(*args, **kwargs)` raises."""
    with pytest.raises(InputError) as error:
        call(*args, **kwargs)
    return str(error.value)


@contextmanager
def not_called(*modules: nn.Module) -> Iterator[None]:
    """Check that none of the modules is called in the block."""
    called: list[nn.Module] = []
    handles = [module.register_forward_hook(lambda module, args, output: called.append(module)) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    assert not called


# What a run could leave behind


def footprint(net: nn.Module) -> dict[str, tuple]:
    """Return what a run could leave behind: classes, hooks, overridden forward passes, attributes of every module."""
    return {
        name: (
            type(module),
            list(module._forward_hooks.values()),
            list(module._forward_pre_hooks.values()),
            module.__dict__.get("forward"),
            set(module.__dict__),
        )
        for name, module in net.named_modules()
    }


def pipeline_footprint(pipe: Any) -> dict[tuple[str, str], tuple]:
    """Return what a run could leave behind on a pipeline: classes, attributes and hooks of every part."""
    found = {}
    for name, part in {"": pipe, **pipe.components}.items():
        modules = part.named_modules() if isinstance(part, nn.Module) else [("", part)]
        for path, owner in modules:
            attributes = getattr(owner, "__dict__", {})
            is_module = isinstance(owner, nn.Module)
            hooks = [tuple(attributes[key].values()) for key in attributes if is_module and key.endswith("_hooks")]
            found[name, path] = type(owner), frozenset(attributes), attributes.get("forward"), hooks
    return found
