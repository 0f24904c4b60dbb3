"""Values that a body changes in place after the model has passed them, which is an error: the model has used them.

edits = LateEdits()
edits.watched.append(point)         # the body has the value of a point
edits.note()                        # the model has moved, and may have changed values in place itself
edits.find(parked)                  # before it moves again: a point whose value a body has changed, or None

PyTorch counts how often a tensor is changed in place: its version. Versions are compared before and after each turn of
the bodies, since at other times it is the model that changes its tensors. It takes time, so only the points that were
read last are watched, and only as long as somebody holds their values.
"""

from collections import deque
from typing import Any
from weakref import ref

from torch import Tensor
from torch._C import DisableTorchFunction, _len_torch_function_stack
from torch.nn import Parameter
from torch.utils._pytree import tree_leaves

from diffsight.engine.points import Point

WATCHED = 4  # points


class Moves:
    """How often the models of all runs have moved: another run's model may change a value that was assigned to it."""

    count = 0


moves = Moves()


class LateEdits:
    """The points of a run that its bodies have read last. `Point.version` is None while there is nothing to compare."""

    __slots__ = ("noted", "watched")

    def __init__(self) -> None:
        self.noted = 0  # how many moves there had been when the versions were noted
        self.watched: deque[Point] = deque(maxlen=WATCHED)

    def note(self, are_modes_off: bool = False) -> None:
        """Note the versions of the tensors after the model has moved."""
        if _len_torch_function_stack() and not are_modes_off:
            with DisableTorchFunction():  # the user's function modes must not see this
                return self.note(are_modes_off=True)
        self.noted, watched = moves.count, self.watched
        while watched and type(weak := watched[0].weak) is ref and weak() is None:
            watched.popleft()  # nobody holds its value any more
        for point in watched:
            weak = point.weak
            tensor = weak() if type(weak) is ref else None
            if type(tensor) is not Tensor:
                point.version = _versions(point.held())
                continue
            try:
                point.version = tensor._version
            except RuntimeError:  # an inference tensor: PyTorch does not count its changes
                point.version = None

    def read_again(self, point: Point, value: Any) -> None:
        """Watch a value that a body reads after the model has passed it."""
        with DisableTorchFunction():
            point.version = _versions(tree_leaves(value))
        self.watched.append(point)

    def find(self, parked: Point | None, are_modes_off: bool = False) -> Point | None:
        """Return a point that the model had passed when a body changed its value in place; None if there is none.

        Args:
            parked: The point where the model stands. A body may change its value, of which others may be views.
            are_modes_off: Whether function modes are off."""
        if _len_torch_function_stack() and not are_modes_off:
            with DisableTorchFunction():
                return self.find(parked, are_modes_off=True)
        for point in self.watched:
            version = point.version
            if version is None:
                continue
            if type(version) is int:
                tensor = point.weak()
                changed = () if tensor is None or tensor._version == version else (tensor,)
            else:
                held = [leaf for leaf in point.held() if id(leaf) in version]
                changed = [tensor for tensor in held if tensor._version != version[id(tensor)]]
            if changed and self.noted == moves.count and not _shares_memory(changed, parked):
                return point
        return None


def _versions(leaves: list[Any]) -> dict[int, int]:
    """Return the versions of tensors, by id. PyTorch does not count the changes of inference tensors and fake ones."""
    tensors = [leaf for leaf in leaves if type(leaf) is Tensor or type(leaf) is Parameter]
    return {id(tensor): tensor._version for tensor in tensors if not tensor.is_inference()}


def _shares_memory(tensors: list[Tensor], parked: Point | None) -> bool:
    held = [value for value in tree_leaves(parked and parked.value) if isinstance(value, Tensor)]
    places = {value.untyped_storage().data_ptr() for value in held}
    return any(tensor.untyped_storage().data_ptr() in places for tensor in tensors)
