"""Taps: where a run touches the model.

A `Tap` belongs to one run and one callable of the model: a module's forward pass, or a method that code calls directly
(`vae.decode`, `scheduler.step`). Every call of it goes through `Tap.call`. There the tap counts the call and hands its
inputs and its output to the run (the `Host`) if a body waits for them or has assigned them. Calls made outside the
run's own coroutine (by another run, by the body itself, in another thread) pass untouched. How calls get here is the
business of `hooks`.

`Taps` are all taps of a run. To know what the model has passed, calls are counted. The model's components and their
children are hooked from the start. When a point is asked for, all modules around it and their children are hooked as
well. So a module is usually hooked before the module around it is entered, and its count is exact. If it is not
(`Origin.unseen`), its past is unknown, and the point counts as passed. A module that nobody asks for is only counted,
in a dictionary. That costs next to nothing, and most modules of a run are of this kind.
"""

import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn
from torch._C._autograd import _top_saved_tensors_default_hooks
from torch._C._functorch import get_dynamic_layer_stack_depth

from diffsight.engine.coroutine import Coroutine, current_owner
from diffsight.engine.gradients import end_checkpoints, is_computed_again
from diffsight.engine.hooks import (
    COMPILED,
    FORWARD,
    HookedModules,
    are_threads_seen,
    count_running,
    is_called_in_thread,
    note_run_of_thread,
)
from diffsight.engine.layout import Key, Layout, inside
from diffsight.engine.points import INPUTS, OUTPUT, Asked, Assignment, Point, PointKey
from diffsight.engine.step_clock import Clock
from diffsight.engine.target import Target
from diffsight.engine.torch_state import TorchState
from diffsight.engine.users_hooks import has_forward_hooks, output_hooks
from diffsight.errors import DiffsightError, PointNotFoundError

_known_compiled: weakref.WeakSet = weakref.WeakSet()  # compiled modules that have been warned about


class Host(Protocol):
    """The run, as its taps see it; see `diffsight.engine.flow.Flow`."""

    taps: "Taps"
    is_scan: bool  # whether it computes shapes alone
    clock: Clock
    thread: int
    coroutine: Coroutine | None  # the one that the model runs in, once it has started
    parked: Point | None  # where the model stands, if it waits at a point
    state: TorchState  # in which the run was opened
    refused: list[Exception]  # why values could not be assigned that were assigned ahead
    misshapen: list[str]  # assigned values whose shape or type differs from the model's own, in words

    def arrive(self, point: Point) -> None:
        """The model has reached a point that a body waits for or has assigned: give every body its turn."""

    def begin_call(self, tap: "Tap", args: tuple, kwargs: dict) -> None:
        """A call that the run watches begins: one of a component, or one that begins or ends a step."""

    def end_call(self, tap: "Tap", output: Any) -> None:
        """A call that the run watches has ended; the model continues with `output`."""


class Origin(NamedTuple):
    """What was known of a module's calls when the run began to count them."""

    around: "Tap | None" = None  # the surrounding tap, if the model had moved by then
    step: int = -1  # the step that the model was in
    unseen: int = 0  # calls of the surrounding module that had begun: calls of this one may have been missed
    unseen_in_step: int = 0  # the same, within that step
    guard: "tuple[Tap, int] | None" = None  # a surrounding tap, and the number of its call that was running


class Tap:
    """The calls of one module or method in one run."""

    __slots__ = (
        "active",  # numbers of the calls in progress, outermost first
        "awaited",  # the points that bodies wait for; for each body, whether it waits within a step
        "begun",  # whether a hook has already begun the call that reaches the forward pass now
        "border",  # in a scan, for a component: what its calls are made through
        "children_counted",
        "entered",  # number of calls begun so far, as far as the run has seen
        "given",  # the inputs of the call at whose output the model stands
        "hooks",  # what else the run has put on the module
        "host",
        "inside",  # whether a compiled module runs uncompiled
        "keepers",  # kind of point to the functions that are shown every value
        "origin",
        "pending",  # point to what was assigned to it
        "points",  # point to what was read there
        "skips",  # number of a call to what it returns without running
        "step_base",  # calls begun before the current step
        "takes_inputs",  # whether inputs are taken in a hook
        "target",
        "unseen",
        "unseen_in_step",
        "watched",  # whether the run wants to know when its calls begin and end
    )

    def __init__(self, host: Host, target: Target, origin: Origin, entered: int = 0, step_base: int = 0) -> None:
        """`entered` calls were counted before, `step_base` of them before the current step."""
        self.host, self.target, self.origin = host, target, origin
        self.entered, self.step_base = entered, step_base
        self.unseen, self.unseen_in_step = origin.unseen, origin.unseen_in_step
        self.active: list[int] = []
        self.awaited: dict[PointKey, list[bool]] = {}
        self.keepers: dict[str, list[Callable[[Tap, int, Any], None]]] = {}
        self.pending: dict[PointKey, list[Assignment]] = {}
        self.points: dict[PointKey, Point] = {}
        self.skips: dict[int, Assignment] = {}
        self.border: Callable[[Callable, tuple, dict], Any] | None = None
        self.given: tuple[tuple, dict] | None = None
        self.begun = self.children_counted = self.inside = self.takes_inputs = False
        self.watched = target.outer is None or target.key in host.clock.starts or target.key in host.clock.ends
        self.hooks: list[Any] = []

    # ---- from the model's side

    def call(self, function: Callable, args: tuple, kwargs: dict) -> Any:
        """Make one call of what is tapped, `function`."""
        if self.begun:
            self.begun = False
        else:
            args, kwargs = self.enter(args, kwargs) or (args, kwargs)
        index = self.active[-1]
        skip = self.skips.pop(index, None) if self.skips else None
        if skip is not None:
            self._check_region((INPUTS, index), skip)
            return self.leave(skip.value, (args, kwargs))
        if self.inside:
            function = self.target.uncompiled()
        has_hooks = self._has_hooks()  # PyTorch also looks for them before the call
        try:
            output = function(*args, **kwargs) if self.border is None else self.border(function, args, kwargs)
        except BaseException:
            self.active.remove(index)
            raise
        return self.leave(output, (args, kwargs), has_hooks)

    def enter(self, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """A call begins. Return new inputs, or None if they stay as they are."""
        if self.watched:
            self.host.begin_call(self, args, kwargs)
        around, index = self.origin.around, self.entered
        if not index and around is not None and not around.active and not self.host.taps.is_in_method(around):
            self.unseen = self.unseen_in_step = 1  # called directly: earlier calls may have been missed
        self.entered = index + 1
        self.active.append(index)
        key = (INPUTS, index)
        if not (key in self.awaited or key in self.pending or self.keepers):
            return None
        inputs, changed = self._pass(key, (args, kwargs))
        return inputs if changed else None

    def leave(self, output: Any, given: tuple[tuple, dict] | None = None, has_hooks: bool = True) -> Any:
        """A call ends. Return the output, replaced or as it was.

        `given` are its inputs. If hooks of others may still replace the output (never if `has_hooks` is False), the
        call ends after them."""
        if not self.active or (has_hooks and self._leave_after_hooks(given)):  # inactive: it began before the tap
            return output
        index = self.active.pop()
        key = (OUTPUT, index)
        if key in self.awaited or key in self.pending or self.keepers:
            self.given = given
            try:
                output, _ = self._pass(key, output)
            finally:
                self.given = None
        if self.watched:
            self.host.end_call(self, output)
        return output

    def _has_hooks(self) -> bool:
        """Whether others have put forward hooks on the module that run outside `call`."""
        owner = self.target.owner
        return self.target.name == FORWARD and has_forward_hooks(owner) and vars(owner).get(COMPILED) is None

    def _leave_after_hooks(self, given: tuple[tuple, dict] | None) -> bool:
        """Let the call end in a hook of its own, after those that may change the output; return False if none may."""
        owner, index = self.target.owner, self.active[-1]
        before = output_hooks(owner) if self._has_hooks() else []
        if not before:
            return False

        def after(module: nn.Module, args: tuple, output: Any) -> Any:
            if module is not owner or current_owner() is not self.host or self.active[-1:] != [index]:
                return None
            hook.remove()
            self.hooks.remove(hook)
            return self.leave(output, given, has_hooks=False)

        hook = owner.register_forward_hook(after)
        self.hooks.append(hook)
        for number in [number for number in owner._forward_hooks if number not in (*before, hook.id)]:
            owner._forward_hooks.move_to_end(number)
        return True

    def _pass(self, key: PointKey, value: Any) -> tuple[Any, bool]:
        """A value passes a point. Return what the model continues with, and whether it was replaced."""
        point = None
        self._check_region(key)
        if key in self.pending or key in self.awaited:
            point = Point(self, key, value, all(self.awaited.get(key, ())))
            self.host.arrive(point)
            value = point.value
        for keep in self.keepers.get(key[0], ()):
            keep(self, key[1], value)
        if point is None:
            return value, False
        if key in self.points and not point.is_unread:
            point.let_go()
        return value, point.changed

    def _check_region(self, key: PointKey, skip: Assignment | None = None) -> None:
        """Refuse a point where its value is not what it seems. Let `backward()` compute what the run does there."""
        if are_threads_seen() and self.host.taps.is_called_in_thread(self.target):
            self._refuse(
                key,
                skip,
                "cannot be told from other calls: the model also calls the module in a thread of its own, where a run "
                "does not see it. Ask for a value of a module that is called in the run's thread alone",
            )
        if get_dynamic_layer_stack_depth() > len(self.host.state.levels):
            self._refuse(
                key,
                skip,
                "is inside torch.func (vmap, grad, jvp …), and its value ends with that call. Ask for a value outside "
                "of it, such as the output of a module around it",
            )
        if torch.is_grad_enabled():
            if _top_saved_tensors_default_hooks(True):
                end_checkpoints()
        elif self.host.state.grad and is_computed_again():
            self._refuse(
                key,
                skip,
                "lies in a region that backward() computes again, without what a run reads or changes there. Use "
                'checkpointing with use_reentrant=False (gradient_checkpointing_enable({"use_reentrant": False}) in '
                "transformers), turn it off for this run, or open the run under torch.no_grad() if you need no "
                "gradients",
            )

    def _refuse(self, key: PointKey, skip: Assignment | None, why: str) -> None:
        kind, index = key
        assigned = ", ".join(map(str, self.pending.get(key, ()) if skip is None else [skip]))
        point = assigned or str(Asked(self.target, "output" if kind == OUTPUT else "input", index))
        error = DiffsightError(f"{point} {why}")
        self.host.refused.append(error)  # the model may have an `except` of its own
        raise error

    # ---- from the run's side

    def take_inputs(self) -> None:
        """From now on, take the inputs of a module in a hook, the last one before its forward pass.

        What the body puts in their place is then shown to the hooks after the call too, among them those with which
        transformers captures hidden states."""
        module = self.target.owner
        if self.takes_inputs or self.target.name != FORWARD or vars(module).get(COMPILED) is not None:
            return
        self.takes_inputs = True

        def before(called: nn.Module, args: tuple, kwargs: dict | None = None) -> Any:
            # A copy of the module has the hook too. And a hook that another one has removed is called without kwargs.
            if called is not module or kwargs is None or current_owner() is not self.host or not self.host.taps:
                return None
            new = self.enter(args, kwargs)
            self.begun = True
            return new

        self.hooks.append(module.register_forward_pre_hook(before, with_kwargs=True))

    def look_inside(self) -> None:
        """Run a compiled module uncompiled, and PyTorch's transformer layer unfused, so that its parts can be seen."""
        self.inside = self.target.is_compiled()
        if self.inside and self.target.owner not in _known_compiled:
            _known_compiled.add(self.target.owner)
            path = self.target.path or type(self.target.owner).__name__
            message = f"{path} is compiled: a run that reads or changes values inside it runs it uncompiled, slower"
            warnings.warn(message, stacklevel=2)
        if isinstance(self.target.owner, nn.TransformerEncoderLayer):  # it is not fused if it has any hook
            self.hooks.append(self.target.owner.register_forward_pre_hook(lambda *_: None))

    def assign_pending(self, point: Point) -> bool:
        """Assign what those whose turn it is have assigned to a point; return whether there was anything."""
        waiting, assigned = self.pending.pop(point.key, ()), False
        for assignment in waiting:
            kind, index = point.key
            call = index
            if assignment.order <= point.turn:
                call = assignment.call_of(self)
                if call == index:
                    try:
                        difference = assignment.apply_to(point)
                    except Exception as error:
                        self.host.refused.append(error)  # the model may have an `except` of its own
                        raise
                    if difference is not None:
                        self.host.misshapen.append(difference)
                    assigned = True
                    continue
                # This call turned out not to have the part that is meant; it is not looked at again.
                assignment.first = assignment.first if assignment.asked.call else call
            self.pending.setdefault((kind, call), []).append(assignment)
        return assigned

    def waiting(self) -> list[Assignment]:
        """Return what was assigned and not reached."""
        return [a for waiting in self.pending.values() for a in waiting] + list(self.skips.values())

    def drop_step(self) -> list[Assignment]:
        """A step ends: drop what was read within it. Return what was assigned within it and not reached."""
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

    def remove(self) -> None:
        """Remove the hooks that the run has put on the module, besides those of `HookedModules`."""
        for hook in self.hooks:
            hook.remove()


class LearningTap(Tap):
    """A tap in the first run of a model, which notes whether the module is called directly, not by one around it."""

    __slots__ = ()

    def enter(self, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        self.host.taps.note_call(self.target)
        return super().enter(args, kwargs)


class Taps(dict[Key, Tap]):
    """All taps of a run, by the key of their target, and the counts of the modules beside them.

    Args:
        host: The run.
        components: What is tapped from the start.
        find_layout: Returns where the modules below the components stand.
    """

    def __init__(self, host: Host, components: Sequence[Target], find_layout: Callable[[list[Target]], Layout]) -> None:
        super().__init__()
        self.components = list(components)
        self.counts: dict[int, int] = {}  # id of a module that is only counted: its calls so far
        self._host: Host | None = host
        self._find_layout = find_layout
        self._layout: Layout | None = None
        self._learns = False  # whether it taps everything, to learn which modules are strays
        self._methods = [target for target in components if target.name != FORWARD]
        self._origins: dict[int, Origin] = {}  # of the modules that are only counted
        self._counts_before: dict[int, int] = {}  # their calls before the current step
        self._hooked = HookedModules()  # including those with taps
        self._opened: set[Target] = set()  # what was asked for
        self._around: dict[Target, Tap | None] = {}  # what lies around that, to its own tap or that of what it lies in

    def start(self) -> None:
        """Tap the components, before anything moves."""
        note_run_of_thread()
        layout = self._layout = self._find_layout(self.components)
        self._learns = not layout.is_known
        for component in self.components if self._learns else ():
            self._tap_everything(component)
        for component in self.components:
            self._tap_component(component)
        if layout.counted:
            self._count(layout.counted, Origin(step=self._host.clock.index))

    def note_learned(self) -> None:
        """The model has run to its end."""
        if self._learns:
            self._layout.is_known = True

    def add(self, target: Target) -> None:
        """Tap one more component, in a run that has started."""
        self.components.append(target)
        if self:
            self._tap_component(target)

    def open(self, target: Target) -> Tap:
        """Return the tap of `target`; make it, and those of the modules around it, if there is none yet."""
        if target in self._opened:
            return self[target.key]
        if not target.is_called:
            raise PointNotFoundError(
                f"{target.path} has no values: {type(target.owner).__name__} is never called by the model; it only "
                "holds other modules. Ask for one of those"
            )
        for place in self._layout.places.get(target.key, ()):
            self._tap_around(place)
        around = self._around.get(target.outer) or self._tap_around(target)
        tap = self._tap(target, around)
        self._opened.add(target)
        return tap

    def renew(self) -> None:
        """Hook those modules again whose `forward` the body has replaced, before the model moves."""
        self._hooked.renew()

    def note_call(self, target: Target) -> None:
        """Learn from a call of a module whether it is a stray."""
        layout = self._layout
        if target.key[0] not in layout.counted:
            around = [self.get(outer.key) for outer in layout.around(target)]
            if around and not any(tap is None or tap.active for tap in around):
                layout.note_stray(target)

    def begin_step(self) -> list[Assignment]:
        """A step begins. Return what was assigned within the last one and not reached."""
        self._counts_before = dict(self.counts)
        missed: list[Assignment] = []
        for tap in self.values():
            if tap.entered or tap.pending or tap.skips:
                missed += tap.drop_step()
        return missed

    def entered(self) -> dict[Key, int]:
        """Return how many calls have begun, for everything that is counted or tapped."""
        return {key: tap.entered for key, tap in self.items()} | {(i, FORWARD): n for i, n in self.counts.items()}

    def is_called_in_thread(self, target: Target) -> bool:
        """Whether the model has called a module, or one around it, in a thread of its own."""
        own, components = self._host.thread, {component.key[0] for component in self.components}
        inside = (module.owner for module in (target, *target.around()) if module.key[0] not in components)
        return any(is_called_in_thread(module, own, components) for module in inside if isinstance(module, nn.Module))

    def is_in_method(self, around: Tap) -> bool:
        """Whether a tapped method of a module is running."""
        return any(self[method.key].active for method in self._methods if method.owner is around.target.owner)

    def remove(self) -> None:
        """Take everything off the model."""
        self._hooked.unhook()
        for tap in self.values():
            if tap.hooks:
                tap.remove()
            tap.points.clear()  # points refer to their tap
        self.clear()
        for held in (self.counts, self._origins, self._counts_before, self._opened, self._around):
            held.clear()
        self._host = None  # so that nothing of a run that has ended waits for the garbage collector

    def _tap_component(self, target: Target) -> None:
        if target.name == FORWARD and target.is_compiled():
            self._tap(target, None)  # nothing in it is touched until something in it is asked for
        else:
            self._tap_with_children(target, None)

    def _tap_around(self, target: Target) -> Tap | None:
        """Tap the modules around `target` and count what lies directly in them; return the tap of the innermost."""
        outer = target.outer
        if outer is None:
            return None
        if outer not in self._around:
            around = self._tap_around(outer)
            self._around[outer] = self._tap_with_children(outer, around) if outer.is_called else around
        return self._around[outer]

    def _tap_with_children(self, target: Target, around: Tap | None) -> Tap:
        tap = self._tap(target, around)
        if tap.children_counted or target.name != FORWARD:
            return tap
        tap.children_counted = True
        tap.look_inside()
        self._count({child.key[0]: child.owner for child in target.called_children()}, self._origin(tap))
        return tap

    def _count(self, modules: dict[int, nn.Module], origin: Origin) -> None:
        """Count the calls of modules from now on, unless they are counted or tapped already."""
        new = {n: module for n, module in modules.items() if n not in self.counts and (n, FORWARD) not in self}
        self._hooked.hook(new.values())
        self._origins.update(dict.fromkeys(new, origin))
        self.counts.update(dict.fromkeys(new, 0))

    def _tap_everything(self, component: Target) -> None:
        new = {target.key: target for target in inside(component) if target.name == FORWARD and target.key not in self}
        origin = Origin(step=self._host.clock.index)
        self.update({key: LearningTap(self._host, target, origin) for key, target in new.items()})
        self._hooked.hook([target.owner for target in new.values()])

    def _tap(self, target: Target, around: Tap | None) -> Tap:
        tap = self.get(target.key)
        if tap is not None:
            return tap
        number, owner = target.key[0], target.owner
        if target.name != FORWARD or number not in self.counts:
            tap = self[target.key] = Tap(self._host, target, self._origin(around))
            if target.name == FORWARD:
                self._hooked.hook([owner])
            else:
                tap.hooks.append(target.attach(tap))
            return tap
        entered, origin = self.counts.pop(number), self._origins.pop(number)
        tap = self[target.key] = Tap(self._host, target, origin, entered, self._counts_before.get(number, 0))
        if entered and self._host.coroutine is not None:
            tap.active += range(entered - count_running(self._host.coroutine.frame, owner), entered)
        return tap

    def _origin(self, around: Tap | None) -> Origin:
        """What is known of the past of the modules directly in the one that `around` taps, if they are counted from
        now on."""
        host = self._host
        if around is None or host.coroutine is None:
            return Origin(step=host.clock.index)
        at_inputs = host.parked is not None and host.parked.tap is around and host.parked.key[0] == INPUTS
        running = bool(around.active) and not at_inputs
        methods = [self[method.key] for method in self._methods if method.owner is around.target.owner]
        now = at_inputs or running  # a call of the module around is in progress, and does not count as past
        unseen_in_step = sum(method.entered - method.step_base for method in methods)
        unseen_in_step += max(0, around.entered - around.step_base - now)
        if around.origin.step == host.clock.index:
            unseen_in_step += around.unseen_in_step
        return Origin(
            around,
            host.clock.index,
            around.unseen + around.entered - now + sum(method.entered for method in methods),
            unseen_in_step,
            (around, around.active[-1]) if running else around.origin.guard,
        )
