"""Containers in which a part of a value was read: an item that is set there is assigned to that part.

    run.rows[1].pair.output["b"] = value

A row of a dictionary, a tuple or an output object is a new container of views, which the model does not have.
"""

from collections.abc import Mapping
from typing import Any

from torch import is_grad_enabled
from torch.utils._pytree import tree_flatten, tree_unflatten

from diffsight.engine.batch_slicing import UNCHANGED
from diffsight.engine.points import Asked, Assignment, Point
from diffsight.engine.users_line import users_line
from diffsight.errors import AssignmentError


class PartContainer:
    """A container in which a part of the value of a point was read while the model stands there.

    `asked` has the selection, `where` is the line that read it."""

    __slots__ = ("_leaves", "_structure", "_value", "asked", "point", "where")

    def __init__(self, point: Point, asked: Asked, value: Any) -> None:
        self.point, self.asked, self._value, self.where = point, asked, value, users_line()
        self._leaves, self._structure = tree_flatten(value)

    def assign_changes(self) -> bool:
        """Assign what was set in the container since this was called last; return whether anything was."""
        nodes: list[Any] = []
        leaves, structure = tree_flatten(self._value, is_leaf=nodes.append)  # which sees each node
        before, had_structure = self._leaves, self._structure
        self._leaves, self._structure = leaves, structure
        stray = next(filter(None, map(_stray_attribute, nodes)), None)
        if stray is not None:
            raise AssignmentError(
                f"{self.asked} ({self.where}): the attribute {stray!r} was set, but not the item of that name. Set it "
                "on the run itself"
            )
        value = self._value
        if structure == had_structure:
            items = [UNCHANGED if new is old else new for new, old in zip(leaves, before)]
            if all(item is UNCHANGED for item in items):
                return False
            value = tree_unflatten(items, structure)
        has_gradients = is_grad_enabled()
        Assignment(self.asked, value, self.where, in_step=False, has_gradients=has_gradients).apply_to(self.point)
        return True

    def is_replaced_by(self, assignment: Assignment, point: Point) -> bool:
        """Whether an assignment to a point has put something else in place of this container."""
        asked, own = assignment.asked, self.asked
        is_of_same = point is self.point and asked.part == own.part and assignment.value is not self._value
        return is_of_same and (asked.selection is None or asked.selection.name == own.selection.name)


def _stray_attribute(node: Any) -> str | None:
    """Return the name of an attribute of an output object that was set without being one of its items."""
    if not (isinstance(node, Mapping) and hasattr(type(node), "__dataclass_fields__")):
        return None
    return next((name for name in type(node).__dataclass_fields__ if getattr(node, name) is not node.get(name)), None)
