"""`tracer.iter[...]` and `tracer.all()`: the steps of a run, for a loop or for a repeated block.

A run of one pass has one step. Each turn of the loop then stands for one call of each module, as in nnsight: in turn 1,
`layer.output` is the output of the layer's second call. So it is by any other name of the value, `layers_output[3]`
too, and `layer.calls[1]` is the call after that.
"""

from collections.abc import Callable, Iterable, Iterator
from itertools import count

from diffsight.compat.repeated_blocks import OWN_STEPS, BlockOfInvokes, Loop, StepsBlock
from diffsight.compat.tracer_flow import TracerFlow, Turn
from diffsight.engine.innermost_run import current_edit
from diffsight.errors import InputError, warn_user
from diffsight.steps import Steps

WRITE_A_LOOP = "Write a loop: `for step in tracer.iter[:]:`"


class Iterations(Loop):
    """Turns of a loop, chosen by number. Iterating yields the numbers.

    Args:
        turns: Returns the numbers of the turns in a slice, as the model reaches them.
        chosen: A slice, a number or several numbers.
    """

    _instead = WRITE_A_LOOP
    _block_class = StepsBlock

    def __init__(
        self, turns: Callable[[slice], Iterator[int]], chosen: slice | int | Iterable[int] = slice(None)
    ) -> None:
        self._turns, self._chosen = turns, chosen

    def __getitem__(self, chosen: slice | int | Iterable[int]) -> "Iterations":
        bounds = [chosen.start, chosen.stop] if isinstance(chosen, slice) else [chosen]
        if any(isinstance(bound, int) and bound < 0 for bound in bounds):
            raise InputError(f"tracer.iter cannot count from the end: {chosen!r} is negative, and steps begin at 0")
        return Iterations(self._turns, chosen)

    def __iter__(self) -> Iterator[int]:
        chosen = [self._chosen] if isinstance(self._chosen, int) else self._chosen
        if isinstance(chosen, slice):
            yield from self._turns(chosen)
        else:
            wanted = set(chosen)
            yield from (turn for turn in self._turns(slice(None, max(wanted) + 1)) if turn in wanted)


class IterationsOfInvokes(Iterations):
    """Turns for a block around invokes, where each invoke has steps of its own.

    Args:
        open_steps: Returns the steps of the invoke that is open.
        chosen: As for `Iterations`.
    """

    _block_class = BlockOfInvokes

    def __init__(self, open_steps: Callable[[], Iterations], chosen: slice | int | Iterable[int] = slice(None)) -> None:
        super().__init__(_refuse, chosen)
        self._open_steps = open_steps

    def __getitem__(self, chosen: slice | int | Iterable[int]) -> "IterationsOfInvokes":
        return IterationsOfInvokes(self._open_steps, super().__getitem__(chosen)._chosen)

    def _take(self, block: BlockOfInvokes) -> None:
        block.run(lambda: self._open_steps()[self._chosen])


def _refuse(chosen: slice) -> Iterator[int]:
    raise InputError(OWN_STEPS)


def steps_in(steps: Steps, flow: TracerFlow, chosen: slice) -> Iterator[int]:
    """Count the steps of a run that generates. Warn if the block has collected tokens of the streamer to the last step,
    since nnsight has one more turn for the last token.

    Raises:
        InputError: The body has run the model to its end before the last step.
    """
    for step in steps if chosen == slice(None) else steps[chosen]:
        yield step.index
        following = step.index + (chosen.step or 1)
        is_wanted = chosen.stop is None or following < chosen.stop
        if flow.has_result and is_wanted and following <= flow.clock.index:
            raise InputError(
                f"the block has run the model to its end at step {step.index}, so step {following} is past: read the "
                "result, or model.generator.output, after the steps"
            )
    if chosen.stop is None and flow.is_streamed:
        warn_user(
            "model.generator.streamer.output is what a step begins with, so a loop over the steps leaves out the last "
            "token: it is at the end of tracer.result"
        )


_MOST_IDLE_TURNS = 10_000  # in a row: in `for step in tracer.iter[:]: if step == 0: ...`, later turns do nothing


def calls_in(flow: TracerFlow, chosen: slice) -> Iterator[int]:
    """Count the calls of modules in a run of one pass. If the slice has no end, stop when the model has ended or the
    loop no longer asks for anything."""
    edit, idle = current_edit(), 0
    before, start, step = flow.turns.get(edit), chosen.start or 0, chosen.step or 1
    try:
        for number in count(start, step) if chosen.stop is None else range(start, chosen.stop, step):
            if chosen.stop is None and (flow.outcome is not None or idle == _MOST_IDLE_TURNS):
                return
            turn = flow.turns[edit] = Turn(number)
            yield number
            idle = 0 if turn.asks else idle + 1
    finally:
        flow.turns[edit] = before
