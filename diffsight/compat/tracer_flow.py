"""What every request of a tracer's block passes, whichever name it is written with: `layer.output`, `layer.calls[0]`,
`layers_output[3]`, `heads_output[3]`, `vae.decode.output`.

Here a turn of a loop over `tracer.iter` in a run of one pass becomes a call, and an invoke learns what it reads and
changes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from diffsight.compat.block_stopped import BlockStopped
from diffsight.compat.invoke_notes import InvokeNotes, RandomState, starting_in
from diffsight.engine.coroutine import InnerCall
from diffsight.engine.innermost_run import current_edit
from diffsight.engine.points import Point
from diffsight.engine.run_to_point import Flow
from diffsight.errors import OutOfOrderError, warn_user
from diffsight.extending import Asked, Tap


@dataclass
class Turn:
    """A turn of a loop over `tracer.iter` in a run of one pass. It stands for one call of each module.

    Attributes:
        number: The number of the turn, and of the calls.
        asks: Whether the turn has asked for anything.
    """

    number: int
    asks: bool = False


class TracerFlow(Flow):
    """The flow of a tracer's run.

    Attributes:
        turns: The current turn of the block (None), and of each edit that is in such a loop.
        notes: The notes of an invoke.
        is_streamed: Whether the block has asked for tokens of the streamer.
    """

    turns: dict[Any, Turn | None]
    notes: InvokeNotes | None
    is_streamed = False

    def begin_notes(self, notes: InvokeNotes) -> None:
        """Note what an invoke does."""
        self.notes, self.function = notes, notes.noting_draws(self.function)

    def begin_in(self, state: RandomState) -> None:
        """Run in a random state of its own, which begins as `state`."""
        self.seed, self.function = 0, starting_in(state, self.function)

    def fetch(self, asked: Asked) -> Any:
        try:
            value = super().fetch(self._in_turn(asked))
        except OutOfOrderError as error:
            self._end_turns(error)
            raise
        if self._is_noted():
            self.notes.note_read(value)
        return value

    def assign(self, asked: Asked, value: Any, where: str | None = None) -> None:
        super().assign(self._changing(asked), value, where)

    def skip(self, asked: Asked, value: Any, where: str | None = None) -> None:
        super().skip(self._changing(asked), value, where)

    def keep(self, asked: Asked, function: Callable[[Tap, int, Any], None]) -> None:
        super().keep(asked, self.notes.noting_changes(function) if self._is_noted() else function)

    def _resume(self, call: InnerCall | None = None) -> Point | InnerCall | None:
        notes, draws_from_same = self.notes, self.seed is None
        if notes is None:
            return super()._resume(call)
        notes.model_goes_on(draws_from_same)
        try:
            return super()._resume(call)
        finally:
            notes.model_waits(draws_from_same)

    def _changing(self, asked: Asked) -> Asked:
        """Return a point that is about to be changed. In a turn, run the model to it, so that the loop cannot run ahead
        of it."""
        if self._is_noted():
            self.notes.note_change(asked)
        if self._turn() is not None:
            self.fetch(Asked(asked.target, "inputs" if asked.part == "skip" else asked.part, asked.call))
        return self._in_turn(asked)

    def _in_turn(self, asked: Asked) -> Asked:
        """Return a point as it is meant in the current turn, from whose own call on calls are counted."""
        turn = self._turn()
        if turn is None:
            return asked
        turn.asks = True
        return Asked(asked.target, asked.part, asked.call + turn.number, asked.selection) if turn.number else asked

    def _end_turns(self, error: Exception) -> None:
        """Leave the block with a warning if a loop asks for a call that the model does not make, as in nnsight."""
        turn = self._turn()
        if turn is not None and self.outcome is not None:
            warn_user(
                f"turn {turn.number} of tracer.iter was never reached: {error}. What was read before stays valid; the "
                "rest of the block was left out"
            )
            raise BlockStopped from error

    def _turn(self) -> Turn | None:
        return self.turns.get(current_edit()) if self.turns else None

    def _is_noted(self) -> bool:
        """Whether what is asked for now is noted. Edits apply in every pass, so what they do is left out."""
        if self.notes is None:
            return False
        edit = current_edit()
        return edit is None or edit.flow is not self


def to_tracer_flow(flow: Flow) -> None:
    """Turn the flow of a local run, a scan or a run on a server into that of a tracer."""
    flow.__class__ = _flow_class(type(flow))
    flow.turns, flow.notes = {}, None


@cache
def _flow_class(cls: type[Flow]) -> type[Flow]:
    return type(cls.__name__, (TracerFlow, cls), {})
