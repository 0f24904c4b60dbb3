"""Lists, dictionaries and output objects that a client has read: a changed container is sent as an assignment.

Tensors in them are handled by `copies`. Containers that support weak references, such as output objects, are watched as
long as they exist: changing one after the model has moved on is an error. Lists and plain dictionaries are watched only
until the model moves on.
"""

from collections.abc import Iterator, Mapping
from typing import Any
from weakref import ref

import torch

from diffsight.errors import OutOfOrderError


class _Read:
    """A value that was read."""

    def __init__(self, asked: Any, value: Any) -> None:
        self.asked, self.value, self.contents = asked, value, _contents(value)

    def let_go(self) -> bool:
        """Hold only a weak reference from now on. Return False if the value does not support that."""
        try:
            self.value = ref(self.value)
        except TypeError:
            return False
        self.contents = [ref(one) if isinstance(one, torch.Tensor) else one for one in self.contents]
        return True


class ReadContainers:
    """The containers that a client has read in one run."""

    def __init__(self) -> None:
        self._here: list[_Read] = []  # read where the model stands
        self._before: list[_Read] = []

    def add(self, asked: Any, value: Any) -> None:
        """Record a value that was read."""
        if _can_change(value):
            self._here.append(_Read(asked, value))

    def move_on(self) -> None:
        """Record that the model has moved on."""
        self._before += [read for read in self._here if read.let_go()]
        self._here = []

    def changed(self, where: str) -> Iterator[tuple[Any, Any]]:
        """Yield the points whose values were changed since they were read, with the changed values.

        Raises:
            OutOfOrderError: A value was changed after the model had moved on.
        """
        self._before = [read for read in self._before if read.value() is not None]
        for read in self._before:
            if not _are_same(read.contents, _contents(read.value())):
                raise OutOfOrderError(f"{read.asked} was changed too late: the model is past that point, {where}")
        for read in self._here:
            now = _contents(read.value)
            if not _are_same(read.contents, now):
                read.contents = now
                yield read.asked, read.value


def _can_change(value: Any) -> bool:
    """Return whether a value contains lists or mappings, which can be changed in place."""
    return isinstance(value, (list, Mapping)) or (isinstance(value, tuple) and any(map(_can_change, value)))


def _contents(value: Any) -> list[Any]:
    """Return the contents of a value as a flat list."""
    if isinstance(value, Mapping):
        return [len(value), *(one for key, item in value.items() for one in (key, *_contents(item)))]
    if isinstance(value, (list, tuple)):
        return [len(value), *(one for item in value for one in _contents(item))]
    return [value]


def _are_same(before: list[Any], now: list[Any]) -> bool:
    def is_same(a: Any, b: Any) -> bool:
        a = a() if type(a) is ref else a
        return a is b or (type(a) is type(b) and type(a) in (int, str, float) and a == b)

    return len(before) == len(now) and all(map(is_same, before, now))
