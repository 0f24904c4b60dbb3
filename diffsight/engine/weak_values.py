"""Values that are held weakly: they are there as long as somebody else holds their tensors."""

from typing import Any
from weakref import ref

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten


class WeakValue:
    """A tensor, or a tuple, dictionary or output object that holds tensors.

    Containers are rebuilt when they are asked for. What cannot be held weakly, such as a number, is held."""

    __slots__ = ("_leaves", "_structure")

    def __init__(self, value: Any) -> None:
        if isinstance(value, torch.Tensor):
            self._leaves, self._structure = ref(value), None
        else:
            leaves, self._structure = tree_flatten(value)
            self._leaves = [_weak_leaf(leaf) for leaf in leaves]

    def get(self) -> Any:
        """Return the value. Raises LookupError if part of it is gone."""
        if self._structure is None:
            return _alive(self._leaves)
        return tree_unflatten([_alive(leaf) for leaf in self._leaves], self._structure)


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
