"""How a run ends: with its model, with an error, or before the model has ended. Nothing of it is left on the model.

flow.close("the run was stopped")
flow.outcome                        # how it ended, in words

A run ends well if its model returns. An error of the model ends it, and is raised in the body at the line that was
waiting. `close` ends it where the model stands: after `run.stop()`, after an error in the body, or when the run is
dropped.
"""

from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from dis import opname
from types import CodeType
from typing import Any, Protocol

from diffsight.engine import order
from diffsight.engine.batch_dimensions import KnownDimensions
from diffsight.engine.coroutine import Coroutine
from diffsight.engine.gradients_at_point import GradientsAtPoint
from diffsight.engine.late_edits import LateEdits
from diffsight.engine.model_tree import Tree
from diffsight.engine.part_containers import FormerContainer, PartContainer
from diffsight.engine.points import LAST, Assignment, Point
from diffsight.engine.step_clock import Clock
from diffsight.engine.tapped_call import Tap
from diffsight.engine.taps import Taps
from diffsight.engine.threads import THIS_THREAD, calls_in_threads
from diffsight.engine.turns import Bodies
from diffsight.engine.users_line import UsersLine, set_line
from diffsight.errors import AssignmentError

ENDED, STOPPED = "the run has ended", "the run was stopped"  # the outcomes of runs that end well


class Observer(Protocol):
    """Watches the calls of a run's components, for example to learn what their batches hold. Observers change
    nothing. Calls that begin or end a step are observed too."""

    def called(self, tap: Tap, args: tuple, kwargs: dict) -> None:
        """A tapped call begins, with these arguments."""

    def returned(self, tap: Tap, output: Any) -> None:
        """A tapped call has ended; the model continues with `output`."""

    def ended(self) -> None:
        """The run has ended."""


class RunEnd:
    """The state of a run, and the ways in which the run ends. `Flow` moves the model until then.

    Args:
        tree: The tree of the model.
    """

    __slots__ = (  # with more than 30 attributes in its dictionary, a run would be slower to open
        "__weakref__",
        "_called",
        "_gradients",
        "_held_containers",
        "_home",
        "_in_threads",
        "_late_edits",
        "_stands",
        "bodies",
        "clock",
        "coroutine",
        "end_checks",
        "has_result",
        "is_cleared",
        "known_dimensions",
        "misshapen",
        "observer",
        "outcome",
        "parked",
        "refused",
        "result",
        "taps",
        "thread",
        "tree",
        "unreached",
    )

    def __init__(self, tree: Tree) -> None:
        self.tree = tree
        self.clock: Clock = tree.clock()
        self.taps = Taps(self, [*tree.components(), *tree.attached.targets.values()], tree.module_places)
        self.thread = THIS_THREAD.number
        self.coroutine: Coroutine | None = None
        self.parked: Point | None = None
        self.bodies = Bodies()
        self.observer: Observer | None = None
        self.unreached: list[Assignment] = []
        self.refused: list[Exception] = []  # errors at points, such as a refused value: the model may catch them
        self.end_checks: Sequence[Callable[[], Exception | None]] = ()  # called at the end; return what was wrong
        self.misshapen: dict[str, UsersLine] = {}  # assigned values of another shape or type than the model's own
        self.outcome: str | None = None  # how the run ended, in words; None while it is open
        self.has_result = False
        self.result: Any = None
        self._in_threads: Collection[tuple[int, str]] = ()  # calls that the model has made in threads of its own
        self._late_edits = LateEdits()
        self.known_dimensions: KnownDimensions | None = None  # once a row was asked for
        self._gradients: GradientsAtPoint | None = None  # if the model computes some in a run without gradients
        self._held_containers: Sequence[PartContainer | FormerContainer] = ()  # read where the model stands
        self._called: Sequence[Point] = ()  # the points of calls by the bodies since the model last moved
        self.is_cleared = False  # whether all traces of the run have been removed
        self._stands: Point | str = "before its first call"  # where the model is, or last was
        self._home: Any = None  # the stack of the code that opened the run

    def note_block(self, code: CodeType) -> None:
        """Note the code that has the block of the run's `with` statement in it."""
        self._late_edits.block = code

    def close(self, outcome: str) -> None:
        """End the run where it stands: unwind the model, remove every hook. May be called again."""
        if self.is_cleared:
            return
        try:
            self._close(outcome)
        except BaseException:  # an interrupt may come between any two lines
            self._close(outcome)
            raise

    def _close(self, outcome: str) -> None:
        if self.is_cleared:
            return
        try:
            self.taps.remove()  # calls that the model still makes while it is unwound pass untouched
            if self.coroutine is not None and THIS_THREAD.number == self.thread:
                self.coroutine.unwind()
        except Exception:
            pass  # raised while unwinding; only what led to the end matters
        finally:
            self._end(self.outcome or outcome)

    def _fail(self, error: BaseException) -> None:
        """End the run after an error of the model, or after an interrupt while switching to or from it."""
        failed = f"its model failed with {type(error).__name__}"
        refused, self.refused = self.refused, []
        if self.coroutine is not None and self.coroutine.has_begun:
            self.close(failed)
        self._end(failed)
        if refused and isinstance(error, Exception) and not any(error is one for one in refused):
            raise refused[0] from error  # the model has answered it with an error of its own
        if self.misshapen and isinstance(error, (RuntimeError, ValueError, IndexError)):
            assigned = "\n".join(self.misshapen)
            if _is_raised_by_code(error):
                error.add_note(f"before that, the run had assigned values of another shape or type:\n{assigned}")
                return
            refusal = AssignmentError(f"{assigned}\nWith that value the model failed: {error}")
            set_line(refusal, next(iter(self.misshapen.values())))
            raise refusal from error

    def _end_with(self, result: Any) -> None:
        """End the run, since the model has returned `result`."""
        self.result, self.has_result = result, True
        self.taps.note_learned()
        if calls_in_threads:
            taps = [*self.taps.values()]
            self._in_threads = {tap.target.key for tap in taps if self.taps.is_called_in_thread(tap.target)}
            kept = (tap.target for tap in taps if tap.keepers and tap.target.key in self._in_threads)
            self.refused += map(order.kept_in_thread, kept)
        self.unreached += [a for tap in self.taps.values() if tap.pending or tap.skips for a in tap.waiting()]
        self._end(ENDED)
        for body in self.bodies.functions:
            if not body.dead:
                body.wake()

    def _end(self, outcome: str) -> None:
        self.taps.remove()
        self._put_back()
        self.outcome = outcome
        self.parked = self.coroutine = None
        self._stands = outcome  # so that no value is held
        self.clock.call = None
        self._home = None  # greenlet frees the stack of a thread that ends, and crashes if only this refers to it
        self._late_edits.watched.clear()
        self._called = self._held_containers = ()
        self._gradients = None
        if self.end_checks:
            checks, self.end_checks = self.end_checks, ()
            self.refused += filter(None, [check() for check in checks])
        edits, self.bodies.edits = self.bodies.edits, []
        self.bodies.turn = None
        self.bodies.calls.clear()
        if self.observer is not None:
            self.observer.ended()
        self.is_cleared = True  # if an interrupt comes before this line, the run is closed again
        if edits and THIS_THREAD.number == self.thread:
            with ExitStack() as ends:  # every edit is ended, even if others raise
                for edit in reversed(edits):
                    ends.callback(edit.end, outcome in (ENDED, STOPPED))

    def _put_back(self) -> None:
        """Restore what the run has changed apart from its taps on the model."""

    def check_refused(self) -> None:
        """Raise the error of an assignment that the model's own `except` has swallowed, or of a recorded value that was
        lost."""
        if self.refused:
            raise self.refused.pop()

    def check_assignments(self) -> None:
        """Raise what `check_refused` raises, or NeverReachedError if there are assignments that the model did not
        reach."""
        self.check_refused()
        missed, self.unreached = [a for a in self.unreached if a.order == LAST], []
        if missed:
            raise order.never_reached(missed, self.clock.ending)


def _is_raised_by_code(error: BaseException) -> bool:
    """Whether a `raise` statement has raised an error. If PyTorch cannot compute something, it is raised within it."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None or trace.tb_frame.f_globals.get("__name__", "").partition(".")[0] == "torch":
        return False
    return opname[trace.tb_frame.f_code.co_code[trace.tb_lasti]] == "RAISE_VARARGS"
