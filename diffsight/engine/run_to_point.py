"""The flow of one run: it runs the model up to each point that the body asks for, and on from there.

The body asks for a point (`fetch`). The flow taps it, tells the tap that the body is waiting, and resumes the model.
When the model reaches the point, the tap reports it (`arrive`), the flow parks the model, and the body has the value.
The point counts as passed if any of these comes first: the model ends, the body's step ends, or the module that was
running when the tap was made returns. That raises an `OutOfOrderError`; the value of a later call is never returned.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from sys import _getframe
from typing import Any

import torch
from greenlet import getcurrent
from torch.utils._pytree import tree_leaves

from diffsight.engine import order
from diffsight.engine.batch_slicing import Selection
from diffsight.engine.coroutine import Coroutine, InnerCall, current
from diffsight.engine.gradients_at_point import GradientsAtPoint
from diffsight.engine.innermost_run import current_edit
from diffsight.engine.late_edits import is_trained, moves, shares_memory
from diffsight.engine.model_tree import Tree
from diffsight.engine.module_places import inside
from diffsight.engine.order import Scope
from diffsight.engine.part_containers import FormerContainer, PartContainer, takes_items
from diffsight.engine.points import (
    INPUTS,
    LAST,
    OUTPUT,
    Asked,
    Assignment,
    Point,
    PointKey,
    check_value,
    find_call,
    first_input,
)
from diffsight.engine.run_end import RunEnd
from diffsight.engine.tapped_call import Tap
from diffsight.engine.target import Target, join
from diffsight.engine.threads import THIS_THREAD, calls_in_threads, check_runs_thread
from diffsight.engine.torch_state import TorchState, call_in, seeded_random_state, unseen
from diffsight.engine.turns import Body
from diffsight.engine.users_line import users_line
from diffsight.errors import (
    DiffsightError,
    InputError,
    NeverReachedError,
    OutOfOrderError,
    RunClosedError,
)


class Flow(RunEnd):
    """One execution of `function`, which calls the model.

    Args:
        function: Calls the model.
        tree: The tree of the model.
    """

    known_of_step: Mapping[str, Any] = {}  # what a server reports about the current step
    body_mode: AbstractContextManager = nullcontext()  # the mode in which the body of the `with` statement runs
    is_scan = False

    def __init__(self, function: Callable[[], Any], tree: Tree) -> None:
        super().__init__(tree)
        self.function = function
        self.state = TorchState.capture()
        self.seed: int | None = None  # of the model's own random state; None: it uses the global one
        self.modes: list = []  # function modes that the model runs in, besides the caller's
        here = getcurrent()
        is_users = getattr(here, "coroutine", None) is None
        self._home = here if is_users else None  # the stack of the code that opened the run; None if a coroutine's
        self.opened_in = None if is_users else current_edit()  # the edit that opened the run
        self.task: Any = None  # see `innermost_run`
        self.is_entered = False  # whether the block of its `with` statement has begun and not ended
        self.run: Callable[[], Any] = lambda: None  # a weak reference to the `Run`
        self._scope = Scope()

    @property
    def has_begun(self) -> bool:
        """Whether anything was asked for, and the run is open."""
        return bool(self.taps)

    @property
    def scope(self) -> Scope:
        """The scope of the body that is running now."""
        return self._scope_of(current())

    @property
    def where(self) -> str:
        """Where the model stands, in words."""
        is_in_step = self.clock.has_steps or self.scope.in_step
        return order.position(self._stands, self.clock.index if is_in_step else None)

    def _scope_of(self, body: Coroutine | None) -> Scope:
        """Return the scope of one of the run's bodies; for anything else, the scope of the body that opened the run."""
        return body.scope if isinstance(body, Body) and body.flow is self else self._scope

    def _beside(self) -> Body | None:
        """Return the running body, or None if that is the body that opened the run."""
        body = current()
        return body if isinstance(body, Body) and body.flow is self else None

    # ---- requests of a body

    def fetch(self, asked: Asked) -> Any:
        """Return the value at a point."""
        scope, selection = self._scope, asked.selection
        if getcurrent() is not self._home or self.bodies.edits or self.outcome is not None:
            body = current()
            scope = self._scope_of(body)
            is_models = body is not None and scope is self._scope  # or it belongs to another run
            if is_models or self.bodies.edits or self.outcome is not None or THIS_THREAD.number != self.thread:
                self._check_open(asked)
                self._touch(asked)
        tap, first = self._locate(asked, scope)
        if selection is None or selection.is_in_every_call:
            point = self._point(tap, (asked.kind, first + asked.call), asked, scope)
        else:
            point = self._find(tap, first, asked, scope)
        if self._held_containers:
            self._assign_changes()
        if point.copies:
            point.copies.clear()  # somebody has them now
        if asked.kind == OUTPUT:
            frame = _getframe(3)  # of the code that asks for `.output`: the two between are the envoy's
            point.reader = frame.f_code, frame.f_lasti, frame.f_globals, self.clock.index
        if point is not self.parked:
            value = self._read_again(point, asked)
        else:
            value = first_input(point.value, asked) if asked.part == "input" else point.value
        if selection is None:
            point.is_whole_read = True
            return value
        selected = selection.at(tap, point.index, asked)
        point.parts = point.parts or {}
        point.parts[selection.name] = selected, value
        if point is not self.parked:
            return selected.take(value, asked)
        taken, is_copied = selected.take_own(value, asked)
        if is_copied or (type(taken) is not torch.Tensor and taken is not value and takes_items(taken)):
            container = PartContainer(point, asked, taken, selected if is_copied else None)
            self._held_containers = [*self._held_containers, container]
        return taken

    def assign(self, asked: Asked, value: Any, where: str | None = None) -> None:
        """Assign `value` to a point: now if the model stands there, else when it gets there. `where` is the line
        that assigns it; by default, the line that called into diffsight."""
        self._check_open(asked)
        self._touch(asked)
        if asked.selection is None:
            check_value(asked, value)
        scope = self.scope
        tap, first = self._locate(asked, scope)
        key = (asked.kind, find_call(tap, first, asked, asked))
        line = where or users_line()
        assignment = Assignment(asked, value, line, scope.in_step, first, scope.order, torch.is_grad_enabled())
        if self.parked is not None and self.parked is tap.points.get(key):
            self._assign_changes()
            before = self.parked.value
            difference = assignment.apply_to(self.parked)
            if difference is not None:
                self.misshapen[difference] = assignment.where
            containers = self._held_containers
            self._held_containers = [one for one in containers if not one.is_replaced_by(assignment, self.parked)]
            self._note_assigned(self.parked, asked.selection, before)
        elif order.has_passed(tap, key, scope, self.clock.index) and not order.is_ahead(tap, key, scope):
            raise order.too_late(asked, "assigned", self.where)
        else:
            tap.add_pending(key, assignment)

    def skip(self, asked: Asked, value: Any, where: str | None = None) -> None:
        """Skip a call (see `Tap.call`), which then returns `value`. Ask before it runs, at its inputs at the latest."""
        self._check_open(asked)
        self._touch(asked)
        check_value(asked, value)
        scope = self.scope
        tap, first = self._locate(asked, scope)
        index = first + asked.call
        at_its_inputs = self.parked is not None and self.parked is tap.points.get((INPUTS, index))
        if not at_its_inputs and order.has_passed(tap, (INPUTS, index), scope, self.clock.index):
            raise order.too_late(asked, "asked for", self.where)
        known = tap.skips.get(index)
        if known is None or known.order <= scope.order:
            line, has_gradients = where or users_line(), torch.is_grad_enabled()
            skip = Assignment(asked, value, line, scope.in_step, order=scope.order, has_gradients=has_gradients)
            tap.add_skip(index, skip)
        edit = self._edit()
        if edit is not None:
            edit.met = True

    def keep(self, asked: Asked, function: Callable[[Tap, int, Any], None]) -> None:
        """Call `function` for every value that passes a point from now on. It takes the tap, the number of the call,
        and the value that the model continues with."""
        self._check_open(asked)
        scope = self.scope
        tap, first = self._locate(asked, scope)
        key = (asked.kind, first)
        stands_there = self.parked is not None and self.parked is tap.points.get(key)
        if not stands_there and order.has_passed(tap, key, scope, self.clock.index):
            raise order.too_late(asked, "asked for", self.where)
        tap.add_keeper(asked.kind, function)

    def mirror(self, asked: Asked, function: Callable[[Any], None]) -> None:
        """If the model runs on a server, call `function` here with every value that passes a point. A model that runs
        here calls it itself, so this does nothing."""

    def backward(self, loss: torch.Tensor) -> None:
        """Compute the gradients of a loss."""
        self.check_thread("run.backward")
        loss.backward(retain_graph=True)

    def next_step(self) -> bool:
        """Run the model to the beginning of the next step that the body has not entered. Return False if the
        model ends, or stands before a call that comes after the last step."""
        self.check_thread("run.steps")
        self.start_edits()
        if self.outcome is not None or self.clock.is_over:
            return False
        self._start()
        scope = self.scope
        scope.stop_at_steps = True
        while self.outcome is None and self.clock.index <= scope.step and not self.clock.is_over:
            self._resume() if scope is self._scope else self._beside().wait()
        if self.outcome is not None or self.clock.index <= scope.step:
            return False
        scope.step, scope.in_step = self.clock.index, True
        return True

    def leave_steps(self) -> None:
        """Leave the body's loop over steps: its scope is the whole run again."""
        self.scope.in_step = self.scope.stop_at_steps = False

    def run_on(self) -> None:
        """Run the rest of the model."""
        self.check_thread("run.result")
        self.check_leads("run.result")
        self._scope.stop_at_steps = False
        while self.outcome is None:
            self._resume()

    def run_to_end(self) -> Any:
        """Run the rest of the model; return its result."""
        if self.has_result:
            return self.result
        self.run_on()
        if not self.has_result:
            raise RunClosedError(f"the run has no result: {self.outcome}")
        return self.result

    def each(self, functions: Sequence[Callable[[], Any]]) -> list[Any]:
        """Run `functions` as bodies of their own, side by side, until all have ended; return what they returned."""
        self._check_open("run.each")
        self.check_leads("run.each")
        self._start()
        state = TorchState.capture()
        bodies = self.bodies.functions = [Body(function, self, state) for function in functions]
        if self._scope.in_step:  # within a loop over steps, they ask for values of its step
            for body in bodies:
                body.scope.in_step, body.scope.step, body.scope.stop_at_steps = True, self._scope.step, True
        try:
            call = self.bodies.wake([*bodies], self.parked)
            if call is not None:
                self._resume(call)
            while self.outcome is None and not all(body.dead for body in bodies):
                self._resume()
        finally:
            self.bodies.functions = []
            for body in bodies:
                if not body.dead:
                    body.unwind()
        return [body.result for body in bodies]

    def call(self, function: Callable[[], Any], target: Target) -> Any:
        """Call `function`, which calls `target`, where the model stands, so that the call passes the taps."""
        self._check_open(join(target.path, "hook=True"))
        self._start()
        self.taps.open(target)
        body = self._beside()
        call = InnerCall(function, body)
        with self._keeping_values(target):
            if body is not None:
                body.ask(call)
            else:
                self.bodies.begin_call(self.parked)
                given = self._resume(call)
                while given is not call and self.outcome is None:
                    given = self._resume()
        if call.error is not None:
            raise call.error
        return call.result

    @contextmanager
    def _keeping_values(self, target: Target) -> Iterator[None]:
        """Keep the values that pass the points of a module within the block, until the model moves on."""
        scope = self.scope

        def keep(kind: str, tap: Tap, index: int, value: Any) -> None:
            if (kind, index) not in tap.points:
                point = tap.points[kind, index] = Point(tap, (kind, index), value, scope.in_step)
                point.is_unread, point.read_by = True, (scope.order,)
                self._called = [*self._called, point]

        taps = [self.taps.open(part) for part in inside(target) if part.is_seen]
        keepers = {kind: partial(keep, kind) for kind in (INPUTS, OUTPUT)}
        for tap in taps:
            for kind, keeper in keepers.items():
                tap.add_keeper(kind, keeper)
        try:
            yield
        finally:
            for tap in taps:
                for kind, keeper in keepers.items():
                    tap.keepers[kind].remove(keeper)

    def _let_go_of_called(self) -> None:
        """Let go of the values of calls by the bodies that nobody has read."""
        called, self._called = self._called, ()
        for point in called:
            if point.is_unread:
                point.tap.points.pop(point.key, None)

    def start_edits(self) -> bool:
        """Start the edits, before anything else is asked for. Return False if they have started, or there are none."""
        bodies = self.bodies
        if not bodies.edits or bodies.edits_begun or THIS_THREAD.number != self.thread:
            return False
        bodies.edits_begun = True
        self._start()
        call = bodies.wake([*bodies.edits], self.parked)
        if call is not None:
            self._resume(call)
        return True

    def add_mode(self, mode: Any) -> None:
        """From now on, run the model in one of PyTorch's function modes."""
        self.modes.append(mode)
        holder = self if self.coroutine is None else self.coroutine
        holder.state = holder.state.with_mode(mode)

    def enter_body(self) -> None:
        """Called when the block of the `with` statement begins."""

    def leave_body(self) -> None:
        """Called when the block of the `with` statement ends. May be called again."""

    def finish_undecided(self) -> None:
        """Run the model to the end of each call whose end decides whether a value read inside it was the intended
        one."""
        for _, calls in self._undecided():
            if self.outcome is None:
                index = calls.active[-1]
                scope = self._scope if current() is None else self.scope
                self._point(calls, (OUTPUT, index), Asked(calls.target, "output", index), scope)

    def undecided(self) -> list[tuple[str, str]]:
        """Return pairs of paths: a value that was read and the call in which it was read, for each value that only the
        end of that call can confirm as the intended one."""
        return [(value.target.path, calls.target.path) for value, calls in self._undecided()]

    def _undecided(self) -> list[tuple[Tap, Tap]]:
        decided = [(tap, tap.target.decided_by(tap)) for tap in self.taps.values()]
        return [(tap, calls) for tap, calls in decided if calls is not None]

    # ---- what is allowed

    def check_thread(self, path: object) -> None:
        """Raise an error if this is not the run's thread, or if the model itself is running."""
        check_runs_thread(self.thread, path)
        if self.coroutine is not None and self.coroutine.is_running:
            raise DiffsightError(
                f"{path} was asked for by a hook or callback of the model: the model cannot wait for itself"
            )

    def check_leads(self, path: str) -> None:
        """Raise InputError unless the body that opened the run is running."""
        if current() is None:
            return
        if self._edit() is not None:
            raise InputError(
                f"{path}: an edit runs alongside the model: it can read and assign, but cannot drive the run"
            )
        if self.scope is not self._scope:
            raise InputError(
                f"{path}: a function of run.each runs alongside the model: it can read and assign, but cannot drive "
                "the run. Ask after run.each has returned"
            )

    def _check_open(self, path: object) -> None:
        self.check_thread(path)
        self.start_edits()
        if self.outcome is not None:
            raise order.run_has_ended(path, f"{self.outcome}{self.clock.ending}", self.clock.index > 0)

    def _edit(self) -> Any:
        """Return the running edit of this run."""
        edit = current_edit()
        return edit if edit is not None and edit.flow is self else None

    def _touch(self, asked: Asked) -> None:
        """Remember the points that an edit asks for."""
        edit = self._edit()
        if edit is not None:
            edit.touches[asked.whole] = None

    def _read_again(self, point: Point, asked: Asked) -> Any:
        """Return the value at a point that the model has left."""
        try:
            value = point.read(asked.part)
        except LookupError:
            raise order.let_go(asked, self.where) from None
        if point.is_unread:
            point.is_unread = False
            point.let_go()
        if asked.kind == OUTPUT and not any(called is point for called in self._called):  # those the model never uses
            for leaf in tree_leaves(value):
                unseen(self._late_edits.watch, point, leaf)
        return value

    # ---- moving the model to a point

    def _load(self) -> None:
        """Called before anything runs."""
        self.tree.weights.load()

    def _start(self) -> None:
        """Tap the components, before anything moves."""
        if not self.taps:
            self._load()
            self.taps.start()

    def _locate(self, asked: Asked, scope: Scope) -> tuple[Tap, int]:
        """Return the tap of a point, and the number (in the run) of the first call in the scope."""
        if scope.in_step and self.clock.index > scope.step:
            raise order.step_has_ended(asked, scope.step)
        if not self.taps:
            self._start()
        tap = self.taps.open(asked.target)
        if asked.kind == INPUTS and asked.part != "skip":
            tap.take_inputs()
        return tap, tap.step_base if scope.in_step else 0

    def _find(self, tap: Tap, first: int, asked: Asked, scope: Scope) -> Point:
        """Run the model to the requested call. Only calls from `first` on that have the selected part count.

        Which calls these are is known only once they begin. So the model is run to the next candidate, and the
        selection is asked again there."""
        index, point, is_new = -1, None, False
        while (found := find_call(tap, first, asked, asked)) != index:
            index = found
            if is_new:
                point.is_unread = True
            is_new = (asked.kind, index) not in tap.points
            # If no call so far has matched and a whole step passes without a match, stop waiting.
            in_vain = not asked.call and first < index == tap.entered
            if not in_vain:
                point = self._point(tap, (asked.kind, index), asked, scope)
                continue
            try:
                with scope.within(self.clock.index):
                    point = self._point(tap, (asked.kind, index), asked, scope)
            except OutOfOrderError:
                raise NeverReachedError(f"{asked} was asked for, but {asked.selection.missing}") from None
        return point

    def _point(self, tap: Tap, key: PointKey, asked: Asked, scope: Scope) -> Point:
        """Return a point: at once if it is known, else when the model reaches it. A point that one edit has read counts
        as passed for all other bodies: each keeps its own order."""
        point = tap.points.get(key)
        if point is None and key[0] == INPUTS and tap.given is not None and self._is_at(tap, (OUTPUT, key[1])):
            if tap.has_changed_given():
                raise order.changed_by_its_call(asked)
            return Point(tap, key, tap.given, scope.in_step)
        if not self.bodies.edits:
            return point or self._advance_to(tap, key, asked, scope)
        if point is None or (scope.order not in point.read_by and point is not self.parked):
            point = self._advance_to(tap, key, asked, scope)
        point.read_by += (scope.order,)
        return point

    def _is_at(self, tap: Tap, key: PointKey) -> bool:
        """Whether the model stands at a point."""
        return self.parked is not None and self.parked.tap is tap and self.parked.key == key

    def _advance_to(self, tap: Tap, key: PointKey, asked: Asked, scope: Scope) -> Point:
        """Let the model run until it parks at the point."""
        end = None
        if tap.entered or tap.unseen or tap.origin.guard or not tap.is_module:  # otherwise it is certain to lie ahead
            end = self._last_chance(tap, key, asked, scope)
        in_step, point = scope.in_step, None
        tap.await_point(key, in_step)
        if end is not None:
            end[0].await_point(end[1], in_step)
        try:
            while self.outcome is None and not (in_step and self.clock.index > scope.step):
                # The body that opened the run moves the model; the others sleep until the model is where they wait.
                point = self._resume() if scope is self._scope else current().wait((tap, key), end)
                if point is not None and ((point.tap is tap and point.key == key) or (point.tap, point.key) == end):
                    break
                point = None
        finally:
            tap.stop_awaiting(key, in_step)
            if end is not None:
                end[0].stop_awaiting(end[1], in_step)
        if point is None or point.tap is not tap:
            if key[0] == OUTPUT and key[1] in tap.failures:
                raise order.call_failed(asked, tap.failures[key[1]])
            raise self._not_reached(asked, point, scope)
        if tap.unseen and order.has_unseen_calls(tap, scope, self.clock.index):
            raise self._not_reached(asked, point, scope)
        return point

    def _last_chance(self, tap: Tap, key: PointKey, asked: Asked, scope: Scope) -> tuple[Tap, PointKey] | None:
        """Return the end of the call within which a point passes, if it does at all; None if that is not known.

        Raises OutOfOrderError if the model has passed the point."""
        step = self.clock.index
        if order.has_passed(tap, key, scope, step) and not order.is_ahead(tap, key, scope):
            raise order.too_late(asked, "asked for", self.where)
        guard = order.guard_of(tap, scope, step)
        if guard is not None:
            return guard[0], (OUTPUT, guard[1])
        if not tap.is_module and asked.target.is_value:
            return self.taps[asked.target.outer.key], (OUTPUT, key[1])
        return None

    def _not_reached(self, asked: Asked, point: Point | None, scope: Scope) -> OutOfOrderError:
        """Return the error for a wait that ended at `point`, or without one."""
        error = order.called_in_thread if self._is_in_thread(asked.target) else order.not_reached
        if point is not None:
            return error(asked, f"{point.tap.target.path or self.tree.title} returned", OutOfOrderError)
        if self.outcome is not None:
            until = "the model ended" if self.has_result else self.outcome
            return error(asked, until, NeverReachedError, self.clock.ending)
        return error(asked, f"step {scope.step} ended", OutOfOrderError)

    def _is_in_thread(self, target: Target) -> bool:
        """Whether the model calls a module in a thread of its own."""
        return target.key in self._in_threads or (
            self.outcome is None and bool(calls_in_threads) and self.taps.is_called_in_thread(target)
        )

    def _resume(self, call: InnerCall | None = None) -> Point | InnerCall | None:
        """Let the model run until it parks at a point, which is returned, or at a step, or ends. If there is a `call`,
        make it first, and return it once it is made. The other bodies have their turn before the one that opened the
        run."""
        bodies = self.bodies
        if bodies.edits and self.start_edits() and self.outcome is not None:  # an edit has stopped the run
            return None
        if not self.taps:  # nothing was read or assigned: the bare call, without a coroutine and at no cost
            self._load()
            return self._end_with(self._call_plainly())
        if self.coroutine is None:
            self.coroutine = Coroutine(self.function, self, self.state)
            self.coroutine.random = None if self.seed is None else seeded_random_state(self.seed)
        coroutine, late_edits = self.coroutine, self._late_edits
        state = coroutine.state.now()
        while True:
            if self._held_containers:
                self._assign_changes(moves_on=True)
            if late_edits.watched and (
                changed := late_edits.changed() if state.is_plain else unseen(late_edits.changed)
            ):
                self._check_late_edits(changed)
            if self._called and call is None:
                self._let_go_of_called()
            if self._gradients is not None:
                self._check_gradients()
            left, self.parked = self.parked, None
            moves.count += 1
            self.taps.hooked.renew()  # before the model moves
            try:
                value = coroutine.resume(call, body=state)
            except BaseException as error:
                self._fail(error)
                raise
            if coroutine.dead:
                return self._end_with(coroutine.result)
            if state.is_plain:
                late_edits.note(left)
            else:
                unseen(late_edits.note, left)
            made_call = type(value) is InnerCall
            if made_call:
                self.parked, turns, continues = bodies.end_call()
            else:
                self.parked = value
                self._stands = value or self._stands
            if coroutine.state.grad and not self.state.grad and self.parked is not None:
                self._gradients = unseen(GradientsAtPoint, self.parked)
            if made_call:
                if value.asker is None:
                    return value
                value.asker.go()
            elif not (bodies.edits or bodies.functions):
                return value
            else:
                turns, continues = bodies.take_turn()
            call = bodies.wake(turns, self.parked, continues) if turns else None
            if self.outcome is not None:
                return None
            if call is None and not continues:
                return self.parked

    def _check_late_edits(self, changed: list[tuple[Point, torch.Tensor]]) -> None:
        """Raise OutOfOrderError for the first value that a body has changed in place in vain. Values of earlier steps
        are let pass, since the model may use them again."""
        for point, tensor in changed:
            if unseen(is_trained, tensor, point.changed):
                continue
            if point is self.parked:
                if not point.has_lost_edit():
                    continue
                error = order.edited_beside_copy(point)
            elif point.step_read == self.clock.index and not unseen(shares_memory, tensor, self._open_to_changes()):
                error = order.edited_too_late(point, self.where)
            else:
                continue
            self._late_edits.watched.clear()  # so that it is reported once
            raise error

    @property
    def adds_gradients(self) -> bool:
        """Whether the model computes gradients where it is, in a run that was opened without."""
        if self.state.grad:
            return False
        return torch.is_grad_enabled() if self.coroutine.is_running else self.coroutine.state.grad

    def _check_gradients(self) -> None:
        """Raise OutOfOrderError if a body has changed the value where the model stands in a way that the model's
        gradients would leave out."""
        gradients, self._gradients = self._gradients, None
        if unseen(gradients.were_bypassed):
            raise order.edited_without_gradients(gradients.point)

    def _assign_changes(self, moves_on: bool = False) -> None:
        """Assign what the bodies have set in the containers in which they have read a part of a value."""
        for container in self._held_containers:
            point, before = container.point, container.point.value
            if not container.assign_changes():
                continue
            selection = container.asked.selection
            self._note_assigned(point, selection, before)
            point.parts = point.parts or {}
            point.parts[selection.name] = selection.at(point.tap, point.index, container.asked), point.value
        if moves_on:  # except from where bodies have asked for calls that are being made
            stands = [point for point, *_ in self.bodies.calls]
            self._held_containers = [one for one in self._held_containers if any(one.point is at for at in stands)]

    def _note_assigned(self, point: Point, selection: Selection | None, before: Any) -> None:
        """Take note that a value was assigned where the model stands, in place of (a part of) `before`.

        A part is assigned in a copy of `before`. If all of `before` or other parts were read, they no longer reach the
        model."""
        if selection is None:
            point.parts, point.is_whole_read = None, False
        elif point.parts:
            point.parts.pop(selection.name, None)
        if not (point.parts or point.is_whole_read):
            self._late_edits.forget(point)
        elif point.value is not before:
            kept = set(map(id, tree_leaves(point.value)))
            for leaf in tree_leaves(before):
                if id(leaf) not in kept:
                    unseen(self._late_edits.watch, point, leaf)
            if point.is_whole_read and takes_items(before):
                self._held_containers = [*self._held_containers, FormerContainer(point, before)]

    def _open_to_changes(self) -> list[Any]:
        """Return the values that a body may change in place: where the model stands, and those that are assigned
        ahead."""
        waiting = [assignment.value for tap in self.taps.values() for assignment in tap.waiting()]
        return waiting if self.parked is None else [self.parked.value, self.parked.replaced, *waiting]

    def _call_plainly(self) -> Any:
        """Call the model without a coroutine."""
        moves.count += 1
        try:
            if self.seed is None and self.state.now() is self.state:  # the usual case: there is nothing to exchange
                return self.function()
            return call_in(self.state, self.seed, self.function)
        except BaseException as error:
            self._fail(error)
            raise

    # ---- from the model's side, see `diffsight.engine.tapped_call.Host`

    def arrive(self, point: Point, state: TorchState | None) -> None:
        """The model has reached a point: every body has its turn, and sees what those before it did."""
        tap, key = point.tap, point.key
        for edit in self.bodies.edits:
            point.turn = edit.scope.order
            edit.met |= tap.assign_pending(point)
            if edit.waits_for(tap, key):
                edit.met = True
                tap.points[key] = point
                self.bodies.turn = edit
                self.coroutine.park(point, state)
            point.turn = LAST
        if tap.pending and key in tap.pending:
            tap.assign_pending(point)
        if key in tap.awaited:
            tap.points[key] = point
            self.coroutine.park(point, state)

    def begin_call(self, tap: Tap, args: tuple, kwargs: dict) -> None:
        """A call that the run watches begins, and perhaps a step with it."""
        if self.clock.begins(tap.target, args, kwargs):
            if self.clock.is_over:
                raise order.step_after_the_last(tap.target.path, self.clock.index)
            self._begin_step(f"before {tap.target.path or 'the forward pass'}")
        elif self.clock.is_behind(tap.target) and self._has_loops() and not self.clock.is_over:
            self.clock.is_over = True
            self._stands = f"before {tap.target.path}"
            self.coroutine.park(None)
        if self.observer is not None:
            self.observer.called(tap, args, kwargs)

    def begin_empty_step(self) -> None:
        """A step begins in which the model makes no call."""
        self.clock.index += 1
        self._begin_step("after all calls of the step")

    def _begin_step(self, stands: str) -> None:
        self.unreached += self.taps.begin_step()
        if self._has_loops():
            self._stands = stands
            self.coroutine.park(None)

    def _has_loops(self) -> bool:
        """Whether a body is in a loop over the steps."""
        if self._scope.stop_at_steps:
            return True
        beside = [*self.bodies.edits, *self.bodies.functions]
        return bool(beside) and any(body.scope.stop_at_steps for body in beside)

    def end_call(self, tap: Tap, output: Any) -> None:
        """A call that the run watches has ended."""
        self.clock.note_end(tap.target)
        if self.observer is not None:
            self.observer.returned(tap, output)
