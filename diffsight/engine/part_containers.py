"""What a body changes in containers and copies that the model does not hold.

    run.rows[1].pair.output["b"] = value        # assigned to the row
    run.rows[1].expanded.output[:] = value      # likewise

A row of a dictionary, a tuple or an output object is a new container of views. Where the rows of a tensor share their
memory, as after `expand`, a row is a copy. Once part of a value has been assigned, the model continues with a new
container, and setting an item in the former one raises an error.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, equal, is_grad_enabled
from torch.utils._pytree import TreeSpec, tree_flatten, tree_is_leaf, tree_leaves, tree_unflatten

from diffsight.engine import order
from diffsight.engine.batch_slicing import UNCHANGED, Selection
from diffsight.engine.points import Asked, Assignment, Point, first_input
from diffsight.engine.torch_state import unseen
from diffsight.engine.users_line import set_line, users_line
from diffsight.errors import AssignmentError, DiffsightError


class PartContainer:
    """A container or a copy in which a part of the value of a point was read while the model stands there.

    Args:
        point: The point.
        asked: The part, as the body asked for it.
        value: What the body got.
        copied: The part, if tensors in `value` are copies; else None.
    """

    __slots__ = ("_copied", "_leaves", "_set", "_source", "_stray", "_structure", "_value", "_where", "asked", "point")

    def __init__(self, point: Point, asked: Asked, value: Any, copied: Selection | None = None) -> None:
        self.point, self.asked, self._value, self._where = point, asked, value, users_line()
        self._leaves, self._structure, self._stray = _flattened(value)
        # Tensors that were assigned, or are copies, and how often each had been changed.
        self._set: list[tuple[Tensor, int]] = [] if copied is None else unseen(_versions, self._leaves)
        self._copied = copied
        self._source: list[tuple[Tensor, int]] = []  # likewise: what is copied
        unseen(self._note_source)

    def assign_changes(self) -> bool:
        """Assign what was set in the container since this was called last; return whether anything was."""
        try:
            changes = unseen(self._changes)
            if changes is not None:
                changes.apply_to(self.point)
                unseen(self._note_source)
        except DiffsightError as error:
            set_line(error, self._where)
            raise
        return changes is not None

    def _changes(self) -> Assignment | None:
        before, had_structure, had_stray, value = self._leaves, self._structure, self._stray, self._value
        self._leaves, self._structure, self._stray = _flattened(value)
        for name in [name for name in self._stray if name not in had_stray]:
            raise AssignmentError(
                f"{self.asked} ({self._where}): the attribute {name!r} was set, but not the item of that name. Set it "
                "on the run itself"
            )
        if self._structure == had_structure:
            edited = {id(tensor) for tensor, version in self._set if tensor._version != version}
            items = [
                UNCHANGED if new is old and id(new) not in edited else new for new, old in zip(self._leaves, before)
            ]
            if all(item is UNCHANGED for item in items):
                return None
            if edited and self._has_other_source():
                raise order.edited_beside_copy(self.point)
            self._set = [pair for pair in self._set if id(pair[0]) not in edited] + _versions(items)
            value = tree_unflatten(items, had_structure)
        return Assignment(self.asked, value, self._where, in_step=False, has_gradients=is_grad_enabled())

    def _note_source(self) -> None:
        if self._copied is not None:
            value = self.point.value
            value = first_input(value, self.asked) if self.asked.part == "input" else value
            self._source = _versions(tree_leaves(self._copied.take(value, self.asked)))

    def _has_other_source(self) -> bool:
        """Whether what is copied has been changed or replaced meanwhile, so that a change of the copy would undo that.
        Other parts may have been assigned."""
        before = self._source
        self._note_source()
        return any(
            old._version != version or (new is not old and not equal(old, new))
            for (old, version), (new, _) in zip(before, self._source)
        )

    def is_replaced_by(self, assignment: Assignment, point: Point) -> bool:
        """Whether an assignment to a point has put something else in place of this container."""
        asked, own = assignment.asked, self.asked
        is_of_same = point is self.point and asked.part == own.part and assignment.value is not self._value
        return is_of_same and (asked.selection is None or asked.selection.name == own.selection.name)


class FormerContainer:
    """A container that was read where the model stands, and in place of which it continues with a new one."""

    __slots__ = ("_leaves", "_value", "point")

    def __init__(self, point: Point, value: Any) -> None:
        self.point, self._value = point, value
        self._leaves = tree_leaves(value)

    def assign_changes(self) -> bool:
        """Raise OutOfOrderError if an item was set that the model does not have; otherwise return False."""
        before, self._leaves = self._leaves, tree_leaves(self._value)
        current = tree_leaves(self.point.value)
        is_same = len(before) == len(self._leaves) == len(current)
        if is_same and all(new is old or new is now for new, old, now in zip(self._leaves, before, current)):
            return False
        raise order.edited_beside_copy(self.point)

    def is_replaced_by(self, assignment: Assignment, point: Point) -> bool:
        """Whether an assignment to a point has put something else in place of the new container."""
        return point is self.point and assignment.asked.selection is None


def takes_items(value: Any) -> bool:
    """Whether items can be set in a value, or in something in it."""
    if isinstance(value, tuple):
        return any(map(takes_items, value))
    return not (isinstance(value, Tensor) or tree_is_leaf(value))


def _versions(leaves: list[Any]) -> list[tuple[Tensor, int]]:
    """Return the tensors among some leaves, and how often each was changed in place, as far as PyTorch counts that."""
    return [(leaf, leaf._version) for leaf in leaves if isinstance(leaf, Tensor) and not leaf.is_inference()]


def _flattened(value: Any) -> tuple[list[Any], TreeSpec, list[str]]:
    """Return the leaves and the structure of a container, and the attributes in it that are not items, see below."""
    nodes: list[Any] = []
    leaves, structure = tree_flatten(value, is_leaf=nodes.append)  # which sees each node
    return leaves, structure, [*filter(None, map(_stray_attribute, nodes))]


def _stray_attribute(node: Any) -> str | None:
    """Return the name of an attribute of an output object that was set without being one of its items."""
    if not (isinstance(node, Mapping) and hasattr(type(node), "__dataclass_fields__")):
        return None
    names = type(node).__dataclass_fields__
    return next((name for name in names if getattr(node, name, None) is not node.get(name)), None)
