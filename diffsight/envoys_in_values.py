"""Envoys in place of modules, in the values that attributes and methods of a model return.

In a run, assigning to the `.output` of a module itself would have no effect.
"""

from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import wraps
from inspect import getclosurevars
from types import FunctionType, GeneratorType, MethodType, ModuleType, SimpleNamespace
from typing import Any

from torch import Tensor, nn

from diffsight.engine.function_code import codes_of
from diffsight.engine.target import in_run, join
from diffsight.errors import AssignmentError

EnvoyOf = Callable[[nn.Module, str], Any]

_SEQUENCES = {list, tuple, set, frozenset, deque}
_MAPPINGS = {dict, OrderedDict}
_VALUES, _ITEMS = ({type(getattr(kind(), name)()) for kind in _MAPPINGS} for name in ("values", "items"))
_VIEWS = _VALUES | _ITEMS
_CONTAINERS = _SEQUENCES | _MAPPINGS | _VIEWS | {SimpleNamespace}
_ITERATORS = (GeneratorType, map, filter, zip)
_DEPTH = 3  # containers within each other that are searched
_MOST = 1000  # things in an object that are looked at
_WITHOUT_MODULES = (str, bytes, int, float, type, FunctionType, MethodType, ModuleType, Tensor)


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


def modules_themselves(value: Any, depth: int = _DEPTH) -> list[nn.Module]:
    """Return the modules that `with_envoys` leaves in a value: those in an object or a container of another kind."""
    is_replaced = depth == _DEPTH and type(value) in _CONTAINERS
    if depth < 1 or is_replaced or isinstance(value, _WITHOUT_MODULES) or _is_module(value):
        return []
    inside = [*_items_of(value), *getattr(value, "__dict__", {}).values()]
    if isinstance(value, (Mapping, Sequence)):
        inside += value.values() if isinstance(value, Mapping) else value
    if len(inside) > _MOST:
        return []
    nested = [item for item in inside if isinstance(item, (Mapping, list, tuple, set))]
    return [*filter(_is_module, inside), *(module for item in nested for module in modules_themselves(item, depth - 1))]


def assigned_in_vain(module: nn.Module, name: str, path: str, meant: str) -> AssignmentError | None:
    """Return an error if the body has assigned a value such as `.output` to a module itself, and remove the value.

    `path` is that of the object that the module was taken from, and `meant` that of its handle."""
    if name not in vars(module) or any(name in code.co_names for code in codes_of(type(module).forward)):
        return None  # or it is an attribute that the module sets
    del vars(module)[name]
    return AssignmentError(
        f".{name} was assigned to a {type(module).__name__} in {path}, which is the module itself and not its handle, "
        f"so it had no effect: write {in_run(join(meant, name))}"
    )


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
