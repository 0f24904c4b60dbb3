"""Which denoising steps are visited, as the user chooses them, and when a run has nothing left to visit."""

from collections.abc import Sequence
from typing import Any

from diffsight.lenses.denoising.call_checks import Steps, choose_steps
from diffsight.lenses.visits.named_points import NamedPoint
from diffsight.lenses.visits.visiting import Visit, is_in_steps


def is_chosen(visit: Visit, steps: Steps) -> bool:
    """Return whether a visit is in one of the chosen steps of a pipeline. None means all."""
    return visit.step is None or steps is None or visit.step.index in _chosen(visit.run, steps)


def is_done(model: Any, points: Sequence[NamedPoint], steps: Steps, run: Any, step: int) -> bool:
    """Return whether a pipeline that has come to `step` passes the points in no chosen step any more."""
    if not any(is_in_steps(model, point) for point in points):
        return True
    return steps is not None and step > _chosen(run, steps)[-1]


def _chosen(run: Any, steps: Steps) -> tuple[int, ...]:
    return choose_steps(steps, len(run.scheduler.timesteps))
