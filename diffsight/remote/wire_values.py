"""The format of values in remote runs: JSON, with the tensors beside it.

    encoder = ValueEncoder()
    data = encoder.encode(([hidden], {"scale": 2.0}))       # can be passed to `json.dumps`
    ValueDecoder(encoder.tensors).decode(data)              # ([hidden], {"scale": 2.0})

A value that JSON cannot represent is sent as a dictionary with one key that begins with "$". Tensors, arrays and images
are sent bit for bit. Results of lenses, and output objects of diffusers and transformers, are rebuilt from their
fields. Classes of other libraries must already be imported. Received data never runs code. An object that cannot be
sent, such as a cache of keys and values, stays on the server, and a `Held` takes its place.
"""

import math
import sys
from collections import OrderedDict, UserDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, is_dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from diffsight.errors import DiffsightError, InputError, PointNotFoundError
from diffsight.remote.generation_config import config_of, is_generation_config, settings_of

_NUMBERS = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
_OUTPUTS_OF = ("diffusers", "transformers", "torch")  # packages whose output objects are sent
_RESULTS_OF = ("diffsight.lenses", "diffsight.pipelines")


class ProtocolError(DiffsightError):
    """A message of a remote run violates the protocol."""


class Held:
    """A placeholder for an object that stays on the server, such as a cache of keys and values.

    It can be assigned back in the same run. Its contents can only be read on the server."""

    def __init__(self, number: int, kind: str) -> None:
        self.number, self.kind = number, kind

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        raise PointNotFoundError(self._refusal(f".{name}"))  # also an AttributeError, for hasattr

    def __getitem__(self, key: Any) -> Any:
        raise InputError(self._refusal(f"[{key!r}]"))

    def __iter__(self) -> Any:
        raise InputError(self._refusal("iteration"))

    def _refusal(self, what: str) -> str:
        return f"{what}: the {self.kind} stays on the server, and only tensors and plain values are sent"

    def __repr__(self) -> str:
        return f"<{self.kind} on the server>"


class ValueEncoder:
    """Encodes the values of one message.

    Args:
        hold: Keeps an object that cannot be sent, and returns its number. If None, such objects raise an error.
        hand_out: Returns additional fields to send with a tensor, such as its number. If it returns
            {"$shared": number}, the tensor is not sent, because the receiver has it.
        dtype: The type in which to send floating-point tensors that have a larger one.

    Attributes:
        tensors: The tensors of the values, by name.
    """

    def __init__(
        self,
        hold: Callable[[Any], int] | None = None,
        hand_out: Callable[[torch.Tensor], Mapping[str, Any]] | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self._hold, self._hand_out, self._dtype = hold, hand_out, dtype

    def encode(self, value: Any) -> Any:
        """Return a value in a form that JSON can store.

        Raises:
            InputError: The value cannot be sent, and `hold` is None.
        """
        if value is None or type(value) in (bool, int, str):
            return value
        if isinstance(value, torch.Tensor):
            return self._tensor(value)
        if type(value) is float:
            return value if math.isfinite(value) else {"$float": str(value)}
        if type(value) is tuple:
            return {"$tuple": self._list(value)}
        if type(value) is list:
            return self._list(value)
        if isinstance(value, Mapping):
            return self._mapping(value)
        return self._special(value)

    def encode_data(self, tensor: torch.Tensor) -> dict[str, Any]:
        """Return a tensor in a form that JSON can store, without the fields that `hand_out` adds."""
        return self._sent(tensor, {})

    def _special(self, value: Any) -> Any:
        if isinstance(value, (slice, range)):
            return {f"${type(value).__name__}": self._list((value.start, value.stop, value.step))}
        if value is Ellipsis:
            return {"$ellipsis": None}
        if isinstance(value, Held):
            return {"$held": [value.number, value.kind]}
        if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
            return {"$array": self._add(torch.from_numpy(np.array(value, order="C")))}
        if isinstance(value, np.generic) and value.dtype.kind in "biuf":
            return self.encode(value.item())
        if isinstance(value, Image.Image):
            return self._image(value)
        if isinstance(value, (torch.dtype, torch.device)):
            return {f"${type(value).__name__}": str(value).removeprefix("torch.")}
        if isinstance(value, tuple) and _name_of(value, _OUTPUTS_OF):  # torch.Size, a named tuple
            return {"$named": [_name_of(value, _OUTPUTS_OF), self._list(value)]}
        if is_dataclass(value) and not isinstance(value, type) and _name_of(value, _RESULTS_OF):
            given = {one.name: self.encode(getattr(value, one.name)) for one in fields(value) if one.init}
            return {"$object": [_name_of(value, _RESULTS_OF), given]}
        if is_generation_config(value):
            return {"$generation_config": self.encode(settings_of(value))}
        if isinstance(value, (int, str)):  # a subclass, such as an enumeration
            return value.__index__() if isinstance(value, int) else str.__str__(value)
        if self._hold is None:
            hint = ": paths mean nothing on another machine" if isinstance(value, Path) else ""
            raise InputError(f"a {type(value).__name__} cannot be sent to a server{hint}")
        return {"$held": [self._hold(value), type(value).__name__]}

    def _list(self, values: Iterable[Any]) -> list[Any]:
        return [self.encode(value) for value in values]

    def _mapping(self, values: Mapping[Any, Any]) -> dict[str, Any]:
        if is_dataclass(values) and _name_of(values, _RESULTS_OF):
            return self._special(values)
        name = _name_of(values, _OUTPUTS_OF)
        if name and (is_dataclass(values) or isinstance(values, UserDict)):
            # The items of an output object lack the fields that are None.
            held = {one.name: getattr(values, one.name) for one in fields(values)} if is_dataclass(values) else values
            return {"$output": [name, {key: self.encode(value) for key, value in held.items()}]}
        if all(isinstance(key, str) and not key.startswith("$") for key in values):
            return {key: self.encode(value) for key, value in values.items()}
        return {"$map": [self._list(pair) for pair in values.items()]}

    def _image(self, image: Image.Image) -> dict[str, Any]:
        shown = image.convert("RGBA") if image.mode in ("P", "PA") else image
        pixels = torch.frombuffer(bytearray(shown.tobytes()), dtype=torch.uint8) if min(shown.size) else torch.empty(0)
        return {"$image": [self._add(pixels), shown.mode, *shown.size]}

    def _tensor(self, tensor: torch.Tensor) -> dict[str, Any]:
        if tensor.is_meta or tensor.layout is not torch.strided or tensor.is_quantized:
            kind = "meta tensor" if tensor.is_meta else "quantized or sparse tensor"
            raise InputError(f"a {kind} cannot be sent: send one with its data, such as .to_dense()")
        more = self._hand_out(tensor) if self._hand_out is not None else {}
        return dict(more) if "$shared" in more else self._sent(tensor, more)

    def _sent(self, tensor: torch.Tensor, more: Mapping[str, Any]) -> dict[str, Any]:
        sent = tensor.detach()
        if self._dtype is not None and sent.is_floating_point() and sent.element_size() > self._dtype.itemsize:
            more = {**more, "dtype": str(sent.dtype).removeprefix("torch.")}
            sent = sent.to(self._dtype)
        shape, stride = [*sent.shape], [*sent.stride()]
        if stride != _usual(shape) and sent.numel() and _is_dense(shape, stride):
            more = {**more, "layout": [shape, stride]}
            sent = sent.as_strided((sent.numel(),), (1,))
        return {"$tensor": self._add(sent), **more}

    def _add(self, tensor: torch.Tensor) -> str:
        name = str(len(self.tensors))
        self.tensors[name] = tensor.cpu().contiguous().resolve_conj().resolve_neg()
        return name


def can_be_sent(value: Any) -> bool:
    """Return whether a value can be sent to a server."""
    try:
        ValueEncoder().encode(value)
    except InputError:
        return False
    return True


class ValueDecoder:
    """Decodes the values of one message.

    Args:
        tensors: The tensors that came with the message, by name.
        held: Returns the object that was kept under a number. If None, a `Held` takes its place.
        received: Called with every tensor and the fields sent with it; returns the tensor to use.
        shared: Returns the tensor with a number, for a tensor that was not sent because the receiver has it.
    """

    def __init__(
        self,
        tensors: Mapping[str, torch.Tensor],
        held: Callable[[int], Any] | None = None,
        received: Callable[[torch.Tensor, Mapping[str, Any]], torch.Tensor] | None = None,
        shared: Callable[[int], torch.Tensor] | None = None,
    ) -> None:
        self._tensors, self._held, self._received, self._shared = tensors, held, received, shared

    def decode(self, data: Any) -> Any:
        """Return the value that was encoded as `data`.

        Raises:
            ProtocolError: `data` is not a valid encoding.
        """
        if isinstance(data, list):
            return list(map(self.decode, data))
        if not isinstance(data, dict):
            return data
        kind = next(iter(data), "")
        if not kind.startswith("$"):
            return {key: self.decode(value) for key, value in data.items()}
        try:
            return self._tensor(data) if kind == "$tensor" else self._special(kind, data[kind])
        except DiffsightError:
            raise
        except Exception as error:
            raise ProtocolError(f"{kind} does not hold what it should: {type(error).__name__}: {error}") from None

    def _tensor(self, data: dict[str, Any]) -> torch.Tensor:
        tensor = self._tensors[data["$tensor"]]
        if "layout" in data:
            shape, stride = data["layout"]
            if len(shape) != len(stride) or math.prod(shape) != tensor.numel() or not _is_dense(shape, stride):
                raise ProtocolError(f"a tensor of {tensor.numel()} elements has no shape {shape} with strides {stride}")
            tensor = tensor.as_strided(shape, stride)
        if "dtype" in data:
            tensor = tensor.to(_dtype(data["dtype"]))
        return tensor if self._received is None else self._received(tensor, data)

    def _special(self, kind: str, inner: Any) -> Any:
        match kind:
            case "$tuple":
                return tuple(map(self.decode, inner))
            case "$map":
                return {self.decode(key): self.decode(value) for key, value in inner}
            case "$float":
                return _NUMBERS[inner]
            case "$slice":
                return slice(*map(self.decode, inner))
            case "$range":
                return range(*inner)
            case "$ellipsis":
                return ...
            case "$array":
                return self._tensors[inner].numpy()
            case "$image":
                name, mode, *size = inner
                data = self._tensors[name].numpy().tobytes()
                if math.prod(size) > len(data) * (8 if mode == "1" else 1):  # before memory is allocated for it
                    raise ValueError(f"an image of size {size} has more than {len(data)} bytes")
                return Image.frombytes(mode, tuple(size), data)
            case "$dtype":
                return _dtype(inner)
            case "$device":
                return torch.device(inner)
            case "$generation_config":
                return config_of(self.decode(inner))
            case "$shared" if self._shared is not None:
                return self._shared(inner)
            case "$held":
                number, name = inner
                return Held(number, name) if self._held is None else self._held(number)
            case "$named":
                return _named(*self._with_class(inner, _OUTPUTS_OF, tuple))
            case "$output":
                kind, values = self._with_class(inner, _OUTPUTS_OF, (OrderedDict, UserDict))
                if not is_dataclass(kind) and not issubclass(kind, UserDict):
                    raise ProtocolError(f"{kind.__name__} is not a class of output objects")
                return kind(values) if issubclass(kind, UserDict) else kind(**values)
            case "$object":
                kind, values = self._with_class(inner, _RESULTS_OF, object)
                if not is_dataclass(kind):
                    raise ProtocolError(f"{kind.__name__} is not a class of results")
                return kind(**values)
        raise ProtocolError(f"{kind} is not a known kind of value: it may come from a newer version of diffsight")

    def _with_class(self, inner: list, packages: tuple[str, ...], base: Any) -> tuple[type, Any]:
        """Return the named class, which must already be imported or be part of diffsight, and the decoded contents."""
        name, values = inner
        module, _, attribute = name.rpartition(".")
        if packages is _RESULTS_OF and _is_in(module, packages) and find_spec(module) is not None:
            import_module(module)
        found = getattr(sys.modules.get(module), attribute, None) if _is_in(module, packages) else None
        if not isinstance(found, type) or not issubclass(found, base):
            raise ProtocolError(f"there is no class {name} here whose objects can be received")
        return found, self.decode(values)


def _usual(shape: list[int]) -> list[int]:
    """Return the strides of a contiguous tensor."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return strides[::-1]


def _is_dense(shape: list[int], stride: list[int]) -> bool:
    """Return whether a tensor has no gaps in memory, in any order of dimensions, such as channels last.

    If so, its strides are sent, including those of dimensions of size 1: kernels may round differently for others."""
    step = 1
    for gap, size in sorted((gap, size) for gap, size in zip(stride, shape) if size != 1):
        if gap != step or size < 1:
            return False
        step *= size
    return all(gap >= 0 for gap in stride)


def _named(kind: type, values: list) -> tuple:
    return kind(*values) if hasattr(kind, "_fields") else kind(values)


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise ProtocolError(f"there is no tensor type called {name!r}")
    return found


def _name_of(value: Any, packages: tuple[str, ...]) -> str:
    """Return the full name of the class of a value, or an empty string if it is not in one of these packages."""
    kind = type(value)
    is_there = _is_in(kind.__module__, packages) and kind.__qualname__ == kind.__name__
    return f"{kind.__module__}.{kind.__name__}" if is_there else ""


def _is_in(module: str, packages: tuple[str, ...]) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)
