"""The call that made a result: the function, its arguments and the models. `diffsight repeat` makes the call again.

@repeatable
def logit_lens(model, prompts, *, layers=None, ...) -> LensPredictions: ...

result.call.code()              # 'model = LanguageModel("diffsight/smollm2")\nresult = logit_lens(model, …)'
"""

import inspect
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch

from diffsight.lenses.results.call_values import ArgumentEncoder, source_of
from diffsight.lenses.results.literals import literal
from diffsight.lenses.results.model_records import ModelRecord
from diffsight.pipelines.argument_types import check_types

_P, _R = ParamSpec("_P"), TypeVar("_R")
_NOT_RECORDED = ("progress",)  # does not affect the result
_WIDTH = 110  # characters of a line of code


@dataclass(frozen=True, eq=False)
class Call:
    """The call that made a result.

    Attributes:
        function: The name of the function, such as "diffsight.lenses.logit_lens".
        arguments: The arguments that were passed, by name, as JSON stores them (see `call_values.py`).
        models: The records of the models and SAEs among the arguments, by the name of the argument.
        tensors: The tensors and images among the arguments, by the names that `arguments` uses for them.
        date: When the call was made, in UTC.
        positional: How many of the first arguments were passed by position.
    """

    function: str
    arguments: Mapping[str, Any]
    models: Mapping[str, ModelRecord]
    tensors: Mapping[str, torch.Tensor] = field(repr=False)
    date: str
    positional: int = 0

    def record(self) -> dict[str, Any]:
        """Return the call as a record stores it."""
        models = {name: model.record() for name, model in self.models.items()}
        return {"function": self.function, "arguments": dict(self.arguments), "models": models, "date": self.date}

    def code(self) -> str:
        """Return the call as Python code."""
        name = self.function.rpartition(".")[2]
        imports = {f"from diffsight.lenses import {name}"}
        imports |= {f"from {_package(model)} import {model.kind}" for model in self.models.values()}
        words = []
        for place, (key, value) in enumerate(self.arguments.items()):
            written = source_of(value, imports)
            words.append(f"{key}={written}" if place >= self.positional else written)
        lines = [f"{variable} = {_loading(model, imports)}" for variable, model in self.models.items()]
        one_line = f"result = {name}({', '.join(words)})"
        call = [one_line] if len(one_line) <= _WIDTH else [f"result = {name}(", *(f"    {w}," for w in words), ")"]
        return "\n".join([*sorted(imports), "", *lines, *call])


def repeatable(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Make a lens record its call in the result that it returns, as `result.call`.

    The boolean options of the lens are checked before it runs."""
    signature = inspect.signature(function)
    flags = [name for name, parameter in signature.parameters.items() if parameter.annotation is bool]

    @wraps(function)
    def lens(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        args = tuple(list(value) if isinstance(value, Iterator) else value for value in args)
        kwargs = {name: list(value) if isinstance(value, Iterator) else value for name, value in kwargs.items()}
        check_types(function, **{name: kwargs[name] for name in flags if name in kwargs})
        result = function(*args, **kwargs)
        return replace(result, call=_call_of(function, len(args), signature.bind(*args, **kwargs)))

    return lens


def _call_of(function: Callable, positional: int, bound: inspect.BoundArguments) -> Call:
    given = dict(bound.arguments)
    rest = next((p.name for p in bound.signature.parameters.values() if p.kind is p.VAR_KEYWORD), None)
    given |= given.pop(rest, {})
    encoder = ArgumentEncoder()
    arguments = {name: encoder.encode(name, value) for name, value in given.items() if name not in _NOT_RECORDED}
    date = _now().isoformat(timespec="seconds")
    name = f"diffsight.lenses.{function.__name__}"
    return Call(name, arguments, encoder.models, encoder.tensors, date, positional)


def _now() -> datetime:
    """Return the time in UTC, or SOURCE_DATE_EPOCH if it is set, so that files can be identical to the byte."""
    fixed = os.environ.get("SOURCE_DATE_EPOCH")
    return datetime.now(UTC) if fixed is None else datetime.fromtimestamp(int(fixed), UTC)


def _package(model: ModelRecord) -> str:
    """Return the package that the class of a model is imported from."""
    return "diffsight.lenses" if model.kind == "SAE" else "diffsight"


def _loading(model: ModelRecord, imports: set[str]) -> str:
    """Return Python code that loads a model. A comment states anything that code cannot express."""
    options = "".join(f", {name}={source_of(value, imports)}" for name, value in model.options.items())
    if model.kind == "SAE":
        return f"SAE.load({literal(model.source)}{options})" if model.source else "SAE(...)  # not loaded from a folder"
    written = (
        f"{model.kind}({literal(model.source)}{options})" if model.source else f"{model.kind}(...)  # a live model"
    )
    return f"{written}  # with the edits in the record" if model.edits else written
