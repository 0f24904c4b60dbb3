"""What decides in which layout a model computes, besides its code: its settings, and the kinds of its arguments.

    settings = ModuleSettings(unet)
    settings.are_current()                        # until a module or an attribute is replaced
    kinds_of((args, kwargs), 3) == kinds_of((others, kwargs), 3)

Two calls with equal settings and kinds are taken to have their batch in the same dimensions.
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial
from itertools import chain, compress, count, repeat
from operator import attrgetter, call, contains, itemgetter, methodcaller
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType, NoneType
from typing import Any
from weakref import ref

import torch
from torch import nn
from torch.utils._pytree import tree_flatten

from diffsight.engine.hooks import FORWARD, NAMES_OF_HOOKS, REDUCE, has_forward_of_its_own
from diffsight.engine.opaque_values import is_cache
from diffsight.engine.tapped_methods import CLASS_WITHOUT_TAPS, OWNER

_PLAIN = frozenset({bool, int, str, NoneType, torch.dtype, torch.device})  # no floats: they are sizes of something
_PASSED_OVER = frozenset({float, torch.Tensor, nn.Parameter})
_LEVELS = 3  # of objects and containers in which plain values are looked for
_LARGE = 1000  # values in a container
_FUNCTIONS = (FunctionType, BuiltinFunctionType, partial, type)
_NOT_LOOKED_INTO = (*_FUNCTIONS, MethodType, ModuleType, nn.Module, torch.Tensor)
_NOT_SETTINGS = frozenset({*vars(nn.Module()), *NAMES_OF_HOOKS}) - {"training"}
_modules_of, _dict_of, _values_of = attrgetter("_modules"), attrgetter("__dict__"), methodcaller("values")


class ModuleSettings:
    """The modules in a component, their classes, training flags, methods and plain attributes, as they are now.

    The plain values in an object or container that a module holds, such as a config, count as well, some levels deep.

    Args:
        component: The component. It is not kept alive.
    """

    def __init__(self, component: nn.Module) -> None:
        modules = [*component.modules()]
        self._modules = [*map(ref, modules)]
        self._children = _children_of(modules)
        self._kinds = [*map(type, modules)]
        classes = {getattr(kind, CLASS_WITHOUT_TAPS, kind) for kind in self._kinds}
        bases = {cls for kind in classes for cls in kind.__mro__} - {nn.Module, object}
        self._classes = {cls: dict(vars(cls)) for cls in bases}
        self._getters: list[Callable[[dict], Any]] = []
        self._holders: list[tuple[int, str]] = []  # the number of a module, and the name of an object that it holds
        for number, module in enumerate(modules):
            own = {name: value for name, value in vars(module).items() if name not in _NOT_SETTINGS}
            plain = [name for name, value in own.items() if _is_plain(value)]
            self._getters.append(itemgetter(*plain) if plain else _nothing)
            others = (name for name, value in own.items() if type(value) not in _PASSED_OVER)
            self._holders += [(number, name) for name in others if name not in plain]
        dicts = [*map(vars, modules)]
        self._counts = [*map(_count_names, dicts)]
        self._own_forwards = _own_forwards(modules, dicts)
        self._values = [*map(call, self._getters, dicts)]
        self._held = self._of_held(dicts)

    def are_current(self) -> bool:
        """Whether the component still has the same modules, with the same settings."""
        modules = [*map(call, self._modules)]
        try:
            dicts = [*map(_dict_of, modules)]
            return (
                _children_of(modules) == self._children
                and [*map(type, modules)] == self._kinds
                and all(vars(cls) == held for cls, held in self._classes.items())
                and [*map(_count_names, dicts)] == self._counts
                and _own_forwards(modules, dicts) == self._own_forwards
                and [*map(call, self._getters, dicts)] == self._values
                and self._of_held(dicts) == self._held
            )
        except Exception:  # a module or an attribute is gone, or has become something that cannot be compared
            return False

    def _of_held(self, dicts: Sequence[dict]) -> list[Any]:
        """Return which functions and what kinds of objects the modules hold, and the plain values in these."""
        held = [dicts[number].get(name) for number, name in self._holders]
        seen: set[int] = set()
        once = {id(value): value for value in held}  # many modules hold the same config
        return [[*map(_kind_of_held, held)], *map(_plain_in, once.values(), repeat(seen))]


def _nothing(held: dict) -> None:
    """What to compare of a module without plain attributes."""


def _count_names(held: dict) -> int:
    """Return how many attributes a module has, apart from the hooks of runs."""
    is_hooked = REDUCE in held or OWNER in held
    return len(held) - len(NAMES_OF_HOOKS & held.keys()) if is_hooked else len(held)


def _kind_of_held(value: Any) -> Any:
    """Return the type of an object that a module holds; a reference to it if it is a function."""
    value = value.__func__ if type(value) is MethodType else value
    return ref(value) if issubclass(type(value), _FUNCTIONS) else type(value)


def _own_forwards(modules: Sequence[nn.Module], dicts: Sequence[dict]) -> list[int]:
    """Return which of some modules have a forward pass of their own, as numbers."""
    changed = compress(count(), map(contains, dicts, repeat(FORWARD)))  # or have the hook of a run in its place
    return [number for number in changed if has_forward_of_its_own(modules[number])]


def _children_of(modules: Iterable[nn.Module]) -> list[int]:
    """Return the ids of the modules directly in each of some modules."""
    return [*map(id, chain.from_iterable(map(_values_of, filter(None, map(_modules_of, modules)))))]  # most have none


def kinds_of(arguments: tuple[tuple, dict], total: int) -> tuple:
    """Return the kinds of a call's arguments with a batch of `total`, as a tuple that can be compared and begins
    with `total`.

    For a tensor, these are its type, and for each of its dimensions whether it has the size of the batch, one entry,
    none, or more. Plain values stand for themselves."""
    leaves, tree = tree_flatten(arguments)
    return total, str(tree), tuple([_kind_of(leaf, total) for leaf in leaves])


def _kind_of(value: Any, total: int) -> tuple:
    if isinstance(value, torch.Tensor):
        return value.dtype, tuple(["batch" if size == total else min(size, 2) for size in value.shape])
    if is_cache(value):  # it may count its entries
        return (type(value),)
    return type(value), value if _is_plain(value) else _plain_in(value, set())


def _is_plain(value: Any) -> bool:
    kind = type(value)
    return kind in _PLAIN or (kind is tuple and all(type(one) in _PLAIN for one in value))


def _plain_in(value: Any, seen: set[int], levels: int = _LEVELS) -> tuple:
    """Return the plain values in an object or container, and in those that it holds, some levels deep.

    What is in `seen`, by id, is left out; of a large container, such as a vocabulary, only the size counts."""
    seen.add(id(value))
    inside: Collection[Any] = value if isinstance(value, (list, tuple)) else getattr(value, "__dict__", {}).values()
    if isinstance(value, dict):
        inside = [*value, *value.values()]
    if len(inside) > _LARGE:
        return (len(inside),)
    found: list[Any] = []
    for one in inside:
        kind = type(one)
        if kind in _PLAIN or (kind is tuple and _is_plain(one)):
            found.append(one)
        elif levels > 1 and kind not in _PASSED_OVER and id(one) not in seen and _is_looked_into(one):
            found.append(_plain_in(one, seen, levels - 1))
    return tuple(found)


def _is_looked_into(value: Any) -> bool:
    return not (issubclass(type(value), _NOT_LOOKED_INTO) or is_cache(value))  # `isinstance` would ask the value
