"""Scans: runs that compute shapes instead of values, and need no weights.

    with model.scan("a red circle above a blue square") as run:
        width = run.unet.mid_block.output.shape[1]

The model's code runs as usual, but inside a component (the model; in a pipeline, each of its modules) tensors are
PyTorch's fake tensors, which have a shape, a dtype and a device and no values. Where a component of a pipeline returns,
its fake tensors are replaced with zeros. What runs between components, such as tokenizers, schedulers and
post-processing, therefore computes for real, on zeros.

Weights stay where they are, loaded or not: `ScanMode` lets functions see fake tensors in their place. What else the
modules hold as attributes is replaced with copies until the end, so the model changes these. Also undone at the end are
the draws from the global random generators and from those that modules hold.
"""

from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar, copy_context
from functools import partial
from threading import Lock
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_map

from diffsight.engine.opaque_values import is_cache
from diffsight.engine.random_generators import generators_of, kept_generators
from diffsight.engine.run_to_point import Flow
from diffsight.engine.scan_errors import modules_with_paths
from diffsight.engine.scan_mode import ScanMode
from diffsight.engine.scan_state import ModuleStates
from diffsight.engine.structural_copy import TensorsCopiedBy, copied_tensor, deep_copied
from diffsight.engine.target import Target, all_modules
from diffsight.engine.torch_state import TorchState
from diffsight.errors import ScanError

_scanning: ContextVar[bool] = ContextVar("diffsight_scanning", default=False)


def scanning(function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    """Call a function; the runs that it opens are scans."""
    # In a context of its own, which ends with the call, even if that raises.
    return copy_context().run(_call_scanning, function, args, kwargs)


def with_copies(call: tuple[tuple, dict]) -> tuple[tuple, dict]:
    """Return the arguments of a call of a pipeline with copies of the caches and random generators among them. The
    pipeline counts on its modules to fill the caches that they get, so these are not copied later, as in a scan of a
    module."""
    memo: dict[int, Any] = {}
    with TensorsCopiedBy(copied_tensor):
        return tree_map(lambda value: deep_copied(value, memo) if _is_copied(value) else value, call)


def _is_copied(value: Any) -> bool:
    return is_cache(value) or isinstance(value, torch.Generator)


def _call_scanning(function: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
    _scanning.set(True)
    return function(*args, **kwargs)


def is_scanning() -> bool:
    """Return whether a run that is opened now is a scan."""
    return _scanning.get()


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
        self._states = ModuleStates(self._modules)
        self.function = partial(_call_in_mode, self._mode, self._states, self.function, is_pipeline)
        self._components = components
        self._generators: list[Any] = []
        self._eager: EagerStance | None = None

    def _load(self) -> None:
        """A scan needs no weights."""

    def _start(self) -> None:
        if self.taps:
            return
        self._mode.note_weights(self._modules)
        self._states.note()
        self._generators = generators_of(self._modules)
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
        self._states.restore()
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


def _call_in_mode(mode: ScanMode, states: ModuleStates, function: Callable[[], Any], is_pipeline: bool) -> Any:
    states.use_copies()
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
