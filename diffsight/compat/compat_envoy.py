"""Module envoys with nnsight's methods: `layer.next()`, `layers.all()`, `model.iter[0:3]`.

Code written for nnsight reads `layer.output[0]`, because layers returned tuples in transformers 4. So the output of
such a layer is a tuple here.
"""

import sys
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import nn

from diffsight.compat.iterations import Iterations
from diffsight.compat.layer_tuples import LayerOutput, gives_tuple
from diffsight.compat.old_names import old_name
from diffsight.compat.tracer import iterations_of, move_to_next, repeat_all
from diffsight.engine.innermost_run import current_edit
from diffsight.envoy import Calls
from diffsight.errors import DiffsightError
from diffsight.extending import (
    FORWARD,
    Envoy,
    Model,
    Points,
    Run,
    Target,
    join,
    open_run,
    owner_of,
    run_meant_by,
    set_class,
)

TAKEN = ("output", "input", "inputs", "source", "iter")  # module names that are also attributes of envoys
_MOVED = "E_"
_OF_MODEL = ("edit", "clear_edits", "generate", "scan", "session")  # methods that only the model has


class CompatPoints(Points):
    """The values of one call. The output of a layer is a tuple, see `layer_tuples`."""

    def next(self) -> "CompatPoints":
        """Return the call after this one."""
        return _with_tuples(super().next())

    def skip(self, value: Any) -> None:
        """Skip the call: the model continues with `value` as the module's output."""
        super().skip(self._without_tuple(value))

    def _fetch(self, part: str) -> Any:
        value = super()._fetch(part)
        return self._as_tuple(value) if part == "output" else value

    def _assign(self, part: str, value: Any) -> None:
        super()._assign(part, self._without_tuple(value) if part == "output" else value)

    def _as_tuple(self, value: Any) -> Any:
        return LayerOutput((value,)) if isinstance(value, torch.Tensor) and self._gives_tuple() else value

    def _without_tuple(self, value: Any) -> Any:
        return value[0] if isinstance(value, tuple) and len(value) == 1 and self._gives_tuple() else value

    def _gives_tuple(self) -> bool:
        return gives_tuple(self._tree, self._target.owner)


class CompatCalls(Calls):
    """The calls of a module in the current scope, by number."""

    def __getitem__(self, index: int) -> CompatPoints:
        return _with_tuples(super().__getitem__(index))


class CompatEnvoy(CompatPoints, Envoy):
    """An envoy with nnsight's names. `Envoy(module)` wraps a module, as `NNsight(module)` does."""

    def __new__(cls, first: Any = None, *args: Any, **kwargs: Any) -> "CompatEnvoy":
        return object.__new__(_wrapping(cls) if isinstance(first, nn.Module) and not issubclass(cls, Model) else cls)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module. In an edit, an attached module is called with `hook=True`."""
        if current_edit() is not None and any(self._owner is module for module in self._tree.attached.ever):
            kwargs.setdefault("hook", True)
        return self._as_tuple(super().__call__(*args, **kwargs))

    @property
    def calls(self) -> CompatCalls:
        """Every call of the scope, by number."""
        return CompatCalls(self)

    # ---- runs

    def trace(self, *args: Any, **kwargs: Any) -> Run:
        """Open a run of this module alone: `with model.unet.trace(sample, timestep, states):`."""
        return open_run(self.root, lambda: self._owner(*args, **kwargs))

    def next(self) -> Any:
        """Move to the next token, or, in a run of one pass, to the module's next call.

        `first = layer.output` and then `second = layer.next().output`."""
        call = move_to_next(run_meant_by(self, "next()"), self._target)
        return self if call is None else self.calls[call]

    def all(self) -> Iterations:
        """Repeat a block for every step of the run: `with layers.all():`.

        As a statement, `layers.all()` repeats the rest of its block."""
        return repeat_all(run_meant_by(self, "all()"), sys._getframe(1))

    @property
    def iter(self) -> Iterations:
        """The steps of the run, selected by number: `with model.iter[0:3]:`."""
        return iterations_of(run_meant_by(self, "iter"))

    @property
    def source(self) -> None:
        """Raise an error that says what to write instead."""
        raise DiffsightError(
            f"{self.path}.source is not supported: values inside a forward pass can be reached only at modules and "
            "methods. Use the module that the line calls, or name a method with Model(net, methods=[...])"
        )

    # ---- the tree of modules

    @property
    def path(self) -> str:
        """The path from the model, as nnsight writes it: `model.layers.0.mlp`."""
        return f"model.{self._target.path}".replace("[", ".").replace("]", "").rstrip(".")

    @property
    def root(self) -> "CompatEnvoy":
        """The model."""
        return self._family["root"]()

    @property
    def parent(self) -> "CompatEnvoy | None":
        """The module around this one; None for the model itself."""
        outer = self._target.outer
        if self._target is self._tree.root:
            return None
        return self.root if outer is None or outer is self._tree.root else self._handle(outer)

    def get(self, path: str) -> Any:
        """Return the module or value at a path from here, such as "layers.0.mlp" or "layers.0.output"."""
        found = self
        for name in path.split("."):
            found = getattr(found, name)
        return found

    def __iter__(self) -> Iterator["CompatEnvoy"]:
        """Iterate over the modules directly in this one, in a `ModuleDict` too."""
        return map(self._handle, [*self._tree.children_of(self._target).values()])

    def modules(self, include_fn: Callable[["CompatEnvoy"], bool] | None = None, names: bool = False) -> list[Any]:
        """Return this module and all modules inside it, innermost first; with `names`, as (path, module) pairs."""
        found = [envoy for envoy in self._inside(set()) if include_fn is None or include_fn(envoy)]
        return [(envoy.path, envoy) for envoy in found] if names else found

    def named_modules(self, include_fn: Callable[["CompatEnvoy"], bool] | None = None) -> list[Any]:
        """Return this module and all modules inside it, innermost first, as (path, module) pairs."""
        return self.modules(include_fn, names=True)

    @property
    def device(self) -> torch.device | None:
        """The device of the first parameter, in a pipeline that of its first component; None if there is none.

        Weights that have not been loaded yet are loaded now."""
        return next((parameter.device for parameter in self._parameters_here()), None)

    @property
    def devices(self) -> set[torch.device]:
        """The devices of all parameters."""
        return {parameter.device for parameter in self._parameters_here()}

    def to(self, *args: Any, **kwargs: Any) -> "CompatEnvoy":
        """Move or cast the module itself, and return the envoy."""
        self._tree.attribute(self._owner, "to")(*args, **kwargs)
        return self

    def cpu(self) -> "CompatEnvoy":
        """Move the module itself to the CPU, and return the envoy."""
        return self.to("cpu")

    def cuda(self, *args: Any) -> "CompatEnvoy":
        """Move the module itself to a GPU, and return the envoy."""
        return self.to(torch.device("cuda", *args))

    @property
    def _module(self) -> nn.Module:
        return self._owner

    def _hint(self, name: str, known: Iterable[str]) -> str:
        if name in _OF_MODEL:
            return f"; that is a method of the model, and reaches all parts: write model.{name}(...)"
        return super()._hint(name, known)

    def _parameters_here(self) -> Iterator[nn.Parameter]:
        self._tree.load_unless_scanning()  # until then, the parameters are on the meta device
        is_module = isinstance(self._owner, nn.Module)  # and not a pipeline, whose components are modules
        parts = [self._owner] if is_module else [part.owner for part in self._tree.children_of(self._target).values()]
        return (parameter for part in parts if isinstance(part, nn.Module) for parameter in part.parameters())

    def _inside(self, seen: set[int]) -> Iterator["CompatEnvoy"]:
        if id(self._owner) in seen:
            return
        seen.add(id(self._owner))
        for target in self._tree.children_of(self._target).values():
            if isinstance(target.owner, nn.Module):
                yield from self._handle(target)._inside(seen)
        yield self

    def _child(self, name: str) -> Any:
        renames = self._tree.__dict__.get("renames")
        target = None if renames is None else renames.target_named(self._target, name)
        if target is None and name.startswith(_MOVED) and name.removeprefix(_MOVED) in TAKEN:
            return super()._child(name.removeprefix(_MOVED))  # `attention.E_output`, a module called `output`
        child = super()._child(name) if target is None else self._handle(target)
        return self if child is None and old_name(self._owner) == name else child

    def __getattr__(self, name: str) -> Any:
        value = super().__getattr__(name)
        if isinstance(value, Envoy) or not isinstance(value, nn.Module):
            return value
        known = self._targets_inside().get(id(value))  # an alias of another module, such as transformers' `base_model`
        return self._handle(known or Target(value, FORWARD, join(self._target.path, name), self._target))

    def _attach(self, name: str, module: nn.Module) -> None:
        is_models_own = (
            name in self._tree.children_of(self._target) and self._tree.attached.find(self._owner, name) is None
        )
        if self._owner is not module and is_models_own and not self._is_in_run():
            self._tree.weights.load()
            setattr(self._owner, name, module)  # replaces it in the model itself, as in nnsight
        else:
            super()._attach(name, module)

    def _handle(self, target: Target) -> Any:
        is_models = self._run is None and self._part is None
        if is_models and target is self._tree.root and self.root is not None:
            return self.root
        known = self._family["handles"] if is_models else {}
        handle = known.get(target.key)
        if handle is None or owner_of(handle) is not target.owner:
            handle = known[target.key] = _converted(super()._handle(target), self._family)
        return handle

    def _bound(self, run: Run, part: Any = None) -> Any:
        return _converted(super()._bound(run, part), self._family)


def _with_tuples(points: Points) -> CompatPoints:
    """Turn the points of one of a module's calls into those of nnsight."""
    set_class(points, CompatPoints)
    return points


def _converted(envoy: Any, family: dict[str, Any]) -> Any:
    """Turn an envoy of the engine, or of a wrapper, into one with nnsight's names."""
    if isinstance(envoy, Envoy):
        if not isinstance(envoy, CompatEnvoy):
            set_class(envoy, _with_compat_names(type(envoy)))
        envoy.__dict__["_family"] = family
    return envoy


@cache
def _wrapping(cls: type[CompatEnvoy]) -> type[Model]:
    """Return the class that `Envoy(module)` creates; for a user's subclass, one that also has its definitions."""
    wrapper = import_module("diffsight.compat").NNsight
    return wrapper if cls is CompatEnvoy else type(cls.__name__, (cls, wrapper), {})


@cache
def _with_compat_names(cls: type[Envoy]) -> type[Envoy]:
    return type(cls.__name__, (CompatEnvoy, cls), {})
