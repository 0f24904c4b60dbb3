"""Containers that a body has read and the model does not have: what happens to the items that are set there.

    run.rows[1].pair.output["b"] = value        # assigned to the row

A row of a dictionary, a tuple or an output object is a new container of views. Where a part of a value was assigned,
the model continues with a new container, and to set an item in the former one is an error.
"""

from collections.abc import Mapping
from typing import Any

from torch import is_grad_enabled
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from diffsight.engine import order
from diffsight.engine.batch_slicing import UNCHANGED
from diffsight.engine.points import Asked, Assignment, Point
from diffsight.engine.users_line import set_line, users_line
from diffsight.errors import AssignmentError, DiffsightError


class PartContainer:
    """A container in which a part of the value of a point was read while the model stands there."""

    __slots__ = ("_leaves", "_structure", "_value", "_where", "asked", "point")

    def __init__(self, point: Point, asked: Asked, value: Any) -> None:
        self.point, self.asked, self._value, self._where = point, asked, value, users_line()
        self._leaves, self._structure = tree_flatten(value)

    def assign_changes(self) -> bool:
        """Assign what was set in the container since this was called last; return whether anything was."""
        try:
            changes = self._changes()
            if changes is not None:
                changes.apply_to(self.point)
        except DiffsightError as error:
            set_line(error, self._where)
            raise
        return changes is not None

    def _changes(self) -> Assignment | None:
        nodes: list[Any] = []
        before, had_structure, value = self._leaves, self._structure, self._value
        self._leaves, self._structure = tree_flatten(value, is_leaf=nodes.append)  # which sees each node
        for name in filter(None, map(_stray_attribute, nodes)):
            raise AssignmentError(
                f"{self.asked} ({self._where}): the attribute {name!r} was set, but not the item of that name. Set it "
                "on the run itself"
            )
        if self._structure == had_structure:
            items = [UNCHANGED if new is old else new for new, old in zip(self._leaves, before)]
            if all(item is UNCHANGED for item in items):
                return None
            value = tree_unflatten(items, had_structure)
        return Assignment(self.asked, value, self._where, in_step=False, has_gradients=is_grad_enabled())

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
        """Return False if no item was set, or the new container has it, as part of a container that both hold.

        Raises OutOfOrderError otherwise."""
        before, self._leaves = self._leaves, tree_leaves(self._value)
        current = tree_leaves(self.point.value)
        is_same = len(before) == len(self._leaves) == len(current)
        if is_same and all(new is old or new is now for new, old, now in zip(self._leaves, before, current)):
            return False
        raise order.edited_beside_copy(self.point)

    def is_replaced_by(self, assignment: Assignment, point: Point) -> bool:
        """Whether an assignment to a point has put something else in place of the new container."""
        return point is self.point and assignment.asked.selection is None


def _stray_attribute(node: Any) -> str | None:
    """Return the name of an attribute of an output object that was set without being one of its items."""
    if not (isinstance(node, Mapping) and hasattr(type(node), "__dataclass_fields__")):
        return None
    names = type(node).__dataclass_fields__
    return next((name for name in names if getattr(node, name, None) is not node.get(name)), None)
