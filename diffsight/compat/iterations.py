"""`tracer.iter[...]` and `tracer.all()`: the steps of a run, for a loop or for a block that is repeated."""

from collections.abc import Iterable, Iterator

from diffsight.compat.repeated_blocks import Loop
from diffsight.steps import Steps

WRITE_A_LOOP = "Write a loop: `for step in tracer.iter[:]:`"


class Iterations(Loop):
    """Steps of a run, chosen by number. Each turn of the loop gets the number of its step.

    Args:
        steps: The steps of the run.
        chosen: A slice, a number or several numbers.
    """

    _instead = WRITE_A_LOOP

    def __init__(self, steps: Steps, chosen: slice | int | Iterable[int] = slice(None)) -> None:
        self._steps, self._chosen = steps, chosen

    def __getitem__(self, chosen: slice | int | Iterable[int]) -> "Iterations":
        return Iterations(self._steps, chosen)

    def __iter__(self) -> Iterator[int]:
        chosen = [self._chosen] if isinstance(self._chosen, int) else self._chosen
        if isinstance(chosen, slice):
            steps = self._steps if chosen == slice(None) else self._steps[chosen]
            yield from (step.index for step in steps)
        else:
            wanted = set(chosen)
            yield from (step.index for step in self._steps[: max(wanted) + 1] if step.index in wanted)
