"""Values that are held weakly: they exist as long as somebody else holds their tensors."""

from typing import Any
from weakref import ref

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten


class WeakContainer:
    """A tuple, a dictionary or an output object whose tensors are held weakly."""

    __slots__ = ("_leaves", "_structure")

    def __init__(self, value: Any) -> None:
        leaves, self._structure = tree_flatten(value)
        self._leaves = [_weak_leaf(leaf) for leaf in leaves]

    def get(self) -> Any:
        """Return a container of the same kind. Raises LookupError if one of its tensors is gone."""
        return tree_unflatten([_alive(leaf) for leaf in self._leaves], self._structure)

    def held(self) -> list[Any]:
        """Return the leaves that somebody still holds."""
        return [value for leaf in self._leaves if (value := leaf() if type(leaf) is ref else leaf) is not None]


def weakly(value: Any) -> Any:
    """Return a weak reference to a value, for `alive`. What cannot be held weakly, such as a number, is held."""
    return ref(value) if isinstance(value, torch.Tensor) else WeakContainer(value)


def alive(weak: Any) -> Any:
    """Return the value that `weakly` was called with. Raises LookupError if nobody else holds it any more."""
    return weak.get() if type(weak) is WeakContainer else _alive(weak)


def _weak_leaf(leaf: Any) -> Any:
    try:
        return ref(leaf)
    except TypeError:
        return leaf


def _alive(leaf: Any) -> Any:
    if type(leaf) is not ref:
        return leaf
    value = leaf()
    if value is None:
        raise LookupError
    return value


def held(weak: Any) -> list[Any]:
    """Return what is left of the value that `weakly` was called with: its leaves that somebody still holds."""
    if type(weak) is WeakContainer:
        return weak.held()
    value = weak() if type(weak) is ref else weak
    return [] if value is None else [value]
