"""Scans: runs that compute shapes instead of values, and need no weights.

    with model.scan("a red circle above a blue square") as run:
        width = run.unet.mid_block.output.shape[1]

The model's code runs as usual, but inside a component (the model; in a pipeline, each of its modules) tensors are
PyTorch's fake tensors, which have a shape, a dtype and a device and no values. Where a component of a pipeline returns,
its fake tensors are replaced with zeros. What runs between components, such as tokenizers, schedulers and
post-processing, therefore computes for real, on zeros.

Weights stay where they are, loaded or not: `ScanMode` lets functions see fake tensors in their place. Changes that are
made meanwhile to what the modules hold as attributes are undone at the end, and so are the draws from the global random
generators and from those that modules hold. Caches and random generators among the arguments are copied.
"""

from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar, copy_context
from functools import partial
from threading import Lock
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves, tree_map

from diffsight.engine.opaque_values import is_cache
from diffsight.engine.random_generators import generators_of, kept_generators
from diffsight.engine.run_to_point import Flow
from diffsight.engine.scan_errors import modules_with_paths
from diffsight.engine.scan_mode import ScanMode
from diffsight.engine.scan_state import HeldState
from diffsight.engine.structural_copy import ComputedTensorsCopied, deep_copied
from diffsight.engine.target import Target, all_modules
from diffsight.engine.torch_state import TorchState
from diffsight.errors import ScanError

# The objects that a scan gets as arguments; None where a run is not a scan.
_scanning: ContextVar[list[Any] | None] = ContextVar("diffsight_scanning", default=None)


def scanning(function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    """Call a function; the runs that it opens are scans. It gets copies of caches and random generators."""
    objects: list[Any] = []
    memo: dict[int, Any] = {}

    def copied(argument: Any) -> Any:
        if any(map(_is_copied, tree_leaves(argument))):
            return tree_map(lambda value: deep_copied(value, memo) if _is_copied(value) else value, argument)
        if not isinstance(argument, torch.Tensor):
            objects.append(argument)
        return argument

    with ComputedTensorsCopied():
        args, kwargs = tuple(map(copied, args)), {name: copied(value) for name, value in kwargs.items()}
    # In a context of its own, which ends with the call, even if that raises.
    return copy_context().run(_call_scanning, objects, function, args, kwargs)


def _is_copied(value: Any) -> bool:
    return is_cache(value) or isinstance(value, torch.Generator)


def _call_scanning(objects: list[Any], function: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
    _scanning.set(objects)
    return function(*args, **kwargs)


def is_scanning() -> bool:
    """Return whether a run that is opened now is a scan."""
    return _scanning.get() is not None


class ScanFlow(Flow):
    """The flow of a scan.

    Args:
        args: the arguments of `Flow`.
        stand_ins: key of a component to the function called in its place, for components that look at the values of
            their inputs.
    """

    is_scan = True

    def __init__(self, *args: Any, stand_ins: Mapping[tuple[int, str], Callable]) -> None:
        super().__init__(*args)
        self._stand_ins = stand_ins
        components = [target for target in self.taps.components if isinstance(target.owner, nn.Module)]
        _check_no_lazy_modules(components)
        self._modules = all_modules(part.owner for part in components)
        self.body_mode = self._mode = ScanMode(components, self._modules)
        is_pipeline = not isinstance(self.tree.root.owner, nn.Module)
        self._border = self._mode.call_between if is_pipeline else self._mode.call_on_shapes
        self._arguments = _scanning.get() or []
        self._state = HeldState()
        self.function = partial(_call_in_mode, self._mode, self.function, is_pipeline)
        self._components = components
        self._generators: list[Any] = []
        self._eager: EagerStance | None = None

    def _load(self) -> None:
        """A scan needs no weights."""

    def _start(self) -> None:
        if self.taps:
            return
        self._state.note(self._modules, self._arguments)
        self._mode.note_weights(self._state.modules, self._state.large)
        self._generators = generators_of(self._state.modules)
        if any(_is_compiled(module) for module in self._modules):
            self._eager = EagerStance()
        super()._start()
        for component in self._components:
            stand_in = self._stand_ins.get(component.key)
            border = partial(_call_instead, stand_in) if stand_in else self._border
            self.taps[component.key].border = border

    def _resume(self, *args: Any) -> Any:
        self._start()  # a scan is tapped even if nothing was asked for
        with kept_generators(self._generators):  # the random numbers of the body stay as they are
            return super()._resume(*args)

    def enter_body(self) -> None:
        self._mode.__enter__()

    def leave_body(self) -> None:
        state = TorchState.capture()
        if self._mode in state.modes:
            state.without_mode(self._mode).restore(state)

    def _put_back(self) -> None:
        self._state.restore()
        if self._eager is not None:
            eager, self._eager = self._eager, None
            eager.leave()


def _check_no_lazy_modules(components: Sequence[Target]) -> None:
    """Raise ScanError if there is a module whose weights have no shape yet, such as an `nn.LazyLinear`."""
    for path, module in modules_with_paths(components):
        if any(map(is_lazy, (*module._parameters.values(), *module._buffers.values()))):
            raise ScanError(
                f"{path or 'the model'} is a {type(module).__name__}, whose weights have no shape before its first "
                "call: call the model once, then scan it"
            )


def _call_in_mode(mode: ScanMode, function: Callable[[], Any], is_pipeline: bool) -> Any:
    with mode:
        return mode.without_values(function()) if is_pipeline else function()


def _call_instead(stand_in: Callable, function: Callable, args: tuple, kwargs: dict) -> Any:
    return stand_in(*args, **kwargs)


class EagerStance:
    """Keeps `torch.compile` from compiling anything in this process until all scans have left their stances."""

    _count = 0
    _stance: Any = None
    _lock = Lock()

    def __init__(self) -> None:
        with EagerStance._lock:
            if not EagerStance._count:
                EagerStance._stance = torch.compiler.set_stance("force_eager")
            EagerStance._count += 1

    def leave(self) -> None:
        """Let `torch.compile` work as before, if this is the last stance."""
        with EagerStance._lock:
            EagerStance._count -= 1
            if not EagerStance._count:
                EagerStance._stance.__exit__(None, None, None)


def _is_compiled(module: nn.Module) -> bool:
    return "_orig_mod" in module._modules or module._compiled_call_impl is not None
