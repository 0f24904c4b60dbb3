"""The arguments of a lens as JSON stores them, and back.

    encoder = ArgumentEncoder()
    encoder.encode("layers", slice(0, 4))       # {"$slice": [0, 4, None]}
    encoder.encode("vector", tensor)            # {"$tensor": "vector"}, and encoder.tensors["vector"] is the tensor
    ArgumentDecoder(encoder.tensors, models).decode({"$slice": [0, 4, None]})

Numbers, strings, lists and dictionaries are stored as they are. Any other value is stored as a dictionary
with one key that starts with "$". If there is no form for it, as for a user's function, it is stored as
`{"$unknown": repr(value)}`.
"""

import importlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from diffsight.errors import InputError
from diffsight.lenses.features.autoencoder import SAE
from diffsight.lenses.results.literals import literal
from diffsight.lenses.results.model_records import ModelRecord
from diffsight.pipelines.diffusion.model import DiffusionModel
from diffsight.pipelines.language.model import LanguageModel

_LENSES = "diffsight.lenses"


class UnknownValueError(InputError):
    """An argument was of a kind that a record cannot hold."""


@dataclass(frozen=True)
class FittedWith:
    """The arguments of `fit` that an object such as a LinearMap was fitted with, as JSON stores them, and the models
    among them. A call that takes the object records them."""

    arguments: Mapping[str, Any]
    models: Mapping[str, ModelRecord]

    @classmethod
    def of(cls, **arguments: Any) -> "FittedWith":
        """Return the record of the arguments of `fit`, without those that are None."""
        encoder = ArgumentEncoder()
        given = {name: value for name, value in arguments.items() if value is not None}
        return cls({name: encoder.encode(f"fitted_{name}", value) for name, value in given.items()}, encoder.models)


class ArgumentEncoder:
    """Encodes the arguments of one call, and collects the tensors and models among them."""

    def __init__(self) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self.models: dict[str, ModelRecord] = {}
        self._names: dict[int, str] = {}  # names of models that were encoded before

    def encode(self, name: str, value: Any) -> Any:
        """Return an argument as JSON stores it. `name` is the name of its tensors and models."""
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        if isinstance(value, (DiffusionModel, LanguageModel, SAE)):
            return {"$model": self._model(name, value)}
        if isinstance(value, list):
            return self._list(name, value)
        if isinstance(value, tuple):
            return {"$tuple": self._list(name, value)}
        if isinstance(value, Mapping):
            return self._mapping(name, value)
        return self._special(name, value)

    def _special(self, name: str, value: Any) -> dict[str, Any]:
        """Return a value that is neither plain nor a collection, as a dictionary with one key."""
        if isinstance(value, (range, slice)):
            return {f"${type(value).__name__}": [value.start, value.stop, value.step]}
        if isinstance(value, torch.Tensor):
            return {"$tensor": self._tensor(name, value.detach().cpu().clone().contiguous())}
        if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
            return {"$array": self._tensor(name, torch.from_numpy(value.copy()))}
        if isinstance(value, np.ndarray):
            return self.encode(name, value.tolist()) if value.dtype.kind in "US" else {"$unknown": repr(value)}
        if isinstance(value, np.generic):
            return self.encode(name, value.item())
        if isinstance(value, Image.Image):
            shown = value if value.mode in ("L", "RGB", "RGBA") else value.convert("RGBA")
            return {"$image": self._tensor(name, torch.from_numpy(np.array(shown)))}
        if isinstance(value, Path):
            return {"$path": str(value)}
        if isinstance(value, (torch.dtype, torch.device)):
            return {f"${type(value).__name__}": str(value).removeprefix("torch.")}
        if callable(value) and public_name(value):
            return {"$function": public_name(value)}
        if is_dataclass(value) and type(value).__module__.startswith("diffsight."):
            given = {one.name: self.encode(f"{name}.{one.name}", getattr(value, one.name)) for one in fields(value)}
            return {"$object": [f"{type(value).__module__}.{type(value).__name__}", given]}
        if isinstance(fitted := getattr(value, "fitted_with", None), FittedWith):
            self.models |= fitted.models
            return {"$fitted": [f"{type(value).__module__}.{type(value).__name__}", fitted.arguments]}
        if hasattr(value, "__index__"):
            return int(value)
        return {"$unknown": repr(value)}

    def _list(self, name: str, values: Iterable[Any]) -> list[Any]:
        return [self.encode(f"{name}_{i}", value) for i, value in enumerate(values)]

    def _mapping(self, name: str, values: Mapping[Any, Any]) -> dict[str, Any]:
        if all(isinstance(key, str) and not key.startswith("$") for key in values):
            return {key: self.encode(f"{name}_{i}", value) for i, (key, value) in enumerate(values.items())}
        return {"$map": [self._list(f"{name}_{i}", pair) for i, pair in enumerate(values.items())]}

    def _model(self, name: str, model: DiffusionModel | LanguageModel | SAE) -> str:
        if id(model) not in self._names:
            self._names[id(model)] = name
            self.models[name] = ModelRecord.of(model, self.encode)
        return self._names[id(model)]

    def _tensor(self, name: str, value: torch.Tensor) -> str:
        self.tensors[name] = value
        return name


class ArgumentDecoder:
    """Decodes the arguments of one call.

    Args:
        tensors: The tensors that the call refers to, by name.
        models: The models, by name.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor], models: Mapping[str, Any]) -> None:
        self._tensors, self._models = tensors, models

    def decode(self, value: Any) -> Any:
        """Return the value that `ArgumentEncoder.encode` stored.

        Raises:
            UnknownValueError: The value could not be stored.
            InputError: This version of diffsight does not know the form of the value.
        """
        if isinstance(value, list):
            return list(map(self.decode, value))
        if not isinstance(value, dict):
            return value
        kind, inner = next(iter(value.items()), ("", None))
        if not kind.startswith("$"):
            return {key: self.decode(one) for key, one in value.items()}
        return self._special(kind, inner)

    def _special(self, kind: str, inner: Any) -> Any:
        match kind:
            case "$model":
                return self._models[inner]
            case "$tuple":
                return tuple(map(self.decode, inner))
            case "$map":
                return {self.decode(key): self.decode(value) for key, value in inner}
            case "$range":
                return range(*inner)
            case "$slice":
                return slice(*inner)
            case "$tensor":
                return self._tensors[inner]
            case "$array":
                return self._tensors[inner].numpy()
            case "$image":
                return Image.fromarray(self._tensors[inner].numpy())
            case "$path":
                return Path(inner)
            case "$dtype":
                return getattr(torch, inner)
            case "$device":
                return torch.device(inner)
            case "$function":
                return named(inner)
            case "$object":
                return named(inner[0])(**self.decode(inner[1]))
            case "$fitted":
                return named(inner[0])().fit(**self.decode(inner[1]), progress=False)
            case "$unknown":
                raise UnknownValueError(f"a record cannot hold {inner}")
        raise InputError(
            f"the record has a value of an unknown kind, {kind!r}: it comes from a newer version of diffsight"
        )


def public_name(value: Any) -> str | None:
    """Return the name of a function of `diffsight.lenses`, or None if it is not one of them."""
    name = getattr(value, "__name__", "")
    lenses = importlib.import_module(_LENSES)
    return f"{_LENSES}.{name}" if name in lenses.__all__ and getattr(lenses, name) is value else None


def named(name: str) -> Any:
    """Return the object with a full name such as "diffsight.lenses.logit_lens".

    Raises:
        InputError: diffsight has no such object.
    """
    module, _, attribute = name.rpartition(".")
    if not module.startswith("diffsight."):
        raise InputError(f"{name} is not a part of diffsight")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError):
        raise InputError(f"this version of diffsight has no {name}") from None


# ---- as Python code


def source_of(value: Any, imports: set[str]) -> str:
    """Return an encoded value as Python code, and add to `imports` the lines that the code needs."""
    if isinstance(value, list):
        return f"[{', '.join(source_of(one, imports) for one in value)}]"
    if not isinstance(value, dict):
        return literal(value)
    kind, inner = next(iter(value.items()), ("", None))
    if not kind.startswith("$"):
        return f"{{{', '.join(f'{literal(key)}: {source_of(one, imports)}' for key, one in value.items())}}}"
    match kind:
        case "$model":
            return inner
        case "$tuple":
            return f"({''.join(source_of(one, imports) + ', ' for one in inner).rstrip() if inner else ''})"
        case "$map":
            return f"{{{', '.join(f'{source_of(k, imports)}: {source_of(v, imports)}' for k, v in inner)}}}"
        case "$range" | "$slice":
            return f"{kind[1:]}({', '.join(map(repr, inner))})"
        case "$dtype":
            imports.add("import torch")
            return f"torch.{inner}"
        case "$function":
            imports.add(f"from {inner.rpartition('.')[0]} import {inner.rpartition('.')[2]}")
            return inner.rpartition(".")[2]
        case "$object":
            module, _, name = inner[0].rpartition(".")
            imports.add(f"from {module} import {name}")
            return f"{name}({', '.join(f'{key}={source_of(one, imports)}' for key, one in inner[1].items())})"
        case "$fitted":
            module, _, name = inner[0].rpartition(".")
            imports.add(f"from {module} import {name}")
            return f"{name}().fit({', '.join(f'{key}={source_of(one, imports)}' for key, one in inner[1].items())})"
        case "$tensor" | "$array" | "$image":
            imports.add("from safetensors.torch import load_file")
            return f'load_file("arguments.safetensors")[{inner!r}]'
        case "$path" | "$device":
            return literal(inner)
    return "..."  # a value that no record can hold
