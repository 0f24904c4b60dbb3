"""The order of a run: what the model has passed, what lies ahead, and what errors say about it.

Asking for a value too late raises an error at that line; it never returns the value of a later call. The call counts
show whether it is too late; see `taps`. If they cannot show it, the point counts as passed.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from diffsight.engine.hooks import FORWARD
from diffsight.engine.points import INPUTS, LAST, LEFT_OUT, Asked, Assignment, Point, PointKey
from diffsight.engine.tapped_call import Tap
from diffsight.engine.target import Target, in_run
from diffsight.engine.users_line import UsersLine, set_line
from diffsight.errors import NeverReachedError, OutOfOrderError, RunClosedError


class Scope:
    """Where a body is: in the whole run, or in a step. `order` determines its turn; edits come first."""

    def __init__(self, order: float = LAST) -> None:
        self.order = order
        self.in_step = False
        self.step = -1  # the last step that the body has entered
        self.stop_at_steps = False

    @contextmanager
    def within(self, step: int) -> Iterator[None]:
        """Within the block, let the body wait for nothing beyond this step."""
        before = dict(vars(self))
        self.in_step, self.step, self.stop_at_steps = True, step, True
        try:
            yield
        finally:
            vars(self).update(before)


# ---- where things stand; `step` is the number of the step that the model is in


def has_passed(tap: Tap, key: PointKey, scope: Scope, step: int) -> bool:
    """Whether the model is past a point, as far as is known."""
    kind, index = key
    if index < tap.entered and (kind == INPUTS or index not in tap.active):
        return True
    if tap.unseen and has_unseen_calls(tap, scope, step):
        return True
    guard = tap.origin.guard and guard_of(tap, scope, step)
    return guard is not None and guard[1] not in guard[0].active


def has_unseen_calls(tap: Tap, scope: Scope, step: int) -> bool:
    """Whether there may have been calls in the scope before counting began."""
    if not scope.in_step:
        return tap.unseen > 0
    return tap.origin.step == step and tap.unseen_in_step > 0


def guard_of(tap: Tap, scope: Scope, step: int) -> tuple[Tap, int] | None:
    """Return the enclosing call that was already running when the tap was made, if it is in scope and no call has been
    seen since. Earlier calls within it may have been missed."""
    is_in_scope = not scope.in_step or tap.origin.step == step
    return tap.origin.guard if is_in_scope and not tap.entered else None


def is_ahead(tap: Tap, key: PointKey, scope: Scope) -> bool:
    """Whether the model is waiting at this point, and it is not yet the turn of the scope's body."""
    point = tap.points.get(key)
    return point is not None and point.turn < scope.order


# ---- what errors say


def position(stands: Point | str, step: int | None) -> str:
    """Return where the model stands, in words; `step` is None if it has no steps."""
    if isinstance(stands, Point):
        stands = f"at {stands.path}"
    return stands if step is None else f"{stands} in step {step}"


def too_late(asked: Asked, what: str, where: str) -> OutOfOrderError:
    """Return the error for a point that the model has passed; `what` is "asked for" or "assigned"."""
    module = asked.target
    if module.name == FORWARD and not module.is_registered:
        return OutOfOrderError(
            f"{asked} was {what} too late: the model is {where}, and may be past that point. The module is no child of "
            "the one around it, so its calls are counted only from the moment when a run first asks for it. Ask for it "
            "before the model calls the module around it, or keep it in an nn.ModuleList or nn.ModuleDict"
        )
    return OutOfOrderError(
        f"{asked} was {what} too late: the model is {where}, past that point. Ask for values in the order in which the "
        "model computes them, or ask for a later call with .calls[i]"
    )


def let_go(asked: Asked, where: str) -> OutOfOrderError:
    """Return the error for a value that was read earlier and not kept."""
    return OutOfOrderError(
        f"{asked} was read before, but its value was not kept: the model is {where}, past that point, and a run keeps "
        "only values that your code still refers to. Bind the value to a name where you first read it, and use the "
        f"name: value = {in_run(str(asked))}"
    )


def edited_too_late(point: Point, where: str) -> OutOfOrderError:
    """Return the error for a value that was changed in place after the model had passed it."""
    return OutOfOrderError(
        f"{_as_read(point)} was changed in place too late: the model is {where}, past that point. Change it while the "
        "model stands there, or change a copy: .clone()"
    )


def edited_beside_copy(point: Point) -> OutOfOrderError:
    """Return the error for a value that was changed in place after a part of it was assigned."""
    return OutOfOrderError(
        f"{_as_read(point)} was changed in place after a part of it had been assigned: the model continues with a "
        "copy that holds the assigned part. Change the value first, or read it again after the assignment"
    )


def edited_without_gradients(point: Point) -> OutOfOrderError:
    """Return the error for a value that was changed in place where gradients are off, though the model has them on."""
    return OutOfOrderError(f"{_as_read(point)} {LEFT_OUT}")


def _as_read(point: Point) -> str:
    """Return the path of a point, and the line that read it if that is known, in words."""
    return f"{point.path}, read at {point.read_line}," if point.read_line else point.path


def recorded_and_changed(path: str, where: UsersLine) -> OutOfOrderError:
    """Return the error for a recorded tensor of the model's own that was changed in place later. `where` is the line
    that recorded it."""
    error = OutOfOrderError(
        f"{path}, recorded at {where} with detach=False, was changed in place after the model had passed that point, "
        f"so its value is lost. Record it with detach=True, or read it there and keep a copy: {in_run(path)}.clone()"
    )
    set_line(error, where)
    return error


def changed_by_its_call(asked: Asked) -> OutOfOrderError:
    """Return the error for an input that is read at the output of the call that has changed it in place."""
    return OutOfOrderError(
        f"{asked} was changed in place by the call whose output the model has just produced, so its earlier "
        "value is lost. Read it before the output"
    )


def step_has_ended(asked: Asked, step: int) -> OutOfOrderError:
    """Return the error for a point of a step that the model has left."""
    return OutOfOrderError(f"{asked.whole} was asked for too late: step {step} has ended")


def step_after_the_last(path: str, step: int) -> OutOfOrderError:
    """Return the error for a step that begins after the loops over the steps have ended."""
    return OutOfOrderError(
        f"the loop over run.steps ended after step {step - 1}, which seemed to be the last one, but {path} began "
        "another one. Write run.steps[:n] with the number of steps"
    )


def run_has_ended(path: object, outcome: str, has_steps: bool) -> RunClosedError:
    """Return the error for a request after the end of a run."""
    loop = " (a loop over run.steps runs the model to its end)" if has_steps else ""
    return RunClosedError(
        f"{path} was asked for too late: {outcome}{loop}. Ask for values while the run is open, and bind them to "
        "names. Assignments can be written ahead of the model"
    )


def not_reached(asked: Asked, until: str, kind: type[OutOfOrderError], ending: str = "") -> OutOfOrderError:
    """Return the error for a wait that ended before the model reached the point. `ending` says how, if known."""
    return kind(
        f"{asked} was asked for, but {until} without reaching it{ending}. Either the model had already passed "
        f"that point, or {asked.target.if_missing or 'it does not call that module there'}"
    )


def call_failed(asked: Asked, failure: str) -> NeverReachedError:
    """Return the error for an output that does not exist, since the call raised an error that the model caught."""
    return NeverReachedError(
        f"{asked} was asked for, but that call raised an error, which the model caught: {failure}. If the model calls "
        "the module again, ask for that call with .calls[i]"
    )


def called_in_thread(asked: Asked, until: str, kind: type[OutOfOrderError], ending: str = "") -> OutOfOrderError:
    """Return the error for a point that a body waited for but that the model passes in another thread."""
    return kind(
        f"{asked} was asked for, but {until} without reaching it in the run's thread{ending}. The model calls the "
        "module in a thread of its own, where a run does not see it"
    )


def kept_in_thread(target: Target) -> OutOfOrderError:
    """Return the error for values to be recorded or followed that the model computes in another thread."""
    return OutOfOrderError(
        f"not all values of {target.path} were recorded or followed: the model calls it in a thread of its own, where "
        "a run does not see it"
    )


def never_reached(missed: Sequence[Assignment], ending: str) -> NeverReachedError:
    """Return the error for assignments that the model did not reach. `ending` says how it ended, if that is known."""
    failures = [f": the call raised {one.failure}" if one.failure else "" for one in missed]
    lines = "\n".join(f"  {assignment}{failure}" for assignment, failure in zip(missed, failures))
    ended = f", and ended{ending}" if ending else ""
    hint = (
        "Does the model call the module in this run (or in this step), and at least as often as `.calls[i]` asks? "
        "Calls in threads that the model starts are not seen"
    )
    if all(failures):
        hint = "If the model calls the module again, assign to that call with `.calls[i]`"
    error = NeverReachedError(
        f"these assignments were never reached:\n{lines}\nThe model ran without them{ended}. {hint}"
    )
    set_line(error, missed[0].where)
    return error
