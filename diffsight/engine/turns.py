"""Bodies: the code that reads and changes a run, each at its own place in it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from diffsight.engine.coroutine import Call, Coroutine, TorchState
from diffsight.engine.taps import LAST, Point, Tap

if TYPE_CHECKING:
    from diffsight.edits import EditBody
    from diffsight.engine.flow import Flow


class Scope:
    """Where a body is: in the whole run, or in a step. `edit` is the body, if it is an edit, and `order` says when its
    turn is: edits come first."""

    def __init__(self, edit: "EditBody | None" = None, order: float = LAST) -> None:
        self.edit, self.order = edit, order
        self.in_step = False
        self.step = -1  # the last step the body has entered
        self.stop_at_steps = False

    @contextmanager
    def within(self, step: int) -> Iterator[None]:
        """For a while the body waits for nothing beyond this step."""
        before = dict(vars(self))
        self.in_step, self.step, self.stop_at_steps = True, step, True
        try:
            yield
        finally:
            vars(self).update(before)


class Body(Coroutine):
    """A body beside the one that opened the run: the function of a row, or an edit. It is woken when the model comes to
    what it waits for."""

    def __init__(self, function: Callable[[], Any], flow: "Flow", state: TorchState) -> None:
        super().__init__(function, None, state)
        self.flow = flow
        self.scope = Scope()
        self.waits: list[tuple[Tap, tuple[str, int]]] = []
        self.point: Point | None = None  # what it was woken for; None where its wait is over
        self.call: Call | None = None  # what it wants the model's coroutine to call
        self.asks = False  # whether it sleeps until that is made

    def wait(self, waits: list[tuple[Tap, tuple[str, int]]]) -> Point | None:
        """From the body: sleeps until the model is at one of the points, or its wait is over."""
        self.waits, self.point = waits, None
        self.park(None)
        return self.point

    def ask(self, call: Call) -> None:
        """From the body: sleeps until the call is made."""
        self.call, self.asks = call, True
        self.park(None)
        self.asks = False

    def wake(self) -> None:
        """Runs the body, if it has not begun, or what it waits for is there or will not come."""
        if not self.has_begun:
            self.go()
            return
        if self.asks:
            return
        flow, parked = self.flow, self.flow.parked
        here = parked is not None and (parked.tap, parked.key) in self.waits
        late = (self.scope.in_step or not self.waits) and flow.clock.index > self.scope.step
        if here or late or flow.outcome is not None:
            self.point = parked if here else None
            self.go()

    def go(self) -> None:
        """Starts the body, or lets it go on."""
        self.resume()
