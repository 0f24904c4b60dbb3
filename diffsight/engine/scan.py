"""Scans: runs on shapes alone, without weights.

    with model.scan("a red circle above a blue square") as run:
        width = run.unet.mid_block.output.shape[1]

The model's code runs, its arithmetic does not. Inside a component (the model; in a pipeline each of its modules) every
tensor is on the meta device, which knows shapes and types and computes nothing. At the component's border values change
sides: what goes in becomes meta, what comes out zeros of the same shape, on the device of what went in. So what lies
between components (tokenizers, schedulers, post-processing) runs for real, on zeros.

Weights stay where they are, loaded or not. A function mode of PyTorch, on while the model runs and within the body of
the `with` statement, gives every function a meta twin in the place of a weight, and takes all tensors to meta where one
of them is. What a model writes into its own attributes meanwhile is undone at the end.

Token ids and masks are real where they come in, and models look at them (`if mask.all():`). So the values of integer
and boolean tensors are carried along for as long as they depend on nothing else.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from threading import Lock
from typing import Any

import torch
from torch import nn

from diffsight.engine.flow import Flow
from diffsight.engine.meta import Shapes
from diffsight.engine.target import Target

_scanning: ContextVar[bool] = ContextVar("diffsight_scanning", default=False)


@contextmanager
def scanning() -> Iterator[None]:
    """Runs opened within are scans."""
    token = _scanning.set(True)
    try:
        yield
    finally:
        _scanning.reset(token)


def is_scanning() -> bool:
    """Whether a run that is opened now is a scan."""
    return _scanning.get()


class ScanFlow(Flow):
    """The flow of a scan: its components are called through their borders, and no weights are loaded for it.
    `stand_ins` are called in the place of components that look at values, by the key of their target."""

    is_scan = True

    def __init__(self, *args: Any, stand_ins: Mapping[tuple[int, str], Callable]) -> None:
        super().__init__(*args)
        self.stand_ins = stand_ins
        self.load = lambda: None  # a scan needs no weights
        self.modules = list(dict.fromkeys(m for part in _modules(self.taps.components) for m in part.modules()))
        self.body_mode = self.shapes = shapes = Shapes([*self.taps.components], self.modules)
        self._states: list[ModuleState] = []
        self._eager: Eager | None = None
        function = self.function

        def call_on_shapes() -> Any:
            with shapes:
                return function()

        self.function = call_on_shapes

    def _start(self) -> None:
        if self.taps:
            return
        self.shapes.note_weights(self.modules)
        self._states = [ModuleState(module) for module in self.modules]
        if any(_is_compiled(module) for module in self.modules):
            self._eager = Eager()
        super()._start()
        for component in self.taps.components:
            if isinstance(component.owner, nn.Module):
                tap = self.taps[component.key]
                stand_in = self.stand_ins.get(component.key)
                tap.border = partial(_call_instead, stand_in) if stand_in else self.shapes.call

    def _resume(self, *args: Any) -> Any:
        self._start()
        return super()._resume(*args)

    def _end(self, outcome: str) -> None:
        super()._end(outcome)
        while self._states:
            self._states.pop().restore()
        if self._eager is not None:
            self._eager.leave()
            self._eager = None


def _modules(components: Sequence[Target]) -> list[nn.Module]:
    return [component.owner for component in components if isinstance(component.owner, nn.Module)]


def _call_instead(stand_in: Callable, function: Callable, args: tuple, kwargs: dict) -> Any:
    return stand_in(*args, **kwargs)


class ModuleState:
    """What a module holds itself: weights, and attributes, such as tables it keeps for later calls, and the hooks that
    go along with these. Not what it calls: children, its forward pass."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.hooks = module, HookTables(module)
        self.attributes = self._read()
        self.contents = {n: value.copy() for n, value in self.attributes.items() if type(value) in (dict, list)}

    def _read(self) -> dict[str, Any]:
        held = vars(self.module).items()
        return {n: v for n, v in held if n != "_modules" and not n.startswith("_diffsight") and not callable(v)}

    def restore(self) -> None:
        self.hooks.restore()
        held = vars(self.module)
        for name in self._read().keys() - self.attributes.keys():
            del held[name]
        held.update({name: value for name, value in self.attributes.items() if held.get(name) is not value})
        for name, content in self.contents.items():
            value = held[name]
            value.clear()
            value.extend(content) if isinstance(value, list) else value.update(content)


class HookTables:
    """The hooks on a module. Those that come after are taken off by `restore()`, but for those of runs: the models of
    transformers, for one, put hooks on their parts in their first call, and keep in mind that they are there."""

    def __init__(self, module: nn.Module) -> None:
        self._tables = [(table, set(table)) for table in (module._forward_hooks, module._forward_pre_hooks)]

    def restore(self) -> None:
        for table, known in self._tables:
            for key in [key for key in table if key not in known and not _is_of_a_run(table[key])]:
                del table[key]


def _is_of_a_run(hook: Callable) -> bool:
    return (getattr(hook, "__module__", None) or "").split(".")[0] == "diffsight"


class Eager:
    """Keeps `torch.compile` from compiling what runs on shapes alone, in the whole process, until all have left."""

    _count = 0
    _stance: Any = None
    _lock = Lock()

    def __init__(self) -> None:
        with Eager._lock:
            if not Eager._count:
                Eager._stance = torch.compiler.set_stance("force_eager")
            Eager._count += 1

    def leave(self) -> None:
        with Eager._lock:
            Eager._count -= 1
            if not Eager._count:
                Eager._stance.__exit__(None, None, None)


def _is_compiled(module: nn.Module) -> bool:
    return "_orig_mod" in module._modules or module._compiled_call_impl is not None
