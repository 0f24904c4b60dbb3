"""Taps: where a run touches the model.

A `Tap` belongs to one run and one callable of the model: a module's forward pass, or a method that code calls directly
(`vae.decode`, `scheduler.step`). Every call of it passes through `enter` and `leave`; there the tap counts the call,
applies what the body assigned, and hands the value to the body if it waits for it. What runs outside the run's own
coroutine (another run, the body's own calls, another thread) passes through untouched.

Modules are tapped with ordinary hooks, and with an override of `forward` on the instance where a call may be left out.
Methods are tapped by giving the object a subclass of its class for the time of the run: unlike a wrapper stored on the
instance this follows copies of the object (pipelines step a copy of their scheduler) and reaches `__call__`. The name
and the signatures stay those of the original.
"""

import functools
import inspect
import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from threading import RLock
from types import MappingProxyType, MethodType
from typing import Any

import torch
from torch import nn

from .coroutine import current_owner
from .errors import AssignmentError
from .rows import Part

FORWARD = "forward"
INPUTS, OUTPUT = "inputs", "output"
LAST = math.inf  # the turn of all bodies that are no edits
_WRAPPED = "_orig_mod"  # in the module that `torch.compile(module)` makes: the module itself
_UNCOMPILED = "_torchdynamo_orig_callable"  # of a function that `torch.compile(function)` makes: the function itself
_COMPILED = "_compiled_call_impl"  # of a module after `module.compile()`: what its calls go to
_OWNER = "_diffsight_owner"  # on a tapped object: whose taps its calls go to; copies carry it along


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
            self.is_called = type(owner).forward is not nn.Module.forward or "forward" in owner.__dict__
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
        if _WRAPPED in known.get("_modules", ()) or known.get(_COMPILED) is not None:
            return True
        return _UNCOMPILED in getattr(known.get("forward"), "__dict__", ())

    def called_children(self) -> Iterator["Target"]:
        """The children; in the place of a list or dict, which is never called itself, those in it."""
        for child in self.children().values():
            if child.is_called:
                yield child
            else:
                yield from child.called_children()


def join(path: str, name: str | int) -> str:
    """The path of a child as a user writes it: `unet.mid_block`, `layers[4]`."""
    if isinstance(name, int) or name.isdigit():
        return f"{path}[{name}]"
    return f"{path}.{name}" if path else name


@dataclass(eq=False)
class Point:
    """One passage of a value: the inputs or the output of one call. `value` is what it is by now, with every edit."""

    tap: "Tap"
    kind: str
    index: int
    value: Any
    in_step: bool  # asked for within a step, and let go at its end
    changed: bool = False
    turn: float = LAST  # whose turn it is at the point: edits come first, by number
    read_by: tuple[float, ...] = ()  # whose turn it was when it was read
    copies: set[int] = field(default_factory=set)  # ids of the tensors in it that are the run's own copies


@dataclass(eq=False)
class Assignment:
    """A value that waits for the model; `part` says what it replaces, `where` is the line that made it."""

    part: str
    value: Any
    path: str
    where: str
    in_step: bool
    rows: Part | None = None  # the part of the batch that is assigned, or None for all
    first: int = 0  # it is for call number `call` from `first` on, of those that hold that part
    call: int = 0
    order: float = LAST  # whose turn it is to make it: the number of an edit, or the last

    def call_of(self, tap: "Tap") -> int:
        """The call that it is for, as far as can be told by now."""
        return find_call(tap, self.first, self.call, f"{self.path} ({self.where})", self.rows)


_NONE: Any = MappingProxyType({})


class Tap:
    """The calls of one module or method in one run.

    A module beside what the body asks for is only counted (`open` is False, `active` is not kept): its calls cost a
    fraction of a microsecond. The rest comes with `open_up`."""

    __slots__ = (
        "active",  # numbers of the calls that are running, outermost first
        "awaited",  # (kind, number of a call) of the points that bodies wait for; for each body, whether within a step
        "border",  # in a scan, for a component: what its calls are made through
        "born_in",  # the step in which the tap was made
        "children_tapped",
        "entered",  # calls begun so far, as far as the tap has seen
        "flow",
        "guard",  # the surrounding tap and the number of its call that was running when the tap was made
        "inside",  # whether a compiled module runs uncompiled
        "keepers",  # kind to the functions that are shown every value
        "late_in",  # the surrounding tap, if this one was made after the model had moved
        "open",
        "override",  # what is put in the place of the method, or of the forward pass
        "pending",  # (kind, number of a call) to what was assigned there
        "points",  # (kind, number of a call) to what was read there
        "skips",  # number of a call to what it shall give without running
        "step_base",  # calls begun before the current step
        "target",
        "unseen",  # calls of the surrounding module that began before the tap was made: calls here may be missing
        "unseen_in_step",  # the same, of the step in which the tap was made
    )

    def __init__(self, flow: Any, target: Target, born_in: int) -> None:
        self.flow, self.target, self.born_in = flow, target, born_in
        self.entered = self.step_base = self.unseen = self.unseen_in_step = 0
        self.guard: tuple[Tap, int] | None = None
        self.late_in: Tap | None = None
        self.border: Callable[[Callable, tuple, dict], Any] | None = None
        self.open = self.children_tapped = self.inside = False
        self.active = ()
        self.awaited = self.keepers = self.pending = self.points = self.skips = _NONE
        self.override: Override | None = None

    def count(self) -> None:
        """Counts the module's calls, and no more."""
        self._touch(self.flow.hooks.put_counter)

    def open_up(self, running: int = 0) -> None:
        """From now on the values of its calls can be had. `running` calls have begun and not ended."""
        self.remove()
        self.open = True
        self.active = list(range(self.entered - running, self.entered))
        self.awaited, self.keepers, self.pending, self.points, self.skips = {}, {}, {}, {}, {}
        if self.target.name == FORWARD:
            self._touch(self.flow.hooks.put)
        else:
            self.override = self.target.attach(self)

    def _touch(self, put: Callable[[nn.Module], None]) -> None:
        """Puts hooks on the module; where its calls go to compiled code, around that, to leave the code as it is."""
        if vars(self.target.owner).get(_COMPILED) is not None:
            self.override = CompiledOverride(self.target.owner, _COMPILED)
        else:
            put(self.target.owner)

    def look_inside(self) -> None:
        """Lets a compiled module run uncompiled, so that what lies in it is seen."""
        if self.target.is_compiled():
            self.allow_skip()
            self.inside = True

    def allow_skip(self) -> None:
        """Puts what leaves calls out in the place of the module's forward pass."""
        if self.override is None:
            self.override = ForwardOverride(self.target.owner, FORWARD)

    def remove(self) -> None:
        """Takes everything off the module."""
        if self.override is not None:
            self.override.remove()
            self.override = None
        if self.target.name == FORWARD and self.open:
            self.flow.hooks.take_off(self.target.owner)
        elif self.target.name == FORWARD:
            self.flow.hooks.take_counter_off(self.target.owner)

    def enter(self, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """A call begins. Gives new inputs, or None where they stay as they are."""
        self.flow.before_call(self, args, kwargs)
        around = self.late_in
        if around is not None and not self.entered and not around.active and not self.flow.in_method(around):
            self.unseen = self.unseen_in_step = 1  # called past the module around it: who knows how often before
        index = self.entered
        self.entered += 1
        self.active.append(index)
        point = self._pass(INPUTS, index, (args, kwargs))
        return point.value if point is not None and point.changed else None

    def leave(self, output: Any) -> Any:
        """A call ends. Gives the output, replaced or as it was."""
        if not self.active:  # a call that began before the tap was made
            return output
        index = self.active.pop()
        point = self._pass(OUTPUT, index, output)
        output = output if point is None else point.value
        self.flow.after_call(self, output)
        return output

    def call(self, function: Callable, args: tuple, kwargs: dict) -> Any:
        """One call of a tapped method."""
        args, kwargs = self.enter(args, kwargs) or (args, kwargs)
        skip = self.skips.pop(self.active[-1], None) if self.skips else None
        return self.leave(self.run(function, args, kwargs) if skip is None else skip.value)

    def run(self, function: Callable, args: tuple, kwargs: dict) -> Any:
        """What is tapped itself; in a scan, through the border of the component."""
        return function(*args, **kwargs) if self.border is None else self.border(function, args, kwargs)

    def waiting(self) -> list[Assignment]:
        """What was assigned and not reached."""
        return [a for waiting in self.pending.values() for a in waiting] + list(self.skips.values())

    def drop_step(self) -> list[Assignment]:
        """A step ends: what was read within it is let go. Gives what was assigned within it and not reached."""
        self.step_base = self.entered
        if not self.open:
            return []
        missed: list[Assignment] = []
        if self.points:
            self.points = {key: point for key, point in self.points.items() if not point.in_step}
        for key, waiting in list(self.pending.items()):
            missed += [a for a in waiting if a.in_step]
            self.pending[key] = [a for a in waiting if not a.in_step]
        for index in [i for i, skip in self.skips.items() if skip.in_step]:
            missed.append(self.skips.pop(index))
        return missed

    def _pass(self, kind: str, index: int, value: Any) -> Point | None:
        key, point = (kind, index), None
        if key in self.pending or key in self.awaited:
            point = Point(self, kind, index, value, all(self.awaited.get(key, ())))
            for edit in self.flow.edits:  # each in its turn: it sees what those before it did
                point.turn = edit.scope.order
                edit.met |= self._assign_pending(point)
                if edit.waits_for(self, key):
                    edit.met = True
                    self.points[key] = point
                    self.flow.park(point, edit)
            point.turn = LAST
            if self.pending:
                self._assign_pending(point)
            if key in self.awaited:
                self.points[key] = point
                self.flow.park(point)
        if self.keepers:
            for keep in self.keepers.get(kind, ()):
                keep(self, index, value if point is None else point.value)
        return point

    def _assign_pending(self, point: Point) -> bool:
        """Puts what was assigned by whose turn it is in the place of a point's value; whether there was any."""
        waiting, assigned = self.pending.pop((point.kind, point.index), ()), False
        for assignment in waiting:
            call = point.index
            if assignment.order <= point.turn:
                call = assignment.call_of(self)
                if call == point.index:
                    assign(point, assignment)
                    assigned = True
                    continue
                # This call turned out to hold nothing of its part, and is not to be looked at again.
                assignment.first = assignment.first if assignment.call else call
            self.pending.setdefault((point.kind, call), []).append(assignment)
        return assigned


def first_input(inputs: tuple[tuple, dict], path: str) -> Any:
    """The first argument: positional, else by keyword."""
    args, kwargs = inputs
    if args:
        return args[0]
    if kwargs:
        return next(iter(kwargs.values()))
    raise AssignmentError(f"{path} is not there: no arguments are passed")


def find_call(tap: Tap, first: int, call: int, path: str, rows: Part | None) -> int:
    """Call number `call`, from `first` on, of those that hold `rows`, as far as can be told by now."""
    return first + call if rows is None else rows.call(tap, first, call, path)


def assign(point: Point, assignment: Assignment) -> None:
    """Puts the assigned value in the place of the point's own."""
    value = assignment.value
    path = f"{assignment.path} ({assignment.where})"
    before = first_input(point.value, path) if assignment.part == "input" else point.value
    if assignment.rows is not None:
        part = assignment.rows.at(point.tap, point.index, path)
        value = part.put(before, value, path, point.copies)
    elif before is not None and isinstance(before, torch.Tensor) != isinstance(value, torch.Tensor):
        raise AssignmentError(f"{path} is a {type(before).__name__}; it takes no {type(value).__name__}")
    elif isinstance(before, torch.Tensor) and (told := _difference(before, value)):
        if before.ndim != value.ndim:  # it would be broadcast, to nothing anybody meant
            raise AssignmentError(f"{path} {told}. Give it a value of {before.ndim} dimensions")
        point.tap.flow.misshapen.append(f"{path} {told}")
    if assignment.part == "input":
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


def _count(flow: Any, module: nn.Module, args: tuple) -> None:
    if current_owner() is flow and not flow.closing and (tap := flow.taps.get((id(module), FORWARD))):
        tap.entered += 1


# PyTorch goes through a list of the hooks made before the first was called, but looks up how to call each when its turn
# comes: a hook of another run that was removed meanwhile is called without `kwargs`. And a copy of a module has its
# hooks, but no tap.
def _before(flow: Any, module: nn.Module, args: tuple, kwargs: dict | None = None) -> Any:
    if current_owner() is flow and not flow.closing and (tap := flow.taps.get((id(module), FORWARD))):
        return tap.enter(args, kwargs)
    return None


def _after(flow: Any, module: nn.Module, args: tuple, output: Any) -> Any:
    if current_owner() is flow and not flow.closing and (tap := flow.taps.get((id(module), FORWARD))):
        return tap.leave(output)
    return None


class _Hook(functools.partial):
    """A hook of one run. A copy of a module keeps it as it is: it does nothing there."""

    def __deepcopy__(self, memo: dict) -> "_Hook":
        return self


class Hooks:
    """What a run puts on modules.

    The hooks go into PyTorch's tables directly, as `register_forward_hook` puts them there, but without the handle that
    it makes: with a hook on every neighbour of what a run reads, handles are the larger part of what a run costs."""

    def __init__(self, flow: Any) -> None:
        self.counter, self.before, self.after = _Hook(_count, flow), _Hook(_before, flow), _Hook(_after, flow)

    def put_counter(self, module: nn.Module) -> None:
        module._forward_pre_hooks[self.counter] = self.counter

    def put(self, module: nn.Module) -> None:
        module._forward_pre_hooks[self.before] = self.before
        module._forward_pre_hooks_with_kwargs[self.before] = True
        module._forward_hooks[self.after] = self.after
        # The output is taken before any other hook sees it: transformers captures hidden states in hooks of its own,
        # and an edit has to be in what those capture.
        module._forward_hooks.move_to_end(self.after, last=False)

    def take_counter_off(self, module: nn.Module) -> None:
        module._forward_pre_hooks.pop(self.counter, None)

    def take_off(self, module: nn.Module) -> None:
        module._forward_pre_hooks.pop(self.before, None)
        module._forward_pre_hooks_with_kwargs.pop(self.before, None)
        module._forward_hooks.pop(self.after, None)


class Override:
    """A function put in the place of a method of one object, for as long as any run uses it."""

    _users: Counter = Counter()
    _first: dict = {}  # the override that was put on, of those of one method
    _lock = RLock()

    def __init__(self, target: Any, name: str) -> None:
        self.target, self.name = target, name
        self.key = (id(target), name)
        with Override._lock:
            Override._users[self.key] += 1
            if Override._users[self.key] == 1:
                self.put_on()
                Override._first[self.key] = self

    def remove(self) -> None:
        with Override._lock:
            Override._users[self.key] -= 1
            if not Override._users[self.key]:
                del Override._users[self.key]
                Override._first.pop(self.key).take_off()


class ForwardOverride(Override):
    """Lets a module's forward pass be left out of a call (`skip`)."""

    def put_on(self) -> None:
        self.own = own = self.target.__dict__.get("forward")

        @functools.wraps(own or type(self.target).forward)
        def maybe_skip(module: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
            flow = current_owner()
            tap = flow.taps.get((id(module), FORWARD)) if flow is not None else None
            skip = tap.skips.pop(tap.active[-1], None) if tap is not None and tap.skips and tap.active else None
            if skip is not None:
                return skip.value
            function = own if own is not None else functools.partial(type(module).forward, module)
            if tap is None:
                return function(*args, **kwargs)
            if tap.inside:
                wrapped = module._modules.get(_WRAPPED)
                function = wrapped if wrapped is not None else getattr(own, _UNCOMPILED)
            return tap.run(function, args, kwargs)

        if own is not None:  # its signature has no place for the module
            maybe_skip.__signature__ = _with_self(own)
        self.put = self.target.__dict__["forward"] = MethodType(maybe_skip, self.target)

    def take_off(self) -> None:
        if self.target.__dict__.get("forward") is not self.put:
            return  # someone else has put another there meanwhile
        del self.target.__dict__["forward"]
        if self.own is not None:
            self.target.__dict__["forward"] = self.own


class CompiledOverride(Override):
    """Sends the calls of a module that `module.compile()` has compiled through the taps of the run that makes them."""

    def put_on(self) -> None:
        target, own = self.target, self.target.__dict__[self.name]

        def call(*args: Any, **kwargs: Any) -> Any:
            flow = current_owner()
            tap = flow.taps.get((id(target), FORWARD)) if flow is not None and not flow.closing else None
            if tap is None or not tap.open:
                if tap is not None:
                    tap.entered += 1
                return own(*args, **kwargs)
            return tap.call(target._call_impl if tap.inside else own, args, kwargs)

        self.own, self.put = own, call
        target.__dict__[self.name] = call

    def take_off(self) -> None:
        if self.target.__dict__[self.name] is self.put:
            self.target.__dict__[self.name] = self.own


def _with_self(function: Callable) -> inspect.Signature:
    """The signature of `function` with a place for the instance in front."""
    signature = inspect.signature(function)
    first = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    return signature.replace(parameters=[first, *signature.parameters.values()])


class MethodOverride(Override):
    """Sends the calls of one method, of an object and of copies of it, through the taps of the run that makes them."""

    def put_on(self) -> None:
        self.own = own = self.target.__dict__.get(self.name)
        if own is not None:  # the user has put another on the object itself, a compiled one for instance

            @functools.wraps(own)
            def method(*args: Any, **kwargs: Any) -> Any:
                flow = current_owner()
                tap = flow.taps.get(self.key) if flow is not None else None
                return own(*args, **kwargs) if tap is None or flow.closing else tap.call(own, args, kwargs)

            self.put = self.target.__dict__[self.name] = method
            return
        cls = type(self.target)
        names = frozenset({self.name, *getattr(cls, "_diffsight_names", ())})
        self._become(getattr(cls, "_diffsight_class", cls), names)
        self.target.__dict__[_OWNER] = id(self.target)

    def take_off(self) -> None:
        if self.own is not None:
            if self.target.__dict__.get(self.name) is self.put:
                self.target.__dict__[self.name] = self.own
            return
        for target in (self.target, *_copies.pop(id(self.target), ())):
            self.target = target
            cls = type(target)
            self._become(cls._diffsight_class, cls._diffsight_names - {self.name})
            if not hasattr(type(target), "_diffsight_class"):
                target.__dict__.pop(_OWNER, None)

    def _become(self, cls: type, names: frozenset[str]) -> None:
        object.__setattr__(self.target, "__class__", _tapped_class(cls, names) if names else cls)


_copies: dict[int, weakref.WeakSet] = {}  # by the id of a tapped object: the copies of it that were made meanwhile


@functools.cache
def _tapped_class(cls: type, names: frozenset[str]) -> type:
    """A subclass of `cls`, of the same name, whose methods `names` go through the taps of the current run."""

    def wrap(name: str) -> Callable:
        original = getattr(cls, name)

        @functools.wraps(original)
        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            flow = current_owner()
            tap = flow.taps.get((self.__dict__.get(_OWNER), name)) if flow is not None else None
            if tap is None or flow.closing:
                return original(self, *args, **kwargs)
            return tap.call(functools.partial(original, self), args, kwargs)

        return method

    def __setstate__(self: Any, state: Any) -> None:
        """A copy is made: it is given back its class when the object is."""
        if hasattr(cls, "__setstate__"):
            cls.__setstate__(self, state)
        else:
            self.__dict__.update(state)
        _copies.setdefault(self.__dict__.get(_OWNER), weakref.WeakSet()).add(self)

    body = {name: wrap(name) for name in names}
    body["__setstate__"] = __setstate__
    body |= {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    body |= {"_diffsight_class": cls, "_diffsight_names": names}
    if not hasattr(cls, "__dict__") or "__slots__" in cls.__dict__:
        body["__slots__"] = ()
    return type(cls)(cls.__name__, (cls,), body)
