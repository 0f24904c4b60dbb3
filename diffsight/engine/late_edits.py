"""Values that a body changes in place after the model has passed them, which is an error: the model has used them.

edits = LateEdits()
edits.read.append(point)            # the body has the value of a point
edits.note()                        # the model has moved, and may have changed values in place itself
edits.find(step, values)            # before it moves again: a point whose value a body has changed, or None

PyTorch counts how often a tensor is changed in place: its version. Versions are compared before and after each turn of
the bodies, since at other times it is the model that changes its tensors. It takes time, so only the values read last
are watched, and of them only those that somebody still holds. Only outputs are: inputs, such as masks and embeddings,
are often used again.
"""

from collections import deque
from collections.abc import Callable, Iterable
from typing import Any
from weakref import ref

from torch import Tensor, strided
from torch._C import DisableTorchFunction, _len_torch_function_stack
from torch.nn import Parameter
from torch.utils._pytree import tree_leaves

from diffsight.engine.points import Point

_MOST_WATCHED = 4  # tensors


class Moves:
    """How often the models of all runs have moved: another run's model may change a value that was assigned to it."""

    count = 0


moves = Moves()


class LateEdits:
    """The values of a run that its bodies have read, as long as the bodies hold them."""

    __slots__ = ("noted", "read", "watched")

    def __init__(self) -> None:
        self.noted = 0  # how many moves there had been when the versions were noted
        self.read: list[Point] = []  # since the model last moved
        self.watched: deque[list] = deque(
            maxlen=_MOST_WATCHED
        )  # a weak reference to a tensor, its version, and its point

    def note(self, are_modes_off: bool = False) -> None:
        """Note the versions of the tensors after the model has moved."""
        if _len_torch_function_stack() and not are_modes_off:
            with DisableTorchFunction():  # the user's function modes must not see this
                return self.note(are_modes_off=True)
        self.noted = moves.count
        watched = self.watched
        while watched and watched[0][0]() is None:
            watched.popleft()
        for entry in watched:
            tensor = entry[0]()
            if tensor is not None:
                entry[1] = tensor._version
        for point in self.read:
            self._watch(point, (point.weak(),) if type(point.weak) is ref else point.held())
        self.read = [point for point in self.read if point.weak is None]  # still there: the body called a module

    def read_again(self, point: Point, value: Any) -> None:
        """Watch a value that a body reads after the model has passed it."""
        with DisableTorchFunction():
            self._watch(point, tree_leaves(value))

    def find(self, step: int, values: Callable[[], list[Any]], are_modes_off: bool = False) -> Point | None:
        """Return a point that the model had passed when a body changed its value in place; None if there is none.

        Values of earlier steps are not looked at, since the model may use them again.

        Args:
            step: The current step.
            values: Returns the values that a body may change now. Others may be views of them.
            are_modes_off: Whether function modes are off."""
        if _len_torch_function_stack() and not are_modes_off:
            with DisableTorchFunction():
                return self.find(step, values, are_modes_off=True)
        for weak, version, point in self.watched:
            tensor = weak()
            is_changed = tensor is not None and tensor._version != version and self.noted == moves.count
            if is_changed and point.step == step and not _shares_memory(tensor, values()):
                self.clear()  # so that it is reported once
                return point
        return None

    def clear(self) -> None:
        """Forget all values."""
        self.read.clear()
        self.watched.clear()

    def _watch(self, point: Point, leaves: Iterable[Any]) -> None:
        for leaf in leaves:
            if type(leaf) is Tensor:  # a parameter is changed by whoever trains it
                try:
                    self.watched.append([ref(leaf), leaf._version, point])
                except RuntimeError:  # an inference tensor: PyTorch does not count its changes
                    continue


def _shares_memory(tensor: Tensor, values: list[Any]) -> bool:
    dense = [leaf for leaf in tree_leaves(values) if type(leaf) in (Tensor, Parameter) and leaf.layout is strided]
    return tensor.layout is strided and _place(tensor) in map(_place, dense)


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
