"""Values inside a module's output that are neither tensors nor containers whose structure is known.

holds_tensors({"a", "b"}), holds_tensors(SimpleNamespace(hidden=hidden))         # False, True
"""

import enum
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from itertools import chain
from types import BuiltinFunctionType, FunctionType, MemberDescriptorType, MethodType, ModuleType
from typing import Any, NoReturn

import torch
from torch import nn

from diffsight.errors import InputError

_MOST = 1000  # parts of a value that are looked at
_ATOMS = (str, bytes, bool, int, float, complex, enum.Enum, type, torch.dtype, torch.device, torch.Generator)
NOT_LOOKED_INTO = (*_ATOMS, nn.Module, FunctionType, BuiltinFunctionType, MethodType, ModuleType, type(None))


def holds_tensors(value: Any) -> bool:
    """Whether a value is or holds a tensor or an array, at any depth. True as well if it has too many parts to tell."""
    seen, parts = set(), [value]
    while parts:
        part = parts.pop()
        is_iterator = hasattr(type(part), "__next__")  # looking at what it yields would use it up
        if isinstance(part, torch.Tensor) or _is_array(part) or is_iterator:
            return True
        if isinstance(part, NOT_LOOKED_INTO) or id(part) in seen:
            continue
        seen.add(id(part))
        if len(seen) > _MOST:
            return True
        parts += _inside(part)
    return False


def _is_array(value: Any) -> bool:
    return hasattr(type(value), "__array_interface__") and getattr(value, "ndim", 1) > 0  # of NumPy, or an image


def _inside(value: Any) -> list[Any]:
    """Return what an object or a container holds directly."""
    found = [*getattr(value, "__dict__", {}).values()]
    for slot in chain.from_iterable(vars(cls).values() for cls in type(value).__mro__):
        if type(slot) is MemberDescriptorType:
            with suppress(AttributeError):  # nothing is in it
                found.append(slot.__get__(value))
    if isinstance(value, Mapping):
        found += [*value.keys(), *value.values()]
    elif isinstance(value, (list, tuple, set, frozenset, deque)):
        found += value
    return found


def is_cache(value: Any) -> bool:
    """Whether a value is a cache of keys and values, or of other states that a model computes only once."""
    return hasattr(type(value), "get_seq_length") or type(value).__name__.endswith("Cache")


class CacheOfAllRows:
    """Stands in one row's part of an output for a cache, which cannot be cut. Using it raises InputError."""

    def __init__(self, cache: Any, path: object) -> None:
        self.__dict__["_text"] = f"the {type(cache).__name__} in {path}"

    def _refuse(self, *_: Any) -> NoReturn:
        raise InputError(
            f"{self._text} cannot be cut into rows, and holds the states of all. Read or change it on the run itself"
        )

    __getitem__ = __setitem__ = __iter__ = __len__ = __bool__ = __contains__ = __call__ = __setattr__ = _refuse

    def __getattr__(self, name: str) -> NoReturn:
        if name[:2] == "__" or "_text" not in self.__dict__:  # asked for by Python itself, as when it is copied
            raise AttributeError(name)
        self._refuse()

    def __repr__(self) -> str:
        return f"<{self._text}, of all rows>"
