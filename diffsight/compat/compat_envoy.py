"""The handles on modules, with nnsight's methods: `layer.next()`, `layers.all()`, `model.iter[0:3]`.

The output of a layer of a language model is a tuple here, as code written for nnsight expects: `layer.output[0]`.
"""

import sys
from functools import cache
from typing import Any

import torch

from diffsight.compat.config import CONFIG
from diffsight.compat.iterations import Iterations
from diffsight.compat.tracer import iterations_of, move_to_next, repeat_all
from diffsight.engine.current_run import current_edit
from diffsight.errors import DiffsightError
from diffsight.extending import Envoy, Run, Target, run_meant_by


class CompatEnvoy(Envoy):
    """An envoy with the names of nnsight's."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module. In an edit, an attached module is called through the run's points, as with `hook=True`."""
        if current_edit() is not None and any(self._owner is module for module in self._tree.attached.ever):
            kwargs.setdefault("hook", True)
        return self._as_tuple(super().__call__(*args, **kwargs))

    def next(self) -> Any:
        """Move to the next token; in a run of one pass, to the next call of the module.

        `first = layer.output` and then `second = layer.next().output`."""
        call = move_to_next(run_meant_by(self, "next()"), self._target)
        return self if call is None else self.calls[call]

    def all(self) -> Iterations:
        """Repeat a block for every step of the run: `with layers.all():`.

        As a statement, `layers.all()` repeats what follows it in its block."""
        return repeat_all(run_meant_by(self, "all()"), sys._getframe(1))

    @property
    def iter(self) -> Iterations:
        """Steps of the run by number: `with model.iter[0:3]:`."""
        return iterations_of(run_meant_by(self, "iter"))

    @property
    def source(self) -> None:
        """Raise an error that says what to write instead."""
        raise DiffsightError(
            f"{self.path}.source is not supported: values inside a forward pass can be reached only at modules and "
            "methods. Use the module that the line calls, or name a method with Model(net, methods=[...])"
        )

    def _fetch(self, part: str) -> Any:
        value = super()._fetch(part)
        return self._as_tuple(value) if part == "output" else value

    def _assign(self, part: str, value: Any) -> None:
        is_tuple = part == "output" and isinstance(value, tuple) and len(value) == 1 and self._is_layer()
        super()._assign(part, value[0] if is_tuple else value)

    def _as_tuple(self, value: Any) -> Any:
        return (value,) if isinstance(value, torch.Tensor) and self._is_layer() else value

    def _is_layer(self) -> bool:
        """Return whether the output of this module is a tuple in code written for nnsight."""
        stacks = getattr(self._tree, "stacks", ()) if CONFIG.APP.BLOCKS_GIVE_TUPLES else ()
        return self._part is None and any(self._owner is layer for stack in stacks for layer in stack)

    def _handle(self, target: Target) -> Any:
        return _converted(super()._handle(target))

    def _bound(self, run: Run, part: Any = None) -> Any:
        return _converted(super()._bound(run, part))


def _converted(envoy: Any) -> Any:
    """Turn an envoy of the engine, or of a wrapper, into one with nnsight's names."""
    if isinstance(envoy, Envoy) and not isinstance(envoy, CompatEnvoy):
        object.__setattr__(envoy, "__class__", _with_compat_names(type(envoy)))
    return envoy


@cache
def _with_compat_names(cls: type[Envoy]) -> type[Envoy]:
    return type(cls.__name__, (CompatEnvoy, cls), {})
