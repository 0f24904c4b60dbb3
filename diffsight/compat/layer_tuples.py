"""Layers whose output code written for nnsight expects to be a tuple, as in transformers 4: `layer.output[0]`."""

from collections.abc import Callable
from numbers import Number
from typing import Any, NoReturn

import numpy
import torch

from diffsight.compat.config import CONFIG
from diffsight.errors import InputError
from diffsight.extending import Tree


class TensorAttributeError(InputError, AttributeError):
    """The tuple of a layer was asked for an attribute of a tensor. `hasattr` returns False, as for any tuple."""


class LayerOutput(tuple):
    """The output of a layer as a tuple. What means something only for a tensor raises an error that names the switch,
    as does what a tuple understands differently: `output * 2`, `output + output`, `output == 0`."""

    __slots__ = ()
    __hash__ = tuple.__hash__
    __array_ufunc__ = None  # so that `array * output` is left to the methods here

    def __getitem__(self, key: Any) -> Any:
        if getattr(key, "ndim", 0) or not (isinstance(key, slice) or hasattr(key, "__index__")):
            raise InputError(f"{_IS_TUPLE} Write `.output[0][...]` for `.output[...]`, {_OR_SWITCH}")
        return super().__getitem__(key)

    def __setitem__(self, key: Any, value: Any) -> None:
        if key == 0 and value is super().__getitem__(0):  # `output[0] += x`, which has changed the value in place
            return
        raise InputError(f"{_IS_TUPLE} Write `.output[0][...] = ` for `.output[...] = `, {_OR_SWITCH}")

    def __getattr__(self, name: str) -> Any:
        if hasattr(torch.Tensor, name) and not name.startswith("__"):
            raise TensorAttributeError(f"{_IS_TUPLE} Write `.output[0].{name}` for `.output.{name}`, {_OR_SWITCH}")
        raise AttributeError(f"'tuple' object has no attribute {name!r}")

    def __reduce__(self) -> tuple[type, tuple]:
        """Pickle it as a plain tuple, so that loading it does not need diffsight."""
        return tuple, ([*self],)

    @classmethod
    def __torch_function__(cls, function: Callable, types: Any, args: tuple = (), kwargs: Any = None) -> NoReturn:
        raise InputError(_WRITE_ITEM)


torch.serialization.add_safe_globals([tuple])  # pickled by its name, it is refused by `torch.load` otherwise


def _of_tensors(name: str) -> Callable:
    def method(own: LayerOutput, *others: Any) -> Any:
        raise InputError(_WRITE_ITEM)

    method.__name__ = name
    return method


def _of_tuples(name: str, plain: Callable) -> Callable:
    def method(own: LayerOutput, other: Any) -> Any:
        if isinstance(other, (LayerOutput, Number, torch.Tensor, numpy.ndarray)):
            raise InputError(_WRITE_ITEM)
        return plain(own, other)

    method.__name__ = name
    return method


_ARITHMETIC = ("sub", "mul", "matmul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor")
for _name in (*_ARITHMETIC, *(f"r{name}" for name in _ARITHMETIC), "neg", "pos", "abs", "invert"):
    setattr(LayerOutput, f"__{_name}__", _of_tensors(f"__{_name}__"))
for _name in ("add", "eq", "ne", "lt", "le", "gt", "ge"):
    setattr(LayerOutput, f"__{_name}__", _of_tuples(f"__{_name}__", getattr(tuple, f"__{_name}__")))
LayerOutput.__radd__ = _of_tuples("__radd__", lambda own, other: other + tuple(own))

_IS_TUPLE = "the output of a layer is a tuple here, as in transformers 4."
_OR_SWITCH = "or set CONFIG.APP.BLOCKS_GIVE_TUPLES = False for tensors"
_WRITE_ITEM = f"{_IS_TUPLE} Write `.output[0]` for `.output`, {_OR_SWITCH}"


def gives_tuple(tree: Tree, owner: Any) -> bool:
    """Return whether the output of a module is a tuple in code written for nnsight."""
    if not CONFIG.APP.BLOCKS_GIVE_TUPLES or not tree.__dict__.get("blocks_give_tuples"):
        return False
    if any(owner is layer for stack in getattr(tree, "stacks", ()) for layer in stack):
        return True
    return any(cls.__name__ == "GradientCheckpointingLayer" for cls in type(owner).__mro__)  # transformers' layers
