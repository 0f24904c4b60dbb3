"""Envoys in place of modules, in the values that attributes and methods of a model return.

In a run, assigning to the `.output` of a module itself would have no effect.
"""

from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from functools import wraps
from inspect import getclosurevars
from types import FunctionType, GeneratorType, MethodType, SimpleNamespace
from typing import Any

from torch import nn

from diffsight.engine.target import join

EnvoyOf = Callable[[nn.Module, str], Any]

_SEQUENCES = {list, tuple, set, frozenset, deque}
_MAPPINGS = {dict, OrderedDict}
_VALUES, _ITEMS = ({type(getattr(kind(), name)()) for kind in _MAPPINGS} for name in ("values", "items"))
_VIEWS = _VALUES | _ITEMS
_CONTAINERS = _SEQUENCES | _MAPPINGS | _VIEWS | {SimpleNamespace}
_ITERATORS = (GeneratorType, map, filter, zip)
_DEPTH = 3  # containers within each other that are searched


def with_envoys(value: Any, path: str, envoy_of: EnvoyOf, depth: int = _DEPTH) -> Any:
    """Return a value with envoys in place of modules. Containers with modules in them are copied; methods and iterators
    return envoys.

    Args:
        value: The value.
        path: The path of the value, as the user writes it; "" for the result of a call.
        envoy_of: Returns the envoy of a module, given the module and its path.
        depth: The number of containers within each other that are searched.
    """
    if _is_module(value):
        return envoy_of(value, path)
    if isinstance(value, MethodType) or (type(value) is FunctionType and _uses_module(value)):
        return wraps(value)(lambda *args, **kwargs: with_envoys(value(*args, **kwargs), "", envoy_of))
    if isinstance(value, _ITERATORS):
        return (with_envoys(item, "", envoy_of) for item in value)
    if depth < 1 or not _holds_module(value, depth):  # a container may hold itself
        return value
    names = [*_names_of(value)]
    paths = [path and join(path, name) if type(name) in (int, str) else path for name in names]
    items = [with_envoys(item, path, envoy_of, depth - 1) for item, path in zip(_items_of(value), paths)]
    if type(value) is SimpleNamespace:
        return SimpleNamespace(**dict(zip(names, items)))
    if type(value) in _VALUES:
        return dict(enumerate(items)).values()
    if type(value) in _ITEMS:
        return dict(items).items()
    if type(value) in _MAPPINGS:
        return type(value)(zip(names, items))
    return type(value)(*items) if hasattr(value, "_make") else type(value)(items)


def _is_module(value: Any) -> bool:
    """Whether a value is a module itself, not an envoy, which has its class by name only."""
    return issubclass(type(value), nn.Module)


def _holds_module(value: Any, depth: int) -> bool:
    """Whether there is a module in a container, or in one of the containers in it."""
    items = _items_of(value)
    return any(map(_is_module, items)) or (
        depth > 1 and any(type(item) in _CONTAINERS and _holds_module(item, depth - 1) for item in items)
    )


def _items_of(value: Any) -> Iterable[Any]:
    """Return what is in a container; nothing for any other value."""
    kind = type(value)
    if kind in _SEQUENCES or kind in _VIEWS or (isinstance(value, tuple) and hasattr(value, "_make")):
        return value
    if kind in _MAPPINGS:
        return value.values()
    return vars(value).values() if kind is SimpleNamespace else ()


def _names_of(value: Any) -> Iterable[Any]:
    """Return the names or numbers of what is in a container."""
    if type(value) in _MAPPINGS:
        return value
    return vars(value) if type(value) is SimpleNamespace else range(len(value))


def _uses_module(function: FunctionType) -> bool:
    """Whether a function uses a module from the code around it, as `lambda: self.block` does."""
    return any(map(_is_module, getclosurevars(function).nonlocals.values()))
