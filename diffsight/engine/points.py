"""Points: a point as a body asks for it, a value that passes a point, and a value that is assigned to one."""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import count
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from diffsight.engine.batch_slicing import Selection, Tapped, wrong_type
from diffsight.engine.hooks import FORWARD
from diffsight.engine.target import Target, join
from diffsight.engine.users_line import UsersLine
from diffsight.engine.weak_values import alive, held, weakly
from diffsight.errors import AssignmentError

INPUTS, OUTPUT = "inputs", "output"
LAST = math.inf  # the turn of every body that is not an edit
LEFT_OUT = (  # what is wrong with a change that gradients within the model would not follow
    "was changed where gradients are off, but the model computes gradients there, which would leave the change out: "
    "write it within `with torch.enable_grad():`"
)

PointKey = tuple[str, int]  # the kind (INPUTS or OUTPUT) and the number of the call


class Asked:
    """A point as a body asks for it. Its text is its path as the user writes it: `unet.mid_block.calls[1].output`.

    Args:
        target: The module or method that is called.
        part: "inputs", "input" or "output"; "skip" for the call as a whole.
        call: The number of the call in the body's scope; with `selection`, among the calls that have this part.
        selection: The selected part of the value; None for all of it.
    """

    __slots__ = ("call", "kind", "part", "selection", "target")

    def __init__(self, target: Target, part: str, call: int = 0, selection: Selection | None = None) -> None:
        self.target, self.part, self.call, self.selection = target, part, call, selection
        self.kind = OUTPUT if part == "output" else INPUTS

    @property
    def whole(self) -> str:
        """The text of the same point without the selection."""
        return self.target.point(self.part, self.call)

    def __str__(self) -> str:
        return self.whole if self.selection is None else join(self.selection.name, self.whole)


@dataclass(eq=False, slots=True)
class Point:
    """A value that passes a point: the inputs or the output of one call.

    `value` contains all edits made so far. The point holds it while the model stands there, and weakly
    afterwards: a value that the body has let go takes no memory."""

    tap: Tapped
    key: PointKey
    value: Any
    in_step: bool  # asked for within a step, and dropped at its end
    changed: bool = False
    turn: float = LAST  # whose turn it is at the point: edits come first, by number
    read_by: tuple[float, ...] = ()  # whose turn it was when it was read
    copies: dict[int, torch.Tensor] | None = None  # by id: the run's own copies, which nobody has read
    parts: dict[str, tuple[Selection, Any]] | None = None  # by name: selected parts that were read and not assigned
    is_whole_read: bool = False  # whether all of it was read, and not only parts
    is_unread: bool = False  # the model was let past it on the way to another call; held until somebody reads it
    weak: Any = None  # the value once the model has moved on, see `weakly`; for inputs, each argument
    reader: tuple | None = None  # of an output: the code that read it last, the instruction, its globals, and the step
    replaced: Any = None  # the model's own value, if another one was assigned

    @property
    def index(self) -> int:
        """The number of the call."""
        return self.key[1]

    @property
    def path(self) -> str:
        """The path of the point, as the user writes it."""
        kind, index = self.key
        return self.tap.target.point("output" if kind == OUTPUT else "input", index)

    @property
    def read_line(self) -> UsersLine | None:
        """The line that read the value last; None if that was diffsight's own code."""
        return self.reader and UsersLine.of_instruction(*self.reader[:-1])

    @property
    def step_read(self) -> int | None:
        """The step in which an output was read last."""
        return self.reader and self.reader[-1]

    def has_lost_edit(self) -> bool:
        """Whether a value that was read and has changed in place did not change in the value that the model continues
        with: that is a copy, in which a part was assigned."""
        if self.is_whole_read and not self.parts:
            return True
        for selection, source in (self.parts or {}).values():
            if source is not self.value:
                held, current = (tree_leaves(selection.take(value, self.path)) for value in (source, self.value))
                if any(map(_differ, held, current)):
                    return True
        return False

    def let_go(self) -> None:
        """Hold the value only weakly from now on, since the model moves on."""
        value = self.value
        if type(value) is Tensor:
            self.weak = ref(value)
        elif self.key[0] == OUTPUT:
            self.weak = weakly(value)
        else:
            self.weak = [weakly(arg) for arg in value[0]], {name: weakly(arg) for name, arg in value[1].items()}
        self.value = self.replaced = self.parts = None
        if self.copies:
            self.copies.clear()

    def read(self, part: str) -> Any:
        """Return the value; for inputs, only the first one if `part` is "input".

        Raises LookupError if the model has moved on and nobody holds the value any more."""
        if self.weak is None:
            return first_input(self.value, part) if part == "input" else self.value
        if part == "output":
            return alive(self.weak)
        if part == "input":
            return alive(first_input(self.weak, part))
        args, kwargs = self.weak
        return tuple(map(alive, args)), {name: alive(arg) for name, arg in kwargs.items()}

    def held(self) -> list[Any]:
        """Return what somebody still holds of the value once the model has moved on."""
        if self.key[0] == OUTPUT:
            return held(self.weak)
        args, kwargs = self.weak or ((), {})
        return [leaf for arg in (*args, *kwargs.values()) for leaf in held(arg)]


@dataclass(eq=False, slots=True)
class Assignment:
    """A value that waits for the model. `where` is the line that assigned it."""

    asked: Asked
    value: Any
    where: UsersLine
    in_step: bool
    first: int = 0  # the number of the call is counted from here
    order: float = LAST  # whose turn it is to assign it: the number of an edit, or LAST
    has_gradients: bool = True  # whether gradients were on where it was assigned
    failure: str = ""  # the error that the call has raised, if it has
    within: str = ""  # the part of the value that is meant, such as `[1]`

    @property
    def part(self) -> str:
        """The part of the call that is assigned: "inputs", "input" or "output"."""
        return self.asked.part

    @property
    def name(self) -> str:
        """The path of what is assigned, as the user writes it."""
        return f"{self.asked}{self.within}"

    def __str__(self) -> str:
        return f"{self.name} ({self.where})"

    def item(self, key: object) -> "Assignment":
        """Return the assignment to an item of the value, for errors about it."""
        shown = f'"{key}"' if isinstance(key, str) else repr(key)
        return replace(self, within=f"{self.within}[{shown}]")

    def call_of(self, tap: Tapped) -> int:
        """Return the number of the intended call, as far as is known now."""
        return find_call(tap, self.first, self.asked, self)

    def apply_to(self, point: Point) -> str | None:
        """Replace the value of a point with this one.

        Returns:
            A description of how its shape or type differs from those of the model's own value; None if they agree."""
        value, part, selection = self.value, self.asked.part, self.asked.selection
        before, difference = first_input(point.value, self) if part == "input" else point.value, None
        if selection is not None:
            point.copies = {} if point.copies is None else point.copies
            value = selection.at(point.tap, point.index, self).put(before, value, self, point.copies)
        elif before is not None:
            difference = self._difference(before, value)
        is_watched = not self.has_gradients and point.tap.host.adds_gradients
        if is_watched and (_loses_gradients(before, self.value) or _loses_gradients(before, value)):
            raise AssignmentError(f"{self} {LEFT_OUT}")
        if part == "input":
            args, kwargs = point.value
            value = ((value, *args[1:]), kwargs) if args else (args, {**kwargs, next(iter(kwargs)): value})
        point.replaced = point.replaced if point.changed else point.value
        point.value, point.changed = value, True
        return difference

    def _difference(self, before: Any, value: Any) -> str | None:
        """Say how a value differs in shape or type from the model's own; None if it does not.

        Raises AssignmentError if the point can never take it, or if it would be broadcast unintentionally."""
        if isinstance(before, torch.Tensor) != isinstance(value, torch.Tensor):
            raise wrong_type(self, before, value)
        if not isinstance(before, torch.Tensor):
            differences = [self.item(key)._difference(*pair) for key, *pair in _parts_of_both(before, value)]
            return next(filter(None, differences), None)
        difference = _difference(before, value)
        if difference and before.ndim != value.ndim:
            raise AssignmentError(f"{self} {difference}. Assign a value of {before.ndim} dimensions")
        if _shape(before) != _shape(value) and _is_broadcast(value, before):
            raise AssignmentError(f"{self} {difference}. To repeat the value, write value.expand(...)")
        return f"{self} {difference}" if difference else None


def _parts_of_both(before: Any, value: Any) -> Iterator[tuple[Any, Any, Any]]:
    """Yield the tensors and containers that a container holds: the key of each, itself, and its counterpart in another
    one."""
    items: Iterable[tuple[Any, Any, Any]] = ()
    if isinstance(before, Mapping) and isinstance(value, Mapping):
        items = ((name, own, value.get(name)) for name, own in before.items())
    elif isinstance(before, (tuple, list)) and isinstance(value, (tuple, list)):
        items = zip(count(), before, value)
    for key, own, other in items:
        if other is not None and isinstance(own, (torch.Tensor, Mapping, tuple, list)):
            yield key, own, other


def _loses_gradients(before: Any, value: Any) -> bool:
    """Whether a tensor without gradients takes the place of one with gradients."""
    if isinstance(before, torch.Tensor) and isinstance(value, torch.Tensor):
        return before.requires_grad and not value.requires_grad
    return any(_loses_gradients(own, other) for _, own, other in _parts_of_both(before, value))


def first_input(inputs: tuple[tuple, dict], path: object) -> Any:
    """Return the first argument of a call: the first positional one, else the first by keyword."""
    args, kwargs = inputs
    if args:
        return args[0]
    if kwargs:
        return next(iter(kwargs.values()))
    raise AssignmentError(f"{path} does not exist: the call has no arguments")


def find_call(tap: Tapped, first: int, asked: Asked, path: object) -> int:
    """Return the number of the requested call, counted from `first`, as far as is known now."""
    if asked.selection is None:
        return first + asked.call
    return asked.selection.call(tap, first, asked.call, path)


def check_value(asked: Asked, value: Any) -> None:
    """Raise AssignmentError if a point can never take a value."""
    if asked.part == "inputs" and not (
        isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], tuple) and isinstance(value[1], dict)
    ):
        raise AssignmentError(f"{asked} takes (args, kwargs), a tuple and a dictionary, not {type(value).__name__}")
    if asked.part == "output" and value is None:
        raise AssignmentError(
            f"None cannot be assigned to {asked}: PyTorch takes None to mean 'leave the output unchanged'"
        )
    inside = asked.target.outer is not None and asked.target.name == FORWARD
    if asked.part == "skip" and inside and isinstance(value, (int, float, complex, str)):
        raise AssignmentError(f"{asked} takes the value that the module should return, such as a tensor, not {value!r}")


def _difference(before: torch.Tensor, value: torch.Tensor) -> str | None:
    """Describe the difference at which a model may fail if `value` replaces `before`; None if there is none."""
    if _shape(before) != _shape(value):
        return f"has the shape {_shape(before)}, but {_shape(value)} was assigned"
    if before.dtype != value.dtype:
        return f"has the type {before.dtype}, but a tensor of {value.dtype} was assigned"
    if before.device != value.device:
        return f"is on {before.device}, but a tensor on {value.device} was assigned"
    return None


def _shape(tensor: torch.Tensor) -> tuple:
    """Return the shape of a tensor; of a nested tensor, the shapes of its parts."""
    return tuple([_shape(part) for part in tensor.unbind()] if tensor.is_nested else tensor.shape)


def _differ(a: Any, b: Any) -> bool:
    """Whether two parts of values of one kind and shape differ; False if they are not tensors with data."""
    has_data = isinstance(a, Tensor) and isinstance(b, Tensor) and not a.is_meta
    return a is not b and has_data and not torch.equal(a, b)


def _is_broadcast(value: torch.Tensor, before: torch.Tensor) -> bool:
    """Whether `value` has 1 wherever its shape differs from that of `before`."""
    return not value.is_nested and all(size in (1, own) for size, own in zip(_shape(value), _shape(before)))
