"""What decides in which layout a model computes, besides its code: its settings, and the kinds of its arguments.

    settings = ModuleSettings(unet)
    settings.are_current()                        # until a module or an attribute is replaced
    kinds_of((args, kwargs), 3) == kinds_of((others, kwargs), 3)

Two calls with equal settings and kinds are taken to have their batch in the same dimensions.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import chain
from operator import attrgetter, call, methodcaller
from types import BuiltinFunctionType, FunctionType, MethodType, NoneType
from typing import Any
from weakref import ref

import torch
from torch import nn
from torch.utils._pytree import tree_flatten

from diffsight.engine.opaque_values import is_cache

_PLAIN = frozenset({bool, int, str, NoneType, torch.dtype, torch.device})  # no floats: they are sizes of something
_PASSED_OVER = frozenset({float, MethodType, torch.Tensor, nn.Parameter})
_FUNCTIONS = (FunctionType, BuiltinFunctionType, partial, type)
_NOT_SETTINGS = frozenset({*vars(nn.Module()), "forward", "__getstate__"})  # what every module and every hook has
_modules_of, _values_of = attrgetter("_modules"), methodcaller("values")


class ModuleSettings:
    """The modules in a component, their training flags and their plain attributes, as they are now.

    The plain values in an object or container that a module holds, such as a config, count as well. Attributes that are
    added later count if the class has one of that name.

    Args:
        component: The component. It is not kept alive.
    """

    def __init__(self, component: nn.Module) -> None:
        modules = [*component.modules()]
        self._modules = [*map(ref, modules)]
        self._children = _children_of(modules)
        self._getters: list[Callable[[nn.Module], Any]] = []
        self._holders: list[tuple[int, str]] = []  # the number of a module, and the name of an object that it holds
        for number, module in enumerate(modules):
            own = {name: value for name, value in vars(module).items() if name not in _NOT_SETTINGS}
            plain = [name for name, value in own.items() if _is_plain(value) and name.isidentifier()]
            self._getters.append(attrgetter("training", *_names_of(type(module)), *plain))
            others = (name for name, value in own.items() if type(value) not in _PASSED_OVER)
            self._holders += [(number, name) for name in others if name not in plain]
        self._values = [*map(call, self._getters, modules)]
        self._held = self._of_held(modules)

    def are_current(self) -> bool:
        """Whether the component still has the same modules, with the same settings."""
        modules = [*map(call, self._modules)]
        try:
            return (
                _children_of(modules) == self._children
                and [*map(call, self._getters, modules)] == self._values
                and self._of_held(modules) == self._held
            )
        except Exception:  # a module or an attribute is gone, or has become something that cannot be compared
            return False

    def _of_held(self, modules: Sequence[nn.Module]) -> list[Any]:
        """Return which functions and what kinds of objects the modules hold, and the plain values in these."""
        held = [vars(modules[number]).get(name) for number, name in self._holders]
        once = {id(value): value for value in held}  # many modules hold the same config
        kinds = [id(value) if isinstance(value, _FUNCTIONS) else type(value) for value in held]
        return [kinds, *map(_plain_in, once.values())]


def _children_of(modules: Iterable[nn.Module]) -> list[int]:
    """Return the ids of the modules directly in each of some modules."""
    return [*map(id, chain.from_iterable(map(_values_of, map(_modules_of, modules))))]


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
    return type(value), value if _is_plain(value) else _plain_in(value)


def _is_plain(value: Any) -> bool:
    kind = type(value)
    return kind in _PLAIN or (kind is tuple and all(type(one) in _PLAIN for one in value))


def _plain_in(value: Any) -> tuple:
    """Return the plain values that an object or container holds directly."""
    inside: Iterable[Any] = value if isinstance(value, (list, tuple)) else getattr(value, "__dict__", {}).values()
    if isinstance(value, dict):
        inside = value.values()
    return tuple([one for one in inside if _is_plain(one)])


def _names_of(kind: type) -> list[str]:
    """Return the names of the plain attributes of a class of modules, which its instances may override."""
    held: dict[str, Any] = {}
    for cls in reversed(kind.__mro__):
        if cls not in (nn.Module, object):
            held.update(vars(cls))
    return [name for name, value in held.items() if name[:2] != "__" and _is_plain(value)]
