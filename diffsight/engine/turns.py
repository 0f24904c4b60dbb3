"""Turns: the bodies that read and change values in a run, and whose turn it is where the model parks.

A run has one body that opened it, the user's own code. Beside it there may be others, each in a coroutine of its own:
the edits of the model, and the functions of `run.each`. Where the model parks, edits have their turn first, in the
order in which they were made; then the functions; then the body that opened the run.
"""

from collections.abc import Callable
from typing import Any, Protocol

from diffsight.engine.coroutine import Coroutine, InnerCall
from diffsight.engine.order import Scope
from diffsight.engine.points import Point, PointKey
from diffsight.engine.step_clock import Clock
from diffsight.engine.tapped_call import Tap
from diffsight.engine.torch_state import TorchState


class Course(Protocol):
    """The run, as its bodies see it; see `diffsight.engine.run_to_point.Flow`."""

    clock: Clock
    parked: Point | None
    outcome: str | None
    has_result: bool

    def close(self, outcome: str) -> None: ...


class Body(Coroutine):
    """A body beside the one that opened the run: a function of `run.each`, or an edit. It is woken when the model
    reaches the point that it waits for."""

    def __init__(self, function: Callable[[], Any], flow: Course, state: TorchState) -> None:
        super().__init__(function, None, state)
        self.flow = flow
        self.scope = Scope()
        self.waits: list[tuple[Tap, PointKey]] = []
        self.point: Point | None = None  # the point it was woken at; None if its wait is over
        self.call: InnerCall | None = None  # the call it wants the model's coroutine to make
        self.asks = False  # whether it sleeps until that call is made

    def wait(self, *waits: tuple[Tap, PointKey] | None) -> Point | None:
        """Sleep until the model is at one of the points, or the wait is over. Called from the body."""
        self.waits, self.point = [wait for wait in waits if wait is not None], None
        self.park(None)
        return self.point

    def ask(self, call: InnerCall) -> None:
        """Sleep until the call is made. Called from the body."""
        self.call, self.asks = call, True
        self.park(None)
        self.asks = False

    def wake(self, state: TorchState | None = None) -> None:
        """Run the body if it has not started, or if the model has reached its point or can no longer reach it.

        `state` is the current state, if it is known."""
        if self._stack is None:
            self.go(state)
            return
        if self.asks:
            return
        flow, parked = self.flow, self.flow.parked
        here = parked is not None and (parked.tap, parked.key) in self.waits
        late = (self.scope.in_step or not self.waits) and flow.clock.index > self.scope.step
        late = late or (not self.waits and flow.clock.is_over)
        if here or late or flow.outcome is not None:
            self.point = parked if here else None
            self.go(state)

    def go(self, state: TorchState | None = None) -> Any:
        """Start the body, or let it continue. Return the value that it parks with."""
        return self.resume(body=state)


class EditInRun(Protocol):
    """The body of an edit, as the run sees it; see `diffsight.edits.EditBody`."""

    scope: Scope
    met: bool  # whether the model has reached anything that the edit asked for
    touches: dict[str, None]  # the paths of the points that the edit reads and assigns
    attached: dict[tuple[int, str], Any]  # the modules that the edit has attached so far, by owner and name
    view: Any  # the edit's own view of the run, once it has started

    def waits_for(self, tap: Tap, key: PointKey) -> bool: ...

    def end(self, continues: bool) -> None: ...


class Bodies:
    """The bodies of a run beside the one that opened it, and whose turn it is."""

    def __init__(self) -> None:
        self.edits: list[EditInRun] = []
        self.edits_begun = False
        self.functions: list[Body] = []  # the bodies of `run.each`
        self.turn: EditInRun | None = None  # whose turn it is at the point where the model parks
        self.calls: list[tuple[Point | None, list[Body], bool]] = []  # calls in progress: where they were asked for

    def take_turn(self) -> tuple[list[Body], bool]:
        """Return the bodies whose turn it is where the model has parked, and whether the model then continues without
        the body that opened the run."""
        edit, self.turn = self.turn, None
        return ([*self.edits, *self.functions], False) if edit is None else ([edit], True)

    def wake(self, turns: list[Body], parked: Point | None, continues: bool = False) -> InnerCall | None:
        """Wake one body after the other; return the call that one of them asks for before the next has its turn."""
        state = turns[0].state.now() if turns else None  # each body leaves the state as it was
        while turns:
            body = turns[0]
            if not body.dead and body.call is None:
                body.wake(state)
            if body.call is not None:
                call, body.call = body.call, None
                self.calls.append((parked, turns, continues))
                return call
            turns.pop(0)
        return None

    def begin_call(self, parked: Point | None) -> None:
        """The body that opened the run asks for a call, while the model stands at `parked`."""
        self.calls.append((parked, [], False))

    def end_call(self) -> tuple[Point | None, list[Body], bool]:
        """A call has been made. Return where it was asked for, the bodies still to be woken there, and whether the
        model then continues."""
        return self.calls.pop()
