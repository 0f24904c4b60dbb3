"""Which denoising steps the user chose to visit, and when a run has nothing left to visit.

visited = VisitedSteps(slice(0, 5))
visited.include(visit)                          # whether a visit is in one of these steps
visited.are_over(model, points, run, step=7)    # whether a run has passed all of them
"""

from collections.abc import Sequence
from typing import Any

from diffsight.lenses.denoising.call_checks import Steps, choose_steps
from diffsight.lenses.visits.named_points import NamedPoint
from diffsight.lenses.visits.visiting import Visit, is_in_steps


class VisitedSteps:
    """The chosen steps. They are computed once for each total number of steps.

    Args:
        steps: What the user passed. None means all.
    """

    def __init__(self, steps: Steps) -> None:
        self._steps = steps
        self._known: dict[int, tuple[int, ...]] = {}

    def include(self, visit: Visit) -> bool:
        """Return whether a visit is in one of the steps, or at a point that is not passed in steps."""
        return visit.step is None or self._steps is None or visit.step.index in self._of(visit.run)

    def are_over(self, model: Any, points: Sequence[NamedPoint], run: Any, step: int) -> bool:
        """Return whether a pipeline that has reached `step` has passed the points in all chosen steps."""
        if not any(is_in_steps(model, point) for point in points):
            return True
        return self._steps is not None and step > self._of(run)[-1]

    def _of(self, run: Any) -> tuple[int, ...]:
        count = len(run.scheduler.timesteps)
        if count not in self._known:
            self._known[count] = choose_steps(self._steps, count)
        return self._known[count]
