"""Taps: where a run touches the model.

A `Tap` belongs to one run and one callable of the model: a module's forward pass, or a method that code calls directly
(`vae.decode`, `scheduler.step`). Every call of it goes through `call`; there the tap counts it, applies what the body
assigned, and hands the inputs and the output to the body if it waits for them. What runs outside the run's own
coroutine (another run, the body's own calls, another thread) passes by untouched. How calls come here is told in
`overrides.py`, what is tapped and when in `tapping.py`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from diffsight.engine.coroutine import current_owner
from diffsight.engine.hooks import COMPILED, FORWARD, MethodOverride
from diffsight.errors import AssignmentError
from diffsight.rows import Part

if TYPE_CHECKING:
    from diffsight.engine.flow import Flow

INPUTS, OUTPUT = "inputs", "output"
LAST = math.inf  # the turn of all bodies that are no edits
_WRAPPED = "_orig_mod"  # in the module that `torch.compile(module)` makes: the module itself
_UNCOMPILED = "_torchdynamo_orig_callable"  # of a function that `torch.compile(function)` makes: the function itself


class Target:
    """What can be tapped: the forward pass of a module (`name` is "forward") or another method of an object. Other
    places are subclasses, with an `attach` of their own, and a `call`.

    `path` is as the user writes it, `outer` the target of the module around it."""

    __slots__ = ("_children", "is_called", "key", "name", "outer", "owner", "path")

    def __init__(self, owner: Any, name: str, path: str, outer: "Target | None" = None) -> None:
        self.owner, self.name, self.path, self.outer = owner, name, path, outer
        self.key = (id(owner), name)
        self.is_called = True  # whether there is anything to call: a ModuleList, for one, has no forward pass
        if name == "__call__":
            self.is_called = callable(owner)
        elif name == FORWARD:
            forward = getattr(type(owner), FORWARD, None)
            self.is_called = forward is not nn.Module.forward or FORWARD in owner.__dict__
        self._children: tuple[dict, dict[str, Target]] | None = None

    def attach(self, tap: "Tap") -> Any:
        """Sends every call through `tap` from now on, where that is no forward pass; gives what `remove()` undoes."""
        return MethodOverride(self.owner, self.name)

    def around(self) -> list["Target"]:
        """The targets of the modules around this one, outermost first."""
        return [*self.outer.around(), self.outer] if self.outer else []

    def children(self) -> dict[str, "Target"]:
        """The modules directly in this one, by name; kept as long as they are the same."""
        if not isinstance(self.owner, nn.Module):
            return {}
        modules = self.owner._modules
        if self._children is None or self._children[0] != modules:
            made = {n: Target(m, FORWARD, join(self.path, n), self) for n, m in modules.items() if m is not None}
            self._children = (dict(modules), made)
        return self._children[1]

    def named_children(self) -> dict[str, "Target"]:
        """The children as a user names them: those of a module that `torch.compile` has wrapped are its own."""
        children = self.children()
        wrapped = children.get(_WRAPPED)
        return children if wrapped is None else {**wrapped.children(), **children}

    def is_compiled(self) -> bool:
        """Whether `torch.compile` made it, or what it calls: what happens within is not to be seen."""
        known = vars(self.owner)
        if _WRAPPED in known.get("_modules", ()) or known.get(COMPILED) is not None:
            return True
        return _UNCOMPILED in getattr(known.get(FORWARD), "__dict__", ())

    def uncompiled(self) -> Callable:
        """What a compiled module computes, as it was written."""
        known = vars(self.owner)
        if known.get(COMPILED) is not None:
            return self.owner._call_impl
        return known["_modules"].get(_WRAPPED) or getattr(known[FORWARD], _UNCOMPILED)

    def called_children(self) -> list["Target"]:
        """The children; in the place of a list or dict, which is never called itself, those in it."""
        holders = [self]
        found: list[Target] = []
        for holder in holders:
            for child in holder.children().values():
                (found if child.is_called else holders).append(child)
        return found


def join(path: str, name: str | int) -> str:
    """The path of a child as a user writes it: `unet.mid_block`, `layers[4]`."""
    if isinstance(name, int) or name.isdigit():
        return f"{path}[{name}]"
    return f"{path}.{name}" if path else name


class Asked:
    """A point as a body asks for it: `part` ("inputs", "input" or "output") of call number `call` in its scope; with
    `rows` the part of the batch, and the number among the calls that hold it. As text it is what the user writes:
    `unet.mid_block.calls[1].output`."""

    __slots__ = ("call", "kind", "part", "rows", "target")

    def __init__(self, target: Target, part: str, call: int = 0, rows: Part | None = None) -> None:
        self.target, self.part, self.call, self.rows = target, part, call, rows
        self.kind = OUTPUT if part == "output" else INPUTS

    @property
    def of_all(self) -> str:
        """The same point of the whole batch, as text."""
        return join(join(self.target.path, f"calls[{self.call}]") if self.call else self.target.path, self.part)

    def __str__(self) -> str:
        return self.of_all if self.rows is None else join(self.rows.name, self.of_all)


@dataclass(eq=False, slots=True)
class Point:
    """One passage of a value: the inputs or the output of one call. `value` is what it is by now, with every edit."""

    tap: "Tap"
    key: tuple[str, int]  # the kind, and the number of the call
    value: Any
    in_step: bool  # asked for within a step, and let go at its end
    changed: bool = False
    turn: float = LAST  # whose turn it is at the point: edits come first, by number
    read_by: tuple[float, ...] = ()  # whose turn it was when it was read
    copies: set[int] = field(default_factory=set)  # ids of the tensors in it that are the run's own copies

    @property
    def index(self) -> int:
        return self.key[1]


@dataclass(eq=False, slots=True)
class Assignment:
    """A value that waits for the model; `where` is the line that made it."""

    asked: Asked
    value: Any
    where: str
    in_step: bool
    first: int = 0  # it is for the call that was asked for, counted from here
    order: float = LAST  # whose turn it is to make it: the number of an edit, or the last

    def __str__(self) -> str:
        return f"{self.asked} ({self.where})"

    def call_of(self, tap: "Tap") -> int:
        """The call that it is for, as far as can be told by now."""
        return find_call(tap, self.first, self.asked, self)


class Origin(NamedTuple):
    """What was known of a module's calls when the run began to count them."""

    around: "Tap | None" = None  # the surrounding tap, if the model had moved by then
    step: int = -1  # the step that the model was in
    unseen: int = 0  # calls of the surrounding module that had begun: calls here may be missing
    unseen_in_step: int = 0  # the same, of that step
    guard: "tuple[Tap, int] | None" = None  # a surrounding tap and the number of its call that was running


class Tap:
    """The calls of one module or method in one run."""

    __slots__ = (
        "active",  # numbers of the calls that are running, outermost first
        "awaited",  # (kind, number of a call) of the points that bodies wait for; for each body, whether within a step
        "begun",  # whether a hook has let a call begin that comes to the module's forward pass now
        "border",  # in a scan, for a component: what its calls are made through
        "children_counted",
        "entered",  # calls begun so far, as far as the run has seen
        "flow",
        "heeded",  # whether the flow wants to know of its calls
        "hooks",  # what else the run has put on the module
        "inside",  # whether a compiled module runs uncompiled
        "keepers",  # kind to the functions that are shown every value
        "origin",
        "pending",  # (kind, number of a call) to what was assigned there
        "points",  # (kind, number of a call) to what was read there
        "skips",  # number of a call to what it shall give without running
        "step_base",  # calls begun before the current step
        "takes_inputs",  # whether inputs are taken in a hook
        "target",
        "unseen",
        "unseen_in_step",
    )

    def __init__(self, flow: "Flow", target: Target, origin: Origin, entered: int = 0, step_base: int = 0) -> None:
        """`entered` calls were counted before, `step_base` of them before the current step."""
        self.flow, self.target, self.origin = flow, target, origin
        self.entered, self.step_base = entered, step_base
        self.unseen, self.unseen_in_step = origin.unseen, origin.unseen_in_step
        self.active: list[int] = []
        self.awaited: dict[tuple[str, int], list[bool]] = {}
        self.keepers: dict[str, list[Callable[[Tap, int, Any], None]]] = {}
        self.pending: dict[tuple[str, int], list[Assignment]] = {}
        self.points: dict[tuple[str, int], Point] = {}
        self.skips: dict[int, Assignment] = {}
        self.border: Callable[[Callable, tuple, dict], Any] | None = None
        self.begun = self.children_counted = self.inside = self.takes_inputs = False
        self.heeded = target.outer is None or target.key in flow.clock.starts or target.key in flow.clock.ends
        self.hooks: list[Any] = []

    def call(self, function: Callable, args: tuple, kwargs: dict) -> Any:
        """One call of what is tapped, `function`."""
        if self.begun:
            self.begun = False
        else:
            args, kwargs = self.enter(args, kwargs) or (args, kwargs)
        index = self.active[-1]
        skip = self.skips.pop(index, None) if self.skips else None
        if skip is not None:
            return self.leave(skip.value)
        if self.inside:
            function = self.target.uncompiled()
        try:
            output = function(*args, **kwargs) if self.border is None else self.border(function, args, kwargs)
        except BaseException:
            self.active.remove(index)
            raise
        return self.leave(output)

    def enter(self, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """A call begins. Gives new inputs, or None where they stay as they are."""
        if self.heeded:
            self.flow.before_call(self, args, kwargs)
        around, index = self.origin.around, self.entered
        if not index and around is not None and not around.active and not self.flow.taps.in_method(around):
            self.unseen = self.unseen_in_step = 1  # called past the module around it: who knows how often before
        self.entered = index + 1
        self.active.append(index)
        key = (INPUTS, index)
        if not (key in self.awaited or key in self.pending or self.keepers):
            return None
        point = self._pass(key, (args, kwargs))
        return point.value if point is not None and point.changed else None

    def leave(self, output: Any) -> Any:
        """A call ends. Gives the output, replaced or as it was."""
        if not self.active:  # a call that began before the tap was made
            return output
        index = self.active.pop()
        key = (OUTPUT, index)
        if key in self.awaited or key in self.pending or self.keepers:
            point = self._pass(key, output)
            output = output if point is None else point.value
        if self.heeded:
            self.flow.after_call(self, output)
        return output

    def take_inputs(self) -> None:
        """From now on takes the inputs of a module in a hook, the last before its forward pass: what the body puts in
        their place is what hooks after the call are shown, among them those with which transformers captures states."""
        module = self.target.owner
        if self.takes_inputs or self.target.name != FORWARD or vars(module).get(COMPILED) is not None:
            return
        self.takes_inputs = True

        def before(called: nn.Module, args: tuple, kwargs: dict | None = None) -> Any:
            # A copy of the module has the hook too. And a hook that another one has removed is called without kwargs.
            if called is not module or kwargs is None or current_owner() is not self.flow or not self.flow.taps:
                return None
            new = self.enter(args, kwargs)
            self.begun = True
            return new

        self.hooks.append(module.register_forward_pre_hook(before, with_kwargs=True))

    def look_inside(self) -> None:
        """Lets a compiled module run uncompiled, and PyTorch's transformer layer unfused, so that what lies in it is
        seen."""
        self.inside = self.target.is_compiled()
        if isinstance(self.target.owner, nn.TransformerEncoderLayer):  # with any hook it is not fused
            self.hooks.append(self.target.owner.register_forward_pre_hook(lambda *_: None))

    def remove(self) -> None:
        """Takes off what the run has put on it besides `follow`."""
        for hook in self.hooks:
            hook.remove()

    def waiting(self) -> list[Assignment]:
        """What was assigned and not reached."""
        return [a for waiting in self.pending.values() for a in waiting] + list(self.skips.values())

    def drop_step(self) -> list[Assignment]:
        """A step ends: what was read within it is let go. Gives what was assigned within it and not reached."""
        self.step_base = self.entered
        missed: list[Assignment] = []
        if self.points:
            self.points = {key: point for key, point in self.points.items() if not point.in_step}
        for key, waiting in list(self.pending.items()):
            missed += [a for a in waiting if a.in_step]
            self.pending[key] = [a for a in waiting if not a.in_step]
            if not self.pending[key]:
                del self.pending[key]
        for index in [i for i, skip in self.skips.items() if skip.in_step]:
            missed.append(self.skips.pop(index))
        return missed

    def _pass(self, key: tuple[str, int], value: Any) -> Point | None:
        point = None
        if key in self.pending or key in self.awaited:
            point = Point(self, key, value, all(self.awaited.get(key, ())))
            for edit in self.flow.edits:  # each in its turn: it sees what those before it did
                point.turn = edit.scope.order
                edit.met |= self._assign_pending(point)
                if edit.waits_for(self, key):
                    edit.met = True
                    self.points[key] = point
                    self.flow.park_for(edit, point)
            point.turn = LAST
            if key in self.pending:
                self._assign_pending(point)
            if key in self.awaited:
                self.points[key] = point
                self.flow.coroutine.park(point)
        for keep in self.keepers.get(key[0], ()):
            keep(self, key[1], value if point is None else point.value)
        return point

    def _assign_pending(self, point: Point) -> bool:
        """Puts what was assigned by whose turn it is in the place of a point's value; whether there was any."""
        waiting, assigned = self.pending.pop(point.key, ()), False
        for assignment in waiting:
            kind, index = point.key
            call = index
            if assignment.order <= point.turn:
                call = assignment.call_of(self)
                if call == index:
                    assign(point, assignment)
                    assigned = True
                    continue
                # This call turned out to hold nothing of its part, and is not to be looked at again.
                assignment.first = assignment.first if assignment.asked.call else call
            self.pending.setdefault((kind, call), []).append(assignment)
        return assigned


def first_input(inputs: tuple[tuple, dict], path: object) -> Any:
    """The first argument: positional, else by keyword."""
    args, kwargs = inputs
    if args:
        return args[0]
    if kwargs:
        return next(iter(kwargs.values()))
    raise AssignmentError(f"{path} is not there: no arguments are passed")


def find_call(tap: Tap, first: int, asked: Asked, path: object) -> int:
    """The call that is asked for, from number `first` on, of those that hold its rows, as far as can be told by now."""
    return first + asked.call if asked.rows is None else asked.rows.call(tap, first, asked.call, path)


def assign(point: Point, assignment: Assignment) -> None:
    """Puts the assigned value in the place of the point's own."""
    value, part, rows = assignment.value, assignment.asked.part, assignment.asked.rows
    before = first_input(point.value, assignment) if part == "input" else point.value
    if rows is not None:
        value = rows.at(point.tap, point.index, assignment).put(before, value, assignment, point.copies)
    elif before is not None and isinstance(before, torch.Tensor) != isinstance(value, torch.Tensor):
        raise AssignmentError(f"{assignment} is a {type(before).__name__}; it takes no {type(value).__name__}")
    elif isinstance(before, torch.Tensor) and (told := _difference(before, value)):
        if before.ndim != value.ndim:  # it would be broadcast, to nothing anybody meant
            raise AssignmentError(f"{assignment} {told}. Give it a value of {before.ndim} dimensions")
        point.tap.flow.misshapen.append(f"{assignment} {told}")
    if part == "input":
        args, kwargs = point.value
        value = ((value, *args[1:]), kwargs) if args else (args, {**kwargs, next(iter(kwargs)): value})
    point.value, point.changed = value, True


def _difference(before: torch.Tensor, value: torch.Tensor) -> str | None:
    """What a model may fail at when `value` takes the place of `before`, in words."""
    if before.shape != value.shape:
        return f"has the shape {tuple(before.shape)}, and {tuple(value.shape)} was assigned"
    if before.dtype != value.dtype:
        return f"is of {before.dtype}, and a tensor of {value.dtype} was assigned"
    if before.device != value.device and not before.is_meta:  # as in a scan
        return f"is on {before.device}, and a tensor on {value.device} was assigned"
    return None
