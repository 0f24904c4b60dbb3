"""What every request of a tracer's block passes, whichever name it is written with: `layer.output`, `layer.calls[0]`,
`layers_output[3]`, `heads_output[3]`, `vae.decode.output`.

Here a turn of a loop over `tracer.iter` in a run of one pass becomes a call, and an invoke learns what it reads and
changes.
"""

from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from diffsight.compat.block_stopped import BlockStopped
from diffsight.engine.innermost_run import current_edit
from diffsight.engine.run_to_point import Flow
from diffsight.errors import InputError, OutOfOrderError, warn_user
from diffsight.extending import Asked


@dataclass
class Turn:
    """A turn of a loop over `tracer.iter` in a run of one pass. It stands for one call of each module.

    Attributes:
        number: The number of the turn, and of the calls.
        asks: Whether the turn has asked for anything.
    """

    number: int
    asks: bool = False


@dataclass
class InvokeNotes:
    """What the block of an invoke has read and changed.

    Attributes:
        is_of_all: Whether it is an invoke without input, which has the inputs of all earlier invokes.
        changed: Where the block has changed a value, if anywhere.
        reads_unseen: Whether it has read values whose changes in place cannot be detected.
        read: The tensors that it has read, and their versions.
    """

    is_of_all: bool
    changed: str = ""
    reads_unseen: bool = False
    read: list[tuple[torch.Tensor, int]] = field(default_factory=list)

    def note_read(self, value: Any) -> None:
        """Note a value that the block reads, to find out later whether it was changed in place."""
        tensors = [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]
        self.read += [(tensor, tensor._version) for tensor in tensors if not tensor.is_inference()]
        self.reads_unseen |= any(tensor.is_inference() for tensor in tensors)

    def note_change(self, asked: Asked) -> None:
        """Note a value that the block assigns, or a module that it skips.

        Raises InputError if it can only read."""
        self.changed = asked.target.path
        self.check_read_only()

    def find_changes(self) -> None:
        """Note whether values that the block has read were changed in place."""
        if any(tensor._version != version for tensor, version in self.read):
            self.changed = self.changed or "a value in place"
        self.read = []

    def check_read_only(self) -> None:
        """Raise InputError if an invoke without input has changed something."""
        if self.is_of_all and self.changed:
            raise InputError(
                f"an invoke without input can only be read, but this one changes {self.changed}: the invokes before it "
                "have ended. Trace all inputs at once to change all of them"
            )


class TracerFlow(Flow):
    """The flow of a tracer's run.

    Attributes:
        turns: The current turn of the block (None), and of each edit that is in such a loop.
        notes: What the block has read and changed, if it is the block of an invoke.
    """

    turns: dict[Any, Turn | None]
    notes: InvokeNotes | None

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
