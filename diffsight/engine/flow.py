"""The flow of one run: the model's coroutine, its taps, and where it stands.

The protocol. The body asks for a point (`fetch`); the flow taps it, tells the tap to wait for it and resumes the model.
When the model gets there, the tap parks the model and the body has the value. If instead the model ends, or the step
ends that the body is in, or the surrounding module returns that was running when a late tap was made, the point lies
behind: `OutOfOrderError`, never a later call's value.
"""

import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from threading import get_ident
from typing import TYPE_CHECKING, Any, Protocol

import torch

from diffsight.engine.coroutine import (
    Call,
    Coroutine,
    TorchState,
    current,
    random_state,
    seeded_random_state,
    set_random_state,
)
from diffsight.engine.steps import Clock
from diffsight.engine.tapping import Places, Taps
from diffsight.engine.taps import (
    INPUTS,
    LAST,
    OUTPUT,
    Asked,
    Assignment,
    Point,
    Tap,
    Target,
    assign,
    find_call,
    first_input,
    join,
)
from diffsight.engine.turns import Body, Scope
from diffsight.errors import (
    AssignmentError,
    DiffsightError,
    InputError,
    NeverReachedError,
    OutOfOrderError,
    RunClosedError,
    WrongThreadError,
)

if TYPE_CHECKING:
    from diffsight.edits import EditBody

ENDED, STOPPED = "the run has ended", "the run was stopped"  # how runs end well


class Watch(Protocol):
    """What looks on at the calls of a run's components, to know what their batches hold (see `Part.call`)."""

    def called(self, tap: Tap, args: tuple, kwargs: dict) -> None:
        """A tapped call begins, with these arguments."""

    def returned(self, tap: Tap, output: Any) -> None:
        """A tapped call has ended; `output` is what the model goes on with."""

    def ended(self) -> None:
        """The run has ended."""


class Flow:
    """One execution of `function`. `components` are tapped from the start, `clock` says when a step begins, `places`
    gives the modules that stand in several places of the model, `load` sees to the weights before anything runs."""

    body_mode: AbstractContextManager = nullcontext()  # what the body of the `with` statement stands in

    def __init__(
        self,
        function: Callable[[], Any],
        components: Sequence[Target],
        clock: Clock,
        places: Callable[[list[Target]], Places],
        load: Callable[[], None],
    ) -> None:
        self.function = function
        self.clock = clock
        self.taps = Taps(self, components, places)
        self.load = load
        self.state = TorchState.capture()
        self.seed: int | None = None  # of the random state that the model has for itself; None: the global one
        self.modes: list = []  # PyTorch's function modes that the model runs in, besides those of the caller
        self.thread = get_ident()
        self.coroutine: Coroutine | None = None
        self.parked: Point | None = None
        self.bodies: list[Body] = []
        self.edits: list[EditBody] = []
        self._edits_begun = False
        self._turn: EditBody | None = None  # whose turn it is at the point where the model parks
        self._calls: list[tuple[Point | None, list[Body], bool]] = []  # of calls under way: where they were asked for
        self._scope = Scope()
        self.unreached: list[Assignment] = []
        self.watch: Watch | None = None
        self.misshapen: list[str] = []  # values assigned in another shape or type than the model's own, in words
        self.outcome: str | None = None  # how the run ended, in words; None while it is open
        self.has_result = False
        self.result: Any = None
        self._stands: Point | str = "before its first call"  # where the model is, or last was

    @property
    def scope(self) -> Scope:
        """The scope of the body that runs now."""
        body = self._beside()
        return self._scope if body is None else body.scope

    def _beside(self) -> Body | None:
        """The body that runs now, where it is not the one that opened the run."""
        body = current()
        return body if isinstance(body, Body) and body.flow is self else None

    # ---- what the body asks for

    def fetch(self, asked: Asked) -> Any:
        """The value of a point."""
        body = current()
        is_models = body is not None and self.coroutine is not None and self.coroutine.is_running
        if self.edits or self.outcome is not None or get_ident() != self.thread or is_models:
            self._check_open(asked)
            self._touch(asked)
        scope = self._scope if body is None else self.scope
        tap, first = self._locate(asked, scope)
        if asked.rows is None:
            point = self._point(tap, (asked.kind, first + asked.call), asked, scope)
        else:
            point = self._find(tap, first, asked, scope)
        value = point.value if asked.part != "input" else first_input(point.value, asked)
        return value if asked.rows is None else asked.rows.at(tap, point.index, asked).take(value, asked)

    def assign(self, asked: Asked, value: Any) -> None:
        """Puts `value` in the place of a point: now if the model stands there, else when it comes there."""
        self._check_open(asked)
        self._touch(asked)
        if asked.rows is None:
            _check_value(asked, value)
        scope = self.scope
        tap, first = self._locate(asked, scope)
        key = (asked.kind, find_call(tap, first, asked, asked))
        assignment = Assignment(asked, value, _caller(), scope.in_step, first, scope.order)
        if self.parked is not None and self.parked is tap.points.get(key):
            assign(self.parked, assignment)
        elif self._passed(tap, key, scope) and not self._is_ahead(tap, key, scope):
            raise OutOfOrderError(self._too_late(asked, "assigned"))
        else:
            tap.pending.setdefault(key, []).append(assignment)

    def skip(self, asked: Asked, value: Any) -> None:
        """Leaves a call out: `value` is what it gives. Possible until the call runs, at its inputs at the latest."""
        self._check_open(asked)
        self._touch(asked)
        scope = self.scope
        tap, first = self._locate(asked, scope)
        index = first + asked.call
        at_its_inputs = self.parked is not None and self.parked is tap.points.get((INPUTS, index))
        if not at_its_inputs and self._passed(tap, (INPUTS, index), scope):
            raise OutOfOrderError(self._too_late(asked, "asked for"))
        known = tap.skips.get(index)
        if known is None or known.order <= scope.order:
            tap.skips[index] = Assignment(asked, value, _caller(), scope.in_step, order=scope.order)
        if scope.edit is not None:
            scope.edit.met = True

    def keep(self, asked: Asked, function: Callable[[Tap, int, Any], None]) -> None:
        """Lets `function` have every value that passes a point from now on: the tap, the number of the call, the value
        as the model goes on with it."""
        self._check_open(asked)
        scope = self.scope
        tap, first = self._locate(asked, scope)
        stands_there = self.parked is not None and self.parked is tap.points.get((asked.kind, first))
        if not stands_there and self._passed(tap, (asked.kind, first), scope):
            raise OutOfOrderError(self._too_late(asked, "asked for"))
        tap.keepers.setdefault(asked.kind, []).append(function)

    def next_step(self) -> bool:
        """Runs the model to the beginning of the next step that the body has not entered; False where it ends."""
        self._check_thread("run.steps")
        self.start_edits()
        if self.outcome is not None:
            return False
        self._start()
        scope = self.scope
        scope.stop_at_steps = True
        while self.outcome is None and self.clock.index <= scope.step:
            self._move(scope, [])
        if self.outcome is not None:
            return False
        scope.step, scope.in_step = self.clock.index, True
        return True

    def leave_steps(self) -> None:
        """The body leaves its loop over steps: its scope is the whole run again."""
        self.scope.in_step = self.scope.stop_at_steps = False

    def run_on(self) -> None:
        """Runs the rest of the model."""
        self._check_thread("run.result")
        self._check_leads("run.result")
        self._scope.stop_at_steps = False
        while self.outcome is None:
            self._resume()

    def run_to_end(self) -> Any:
        """Runs the rest of the model; gives what it returned."""
        if self.has_result:
            return self.result
        self.run_on()
        if not self.has_result:
            raise RunClosedError(f"the run has no result: {self.outcome}")
        return self.result

    def each(self, functions: Sequence[Callable[[], Any]]) -> list[Any]:
        """Runs `functions` as bodies of their own, side by side, until all have ended; gives what they returned."""
        self._check_open("run.each")
        self._check_leads("run.each")
        self._start()
        state = TorchState.capture()
        bodies = self.bodies = [Body(function, self, state) for function in functions]
        try:
            call = self._take_turns([*bodies])
            if call is not None:
                self._resume(call)
            while self.outcome is None and not all(body.dead for body in bodies):
                self._resume()
        finally:
            self.bodies = []
            for body in bodies:
                if not body.dead:
                    body.unwind()
        return [body.result for body in bodies]

    def call(self, function: Callable[[], Any], target: Target) -> Any:
        """Calls `function`, which calls `target`, within the model where it stands: it passes through the taps."""
        self._check_open(join(target.path, "hook=True"))
        self._start()
        self.taps.open(target)
        body = self._beside()
        if body is not None:
            call = Call(function, body)
            body.ask(call)
        else:
            call = Call(function, None)
            self._calls.append((self.parked, [], False))
            given = self._resume(call)
            while given is not call and self.outcome is None:
                given = self._resume()
        if call.error is not None:
            raise call.error
        return call.result

    def raise_unreached(self) -> None:
        """The error for assignments that the model never came to, if there are any."""
        missed, self.unreached = [a for a in self.unreached if a.order == LAST], []
        if missed:
            lines = "\n".join(f"  {a}" for a in missed)
            raise NeverReachedError(
                f"assigned, but the model never came there:\n{lines}\nThe model ran without it. Does it use the module "
                "in this run (or in this step), and as often as the call number says?"
            )

    def close(self, outcome: str) -> None:
        """Ends the run where it stands: unwinds the model, removes every hook. May be called again."""
        if self.outcome is not None:
            return
        try:
            self.taps.remove()  # what the model still does while it is unwound passes untouched
            if self.coroutine is not None and get_ident() == self.thread:
                self.coroutine.unwind()
        except Exception:
            pass  # of the unwinding; what led to the end is what matters
        finally:
            self._end(outcome)

    # ---- taps

    def start_edits(self) -> bool:
        """Starts the edits, before anything else is asked for; False where they have begun, or there are none."""
        if not self.edits or self._edits_begun or get_ident() != self.thread:
            return False
        self._edits_begun = True
        self._start()
        call = self._take_turns([*self.edits])
        if call is not None:
            self._resume(call)
        return True

    def _start(self) -> None:
        """Taps the components, before anything moves."""
        if not self.taps:
            self.load()
            self.taps.start()

    # ---- where things stand

    def _locate(self, asked: Asked, scope: Scope) -> tuple[Tap, int]:
        """The tap, and the number in the run of the first call in the scope."""
        if scope.in_step and self.clock.index > scope.step:
            raise OutOfOrderError(f"{asked.of_all} was asked for too late: step {scope.step} has ended")
        if not self.taps:
            self._start()
        tap = self.taps.open(asked.target)
        if asked.kind == INPUTS and asked.part != "skip":
            tap.take_inputs()
        return tap, tap.step_base if scope.in_step else 0

    def _unseen(self, tap: Tap, scope: Scope) -> int:
        if not scope.in_step:
            return tap.unseen
        return tap.unseen_in_step if tap.origin.step == self.clock.index else 0

    def _passed(self, tap: Tap, key: tuple[str, int], scope: Scope) -> bool:
        """Whether the model is past this point, for all that is known."""
        kind, index = key
        if index < tap.entered and (kind == INPUTS or index not in tap.active):
            return True
        if tap.unseen and self._unseen(tap, scope):
            return True
        guard = tap.origin.guard and self._guard(tap, scope)
        return guard is not None and guard[1] not in guard[0].active

    def _is_ahead(self, tap: Tap, key: tuple[str, int], scope: Scope) -> bool:
        """Whether the model stands at a point where the turn of the body that runs now has not come."""
        point = tap.points.get(key)
        return point is not None and point.turn < scope.order

    def _guard(self, tap: Tap, scope: Scope) -> tuple[Tap, int] | None:
        """The call around that was running when the tap was made, if it is of the scope and none was seen here since:
        some may have been missed in it."""
        is_of_scope = not scope.in_step or tap.origin.step == self.clock.index
        return tap.origin.guard if is_of_scope and not tap.entered else None

    def _too_late(self, path: object, what: str) -> str:
        return (
            f"{path} was {what} too late: the model stands {self._where()}, past it. Ask in the order in which the "
            "model computes, or for a later call with .calls[i]"
        )

    def _where(self) -> str:
        at = self._stands
        if isinstance(at, Point):
            kind, index = at.key
            at = f"at {Asked(at.tap.target, 'output' if kind == OUTPUT else 'input', index)}"
        return f"{at} in step {self.clock.index}" if self.clock.index >= 0 else at

    def _check_thread(self, path: object) -> None:
        if get_ident() != self.thread:
            raise WrongThreadError(
                f"{path}: a run belongs to the thread that opened it. Open one run in each thread, or hand values over"
            )
        if self.coroutine is not None and self.coroutine.is_running:
            raise DiffsightError(
                f"{path} was asked for by a hook or a callback that the model itself runs: it cannot wait for itself"
            )

    def _touch(self, asked: Asked) -> None:
        """Keeps in mind what an edit asks for."""
        if self.scope.edit is not None:
            self.scope.edit.edit.touches[asked.of_all] = None

    def _check_leads(self, path: str) -> None:
        """Whether what runs now is the body that opened the run."""
        if current() is None:
            return
        scope = self.scope
        if scope.edit is not None:
            raise InputError(f"{path}: an edit goes along with its run. It can read and assign, and cannot run it")
        if scope is not self._scope:
            raise InputError(
                f"{path}: a function of run.each goes along with the run. It can read and assign, and cannot run it: "
                "ask when run.each has returned"
            )

    def _check_open(self, path: object) -> None:
        self._check_thread(path)
        self.start_edits()
        if self.outcome is not None:
            loop = " (a loop over run.steps runs the model to its end)" if self.clock.index > 0 else ""
            raise RunClosedError(
                f"{path} was asked for too late: {self.outcome}{loop}. Ask while the run is open, and bind what comes "
                "to a name; what is assigned can be written ahead"
            )

    # ---- moving the model

    def _find(self, tap: Tap, first: int, asked: Asked, scope: Scope) -> Point:
        """The point that is asked for, counted from call `first` on, of those that hold its rows; runs the model up to
        it.

        Which those are is known when they begin: the model is run to the next that may be it, and looked at there."""
        index, point = -1, None
        while (found := find_call(tap, first, asked, asked)) != index:
            index = found
            # Where no call so far was it, and a step goes by without it, the model is not run to its end for it.
            in_vain = not asked.call and first < index == tap.entered
            if not in_vain:
                point = self._point(tap, (asked.kind, index), asked, scope)
                continue
            try:
                with scope.within(self.clock.index):
                    point = self._point(tap, (asked.kind, index), asked, scope)
            except OutOfOrderError:
                raise NeverReachedError(f"{asked} was asked for, but {asked.rows.missing}") from None
        return point

    def _point(self, tap: Tap, key: tuple[str, int], asked: Asked, scope: Scope) -> Point:
        """A point, from before or as soon as the model comes there. What one edit has read counts as passed for all
        others: each keeps its own order."""
        point = tap.points.get(key)
        if not self.edits:
            return point or self._advance_to(tap, key, asked, scope)
        if point is None or (scope.order not in point.read_by and point is not self.parked):
            point = self._advance_to(tap, key, asked, scope)
        point.read_by += (scope.order,)
        return point

    def _advance_to(self, tap: Tap, key: tuple[str, int], asked: Asked, scope: Scope) -> Point:
        """Lets the model run on until it parks at the point."""
        if self._passed(tap, key, scope) and not self._is_ahead(tap, key, scope):
            raise OutOfOrderError(self._too_late(asked, "asked for"))
        waits = [(tap, key)]
        guard = tap.origin.guard and self._guard(tap, scope)
        if guard is not None:
            waits.append((guard[0], (OUTPUT, guard[1])))
        in_step = scope.in_step
        for other, other_key in waits:
            other.awaited.setdefault(other_key, []).append(in_step)
        point = None
        try:
            while self.outcome is None and not (in_step and self.clock.index > scope.step):
                point = self._move(scope, waits)
                if point is not None and (point.tap, point.key) in waits:
                    break
                point = None
        finally:
            for other, other_key in waits:
                waiting = other.awaited[other_key]
                waiting.remove(in_step)
                if not waiting:
                    del other.awaited[other_key]
        if point is not None and point.tap is tap and not (tap.unseen and self._unseen(tap, scope)):
            return point
        if point is not None:
            until, error = f"{point.tap.target.path} returned", OutOfOrderError
        elif self.outcome is not None:
            until, error = "the model ended" if self.has_result else self.outcome, NeverReachedError
        else:
            until, error = f"step {scope.step} ended", OutOfOrderError
        raise error(
            f"{asked} was asked for, but {until} without coming to it. Either the model had passed it already, or it "
            "does not use it there"
        )

    def _move(self, scope: Scope, waits: list[tuple[Tap, tuple[str, int]]]) -> Point | None:
        """Lets the model run on until it parks at a point (given), at a step, or ends. The body that opened the run
        does that; others sleep until the model is at one of those they wait for."""
        return self._resume() if scope is self._scope else self._beside().wait(waits)

    def _resume(self, call: Call | None = None) -> Point | Call | None:
        """Lets the model run on until it parks at a point (given), at a step (None), or ends (None); or makes `call`
        first (given when it is made). The other bodies have their turn before the one that opened the run."""
        if self.edits and self.start_edits() and self.outcome is not None:  # an edit has stopped the run
            return None
        if not self.taps:  # nothing was read or assigned: the bare call, without a coroutine or a cost
            self.load()
            return self._end_with(self._call_plainly())
        if self.coroutine is None:
            self.coroutine = Coroutine(self.function, self, self.state)
            self.coroutine.random = None if self.seed is None else seeded_random_state(self.seed)
        while True:
            self.parked = None
            try:
                value = self.coroutine.resume(call)
            except BaseException as error:
                self._fail(error)
                raise
            if self.coroutine.dead:
                return self._end_with(self.coroutine.result)
            if isinstance(value, Call):
                self.parked, turns, goes_on = self._calls.pop()
                if value.asker is None:
                    return value
                value.asker.go()
            else:
                self.parked, edit, self._turn = value, self._turn, None
                self._stands = value or self._stands
                goes_on = edit is not None
                turns = [edit] if goes_on else [*self.edits, *self.bodies]
            call = self._take_turns(turns, goes_on) if turns else None
            if self.outcome is not None:
                return None
            if call is None and not goes_on:
                return self.parked

    def _take_turns(self, turns: list[Body], goes_on: bool = False) -> Call | None:
        """Wakes one body after the other; gives the call that one of them asks for, before the next has its turn.
        `goes_on` says whether the model goes on when all have had it, without the body that opened the run."""
        while turns:
            body = turns[0]
            if not body.dead and body.call is None:
                body.wake()
            if body.call is not None:
                call, body.call = body.call, None
                self._calls.append((self.parked, turns, goes_on))
                return call
            turns.pop(0)
        return None

    def _fail(self, error: BaseException) -> None:
        """The model has ended with an error."""
        self._end(f"its model failed with {type(error).__name__}")
        if self.misshapen and isinstance(error, (RuntimeError, ValueError, IndexError)):
            told = "\n".join(self.misshapen)
            raise AssignmentError(f"{told}\nWith that the model failed: {error}") from error

    def _end_with(self, result: Any) -> None:
        """The model has ended."""
        self.result, self.has_result = result, True
        self.unreached += [a for tap in self.taps.values() if tap.pending or tap.skips for a in tap.waiting()]
        self._end(ENDED)
        for body in self.bodies:
            if not body.dead:
                body.wake()

    def add_mode(self, mode: Any) -> None:
        """From now on the model runs in one of PyTorch's function modes."""
        self.modes.append(mode)
        holder = self if self.coroutine is None else self.coroutine
        holder.state = holder.state._replace(modes=(mode, *holder.state.modes), is_plain=False)

    def _call_plainly(self) -> Any:
        random = None if self.seed is None else random_state()
        if random is not None:
            torch.manual_seed(self.seed)
        try:
            if self.state.now() is self.state:  # as a rule: then there is nothing to exchange
                return self.function()
            changes = self.state.inference != torch.is_inference_mode_enabled()
            with torch.inference_mode(self.state.inference) if changes else nullcontext(), self.state.on():
                return self.function()
        except BaseException as error:
            self._fail(error)
            raise
        finally:
            if random is not None:
                set_random_state(random)

    def _end(self, outcome: str) -> None:
        self.taps.remove()  # first: where that is interrupted the run is still to be closed
        self.outcome = outcome
        self.parked = self.coroutine = None
        self._stands = outcome  # and no value is held
        self._calls.clear()
        self.clock.call = self._turn = None
        if self.watch is not None:
            self.watch.ended()
        edits, self.edits = self.edits, []
        if edits and get_ident() == self.thread:
            with ExitStack() as ends:  # each is ended, whatever the others raise
                for edit in reversed(edits):
                    ends.callback(edit.end, outcome in (ENDED, STOPPED))

    # ---- from the model's side

    def before_call(self, tap: Tap, args: tuple, kwargs: dict) -> None:
        """A tapped call begins; perhaps a step does."""
        if self.clock.begins(tap, args, kwargs):
            self.unreached += self.taps.begin_step()
            beside = [*self.edits, *self.bodies]
            if self._scope.stop_at_steps or (beside and any(body.scope.stop_at_steps for body in beside)):
                self._stands = f"before {tap.target.path or 'the forward pass'}"
                self.coroutine.park(None)
        if self.watch is not None:
            self.watch.called(tap, args, kwargs)

    def after_call(self, tap: Tap, output: Any) -> None:
        """A tapped call has ended."""
        self.clock.note_end(tap)
        if self.watch is not None:
            self.watch.returned(tap, output)

    def park_for(self, edit: "EditBody", point: Point) -> None:
        """Hands a point to an edit whose turn it is, until the model is resumed."""
        self._turn = edit
        self.coroutine.park(point)


def _check_value(asked: Asked, value: Any) -> None:
    if asked.part == "inputs" and not (
        isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], tuple) and isinstance(value[1], dict)
    ):
        raise AssignmentError(f"{asked} takes (args, kwargs), a tuple and a dictionary, not {type(value).__name__}")
    if asked.part == "output" and value is None:
        raise AssignmentError(f"{asked} cannot be None: PyTorch's hooks take None for 'unchanged'")


def _caller() -> str:
    """The line of the user's code that called into the engine, as `file:line`."""
    frame = sys._getframe(1)
    while frame.f_back is not None and (frame.f_globals.get("__package__") or "").split(".")[0] == "diffsight":
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"
