"""`NNsight`, `LanguageModel`, `VisionLanguageModel` and `DiffusionModel` with the arguments of nnsight's models."""

from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any

import torch

from diffsight.compat.compat_envoy import CompatEnvoy
from diffsight.compat.sessions import Session
from diffsight.compat.tracer import Tracer, describe_opening, entered_tracers
from diffsight.errors import InputError
from diffsight.extending import Model, Run, flow_of, run_meant_by

_IGNORED = ("remote", "backend", "scan", "validate", "invoker_args", "blocking")  # arguments without an effect here


class CompatModel(CompatEnvoy):
    """What nnsight's models accept and have, on top of one of diffsight's wrappers."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if not issubclass(cls._run_class, Tracer):
            cls._run_class = type("Tracer", (Tracer, cls._run_class), {"__doc__": Tracer.__doc__})

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        tokenizer = self.__dict__.get("tokenizer")
        if tokenizer is not None and getattr(tokenizer, "pad_token", "") is None:  # code calls it with padding=True
            tokenizer.pad_token = tokenizer.eos_token

    def trace(self, *args: Any, trace: bool = True, **kwargs: Any) -> Any:
        """Open a run of one forward pass. With `trace=False`, return its result."""
        return _opened(super().trace, args, _known_here(kwargs), trace, generates=False)

    def generate(self, *args: Any, trace: bool = True, **kwargs: Any) -> Any:
        """Open a run that generates. With `trace=False`, return its result."""
        return _opened(super().generate, args, _known_here(kwargs), trace, generates=True)

    def scan(self, *args: Any, **kwargs: Any) -> Run:
        """Open a run on shapes alone."""
        return super().scan(*args, **_known_here(kwargs))

    def edit(self, *args: Any, inplace: bool = False, return_context: bool = False, **kwargs: Any) -> Any:
        """Edit a copy of the model. The older form, `with model.edit(""):`, edits the model itself."""
        _check_empty("edit", _known_here(kwargs))
        functions = [argument for argument in args if callable(argument)]
        return super().edit(*functions, inplace=inplace or len(functions) < len(args))

    def session(self, **kwargs: Any) -> Session:
        """Group runs, of this model and of others: `with model.session() as session:`."""
        _check_empty("session", _known_here(kwargs))
        return Session()

    @property
    def generator(self) -> "Generator":
        """The run's result as `model.generator.output`, also in a block whose run has already ended."""
        around = [tracer for tracer in entered_tracers() if flow_of(tracer).tree.open_runs is self._tree.open_runs]
        has_ended = bool(around) and flow_of(around[-1]).outcome is not None
        return Generator(around[-1] if has_ended else run_meant_by(self, "generator.output"))


class Generator:
    """The result of a run under nnsight's name for it, `model.generator.output`."""

    def __init__(self, run: Run) -> None:
        self._run = run

    @property
    def output(self) -> Any:
        """What the run returns in the end. Runs the model to its end first."""
        return self._run.result


@cache
def with_compat_names(wrapper: type[Model]) -> type[Model]:
    """Return a wrapper of diffsight as one with the names of nnsight's."""
    return type(wrapper.__name__, (CompatModel, wrapper), {"__doc__": wrapper.__doc__, "__module__": __package__})


def wrapper_named(name: str) -> type[Model]:
    """Return `DiffusionModel` and the like with nnsight's names.

    They are imported by name when they are first asked for: they stand above the engine, and take long to import."""
    return with_compat_names(getattr(import_module("diffsight"), name))


NNsight = with_compat_names(Model)


def _opened(opens: Callable[..., Tracer], args: tuple, kwargs: dict[str, Any], trace: bool, generates: bool) -> Any:
    """Open a run; without `trace`, return its result."""
    has_input = bool(args) or "prompt" in kwargs or any(isinstance(v, torch.Tensor) for v in kwargs.values())
    tracer = describe_opening(opens(*args, **kwargs), generates, has_input)
    return tracer if trace else tracer.result


def _known_here(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments without those that have no effect here. Raise InputError for `remote=True`."""
    if kwargs.get("remote") not in (None, False, "local"):
        raise InputError("remote: there is no server here. Leave it out, and the model runs in this process")
    return {name: value for name, value in kwargs.items() if name not in _IGNORED}


def _check_empty(method: str, kwargs: dict[str, Any]) -> None:
    if kwargs:
        raise TypeError(f"{method}() got an unexpected keyword argument {next(iter(kwargs))!r}")
