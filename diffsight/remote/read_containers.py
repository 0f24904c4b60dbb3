"""Lists, dictionaries and output objects that a client has read: a change in one is sent as an assignment of the whole.

They are watched while the model stands where they were read. Tensors in them are the matter of `copies`.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from diffsight.errors import OutOfOrderError


class ReadContainers:
    """The containers that a client has read in one run."""

    def __init__(self) -> None:
        self._read: list[tuple[Any, Any, list[Any], int]] = []

    def add(self, asked: Any, value: Any, moves: int) -> None:
        """Take note of a value that was read when the model had moved so often."""
        if _can_change(value):
            self._read.append((asked, value, _contents(value), moves))

    def changed(self, moves: int, where: str) -> Iterator[tuple[Any, Any]]:
        """Yield the points whose values were changed since they were read, with these values.

        Raises:
            OutOfOrderError: The model has moved on since.
        """
        kept = []
        for asked, value, contents, then in self._read:
            now = _contents(value)
            if not _are_same(contents, now):
                if then != moves:
                    raise OutOfOrderError(f"{asked} was changed too late: the model is at {where}, past that point")
                yield asked, value
            if then == moves:
                kept.append((asked, value, now, then))
        self._read = kept


def _can_change(value: Any) -> bool:
    """Return whether anything but tensors can be changed in place in a value."""
    return isinstance(value, (list, Mapping)) or (isinstance(value, tuple) and any(map(_can_change, value)))


def _contents(value: Any) -> list[Any]:
    """All that is in a value, flat."""
    if isinstance(value, Mapping):
        return [len(value), *(one for key, item in value.items() for one in (key, *_contents(item)))]
    if isinstance(value, (list, tuple)):
        return [len(value), *(one for item in value for one in _contents(item))]
    return [value]


def _are_same(before: list[Any], now: list[Any]) -> bool:
    def is_same(a: Any, b: Any) -> bool:
        return a is b or (type(a) is type(b) and type(a) in (int, str, float) and a == b)

    return len(before) == len(now) and all(map(is_same, before, now))
