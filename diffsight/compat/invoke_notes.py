"""What the block of an invoke reads and changes, and the random numbers that its pass draws.

An invoke without input runs the inputs of the invokes before it again. So it can return what they saw only if they have
changed nothing, and if its own pass draws the same random numbers.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from weakref import ref

import torch
from torch.utils._pytree import tree_leaves

from diffsight.engine.torch_state import random_state, set_random_state, unseen
from diffsight.errors import InputError
from diffsight.extending import Asked

RandomState = list[torch.Tensor]
Versions = list[tuple[torch.Tensor, int]]  # how often each tensor had been changed in place


@dataclass
class InvokeNotes:
    """The notes of one invoke.

    Attributes:
        is_of_all: Whether it is an invoke without input, which has the inputs of all earlier invokes.
        generators: The random generators among its arguments, with their states before it.
        changed: Where the block has changed a value, if anywhere.
        reads_unseen: Whether it has read values whose changes in place cannot be detected.
        read: The tensors that it has read since the model has stopped for it, and their versions.
        held: Those that it has read before, weakly.
        began, ended: The random state in which its pass began, and in which it ended.
        body_draws: Whether its block has drawn random numbers, between those of its pass.
    """

    is_of_all: bool
    generators: list[tuple[torch.Generator, torch.Tensor]] = field(default_factory=list)
    changed: str = ""
    reads_unseen: bool = False
    read: Versions = field(default_factory=list)
    held: list[tuple[ref, int]] = field(default_factory=list)
    began: RandomState | None = None
    ended: RandomState | None = None
    body_draws: bool = False
    _waits: RandomState | None = None  # the random state in which the model waits for the block

    def note_read(self, value: Any) -> None:
        """Note a value that the block reads, to find out later whether it was changed in place."""
        self.read += _versions(value)
        self.reads_unseen |= any(isinstance(leaf, torch.Tensor) and leaf.is_inference() for leaf in tree_leaves(value))

    def noting_changes(self, function: Callable[[Any, int, Any], None]) -> Callable[[Any, int, Any], None]:
        """Return a function that follows a point, which also notes whether it has changed the value in place."""

        def call(tap: Any, index: int, value: Any) -> None:
            before = unseen(_versions, value)
            function(tap, index, value)
            if unseen(_have_changed, before):
                self.changed = tap.target.path

        return call

    def note_change(self, asked: Asked) -> None:
        """Note a value that the block assigns, or a module that it skips.

        Raises InputError if it can only read."""
        self.changed = asked.target.path
        self.check_read_only()

    def find_changes(self) -> None:
        """Note whether values that the block has read were changed in place since."""
        held = [(tensor, version) for weak, version in self.held if (tensor := weak()) is not None]
        if _have_changed([*self.read, *held]):
            self.changed = self.changed or "a value in place"
        self.held = [(ref(tensor), version) for tensor, version in [*self.read, *held]]
        self.read = []

    def end_block(self) -> None:
        """The block has ended, and its pass too. What is changed from now on is no part of it."""
        self.find_changes()
        self.held = []

    def check_read_only(self) -> None:
        """Raise InputError if an invoke without input has changed something."""
        if self.is_of_all and self.changed:
            raise InputError(
                f"an invoke without input can only be read, but this one changes {self.changed}: the invokes before it "
                "have ended. Trace all inputs at once to change all of them"
            )

    # ---- random numbers

    @property
    def has_drawn(self) -> bool:
        """Whether random numbers were drawn during its pass."""
        return self.began is not None and _differ(self.began, self.ended)

    def noting_draws(self, function: Callable[[], Any]) -> Callable[[], Any]:
        """Return the function of its pass, which also notes the random states."""

        def call() -> Any:
            self.began = random_state()
            try:
                return function()
            finally:
                self.ended = random_state()

        return call

    def model_goes_on(self, draws_from_same: bool) -> None:
        """The model continues. `draws_from_same` says whether it draws random numbers from the state of the block."""
        unseen(self.find_changes)
        if draws_from_same:
            self.body_draws |= self._waits is not None and _differ(self._waits, random_state())

    def model_waits(self, draws_from_same: bool) -> None:
        """The model has stopped for the block. What the model has changed in place is no change of the block."""
        self.held = unseen(lambda: [(weak, tensor._version) for weak, _ in self.held if (tensor := weak()) is not None])
        if draws_from_same:
            self._waits = random_state()


def check_draws(invokes: list[InvokeNotes]) -> None:
    """Raise InputError if a pass with the inputs of these invokes would draw other random numbers than they did."""
    if any(_differ([now.get_state()], [before]) for notes in invokes for now, before in notes.generators):
        raise InputError(f"{_AGAIN} has drawn from the generator that you passed, {_OTHERS}: pass seed=, or {_INSTEAD}")
    if len(invokes) > 1 and any(notes.has_drawn for notes in invokes):
        raise InputError(
            f"{_AGAIN} has drawn random numbers (sampling, dropout, noise), {_OTHERS}: pass do_sample=False to a "
            f"language model, or seed= to a diffusion model, or {_INSTEAD}"
        )
    if any(notes.has_drawn and notes.body_draws for notes in invokes):
        raise InputError(
            f"{_AGAIN} has drawn random numbers in its block as well as in the model, {_OTHERS}: pass a "
            "torch.Generator to what draws in the block"
        )


def check_draws_on_server(invokes: list[InvokeNotes], arguments: Mapping[str, Any], seeds_images: bool) -> None:
    """Raise InputError if invokes of a generating run on a server, whose random numbers are not seen here, may draw
    others in a new pass.

    Args:
        invokes: The notes of the invokes.
        arguments: The arguments of the run.
        seeds_images: Whether a seed makes each image independent of the others in its batch.
    """
    is_seeded = arguments.get("seed") is not None and (seeds_images or len(invokes) == 1)
    if arguments.get("do_sample") is not False and not is_seeded:
        raise InputError(
            f"invoke() without an input runs all inputs again on the server, and would draw other random numbers "
            f"if any are drawn: pass do_sample=False to a language model, or seed= to a diffusion model, or {_INSTEAD}"
        )


def starting_in(state: RandomState, function: Callable[[], Any]) -> Callable[[], Any]:
    """Return a function that sets a random state first. It is for a run with a random state of its own."""

    def call() -> Any:
        set_random_state(state)
        return function()

    return call


def _versions(value: Any) -> Versions:
    tensors = [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]
    return [(tensor, tensor._version) for tensor in tensors if not tensor.is_inference()]


def _have_changed(versions: Versions) -> bool:
    return any(tensor._version != version for tensor, version in versions)


def _differ(before: RandomState, after: RandomState) -> bool:
    return len(before) != len(after) or any(not torch.equal(*pair) for pair in zip(before, after))


_AGAIN = "invoke() without an input runs all inputs again, but an invoke before it"
_OTHERS = "and the new pass would draw others"
_INSTEAD = "read what you need in that invoke, or trace all inputs at once and use run.rows"
