"""Copies: tensors that both the client and the server of a run hold, and how changes in place are sent between them.

Each tensor has a number. Tensors sent by the server count up from 0, tensors sent by the client count down from -1. The
server holds its tensor until the client releases its copy, so that a value can be read again and changed as in a local
run. A change in place is sent with the next message, before the model moves on.
"""

import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from diffsight.errors import DiffsightError
from diffsight.remote.wire_values import ProtocolError


class _Copy:
    """One copy, on the client."""

    __slots__ = ("held", "path", "version", "weak")

    def __init__(self, tensor: torch.Tensor, path: object, gone: Callable[[Any], None]) -> None:
        self.held: torch.Tensor | None = tensor  # until the next message, so that a change in place is detected
        self.weak, self.path, self.version = weakref.ref(tensor, gone), path, _version(tensor)


class ClientCopies:
    """The copies that a client holds in one run."""

    def __init__(self) -> None:
        self._copies: dict[int, _Copy] = {}
        self._numbers: dict[int, int] = {}  # by the id of the tensor
        self._gone: set[int] = set()
        self._next = -1

    def number_of(self, tensor: torch.Tensor) -> int | None:
        """Return the number of a tensor if the server has it with the same values, else None."""
        number = self._numbers.get(id(tensor))
        copy = None if number is None else self._copies.get(number)
        is_known = copy is not None and copy.weak() is tensor and copy.version == _version(tensor)
        return number if is_known and not tensor.is_inference() else None

    def sent(self, tensor: torch.Tensor, path: object) -> int:
        """Take note of a tensor that is sent, and return its number."""
        number, self._next = self._next, self._next - 1
        self._add(number, tensor, path)
        return number

    def received(self, number: int, tensor: torch.Tensor, path: object) -> torch.Tensor:
        """Return the client's tensor with a number: its updated copy if it has one, else the received tensor."""
        copy = self._copies.get(number)
        mine = None if copy is None else copy.weak()
        if mine is None or mine.shape != tensor.shape or mine.dtype != tensor.dtype:
            mine = tensor
        elif not torch.equal(mine.detach(), tensor):
            with torch.no_grad():
                mine.copy_(tensor)
        self._add(number, mine, path)
        return mine

    def changed(self) -> Iterator[tuple[int, object, torch.Tensor]]:
        """Yield (number, path, tensor) for each copy that was changed in place since the last message."""
        for number, copy in [*self._copies.items()]:
            tensor, copy.held = copy.weak(), None
            if tensor is not None and copy.version != _version(tensor):
                copy.version = _version(tensor)
                yield number, copy.path, tensor

    def let_go(self) -> list[int]:
        """Return the numbers of the copies that were released since the last message."""
        gone, self._gone = sorted(self._gone), set()
        return gone

    def _add(self, number: int, tensor: torch.Tensor, path: object) -> None:
        def gone(weak: Any) -> None:
            copy = self._copies.get(number)
            if copy is not None and copy.weak is weak:
                del self._copies[number]
                self._gone.add(number)
                if self._numbers.get(key) == number:
                    del self._numbers[key]

        key = id(tensor)
        self._gone.discard(number)
        self._copies[number], self._numbers[key] = _Copy(tensor, path, gone), number


class ServerCopies:
    """The server's tensors in one run of which the client holds copies."""

    def __init__(self) -> None:
        self._tensors: dict[int, tuple[torch.Tensor, int]] = {}  # with the number of changes in place
        self._numbers: dict[int, int] = {}  # by the id of the tensor
        self._next = 0

    def sent(self, tensor: torch.Tensor) -> int:
        """Take note of a tensor that is sent, and return its number."""
        number = self._numbers.get(id(tensor))
        if number is None:
            number, self._next = self._next, self._next + 1
        self._add(number, tensor)
        return number

    def received(self, number: int, tensor: torch.Tensor) -> None:
        """Record a tensor that the client has sent, under the number that the client chose."""
        if number >= 0 or number in self._tensors:
            raise ProtocolError(f"a tensor that is sent cannot have the number {number}")
        self._add(number, tensor)

    def __getitem__(self, number: int) -> torch.Tensor:
        try:
            return self._tensors[number][0]
        except KeyError:
            raise ProtocolError(f"there is no tensor with the number {number}") from None

    def numbers(self) -> list[int]:
        """Return the numbers of all tensors."""
        return list(self._tensors)

    def write(self, number: int, value: Any, path: str) -> None:
        """Update a tensor with the values of the client's changed copy.

        Raises:
            DiffsightError: The tensor was changed on the server too, so neither copy has both changes.
        """
        tensor = self[number]
        if self._tensors[number][1] != _version(tensor):
            raise DiffsightError(
                f"{path} was changed in place, but the same tensor or another part of it was also changed after it was "
                "read. Change one part at a time, and read each part before you change it, or assign the whole tensor"
            )
        tensor.copy_(value)
        self._add(number, tensor)

    def let_go(self, numbers: Sequence[Any]) -> None:
        """Forget tensors that the client no longer holds."""
        for number in numbers:
            tensor, _ = self._tensors.pop(number, (None, 0))
            if tensor is not None:
                self._numbers.pop(id(tensor), None)

    def _add(self, number: int, tensor: torch.Tensor) -> None:
        self._tensors[number], self._numbers[id(tensor)] = (tensor, _version(tensor)), number


def _version(tensor: torch.Tensor) -> int:
    """Return how often a tensor was changed in place; 0 if PyTorch does not count."""
    return 0 if tensor.is_inference() else tensor._version
