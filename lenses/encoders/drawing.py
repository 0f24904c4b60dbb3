"""Pictures that differ in what happens inside: rows of one call of a pipeline, or of as few as can be.

    reading = read(model, prompt, arguments)                    # the encoders run here, once
    drawing = Drawing(model, reading, "text_encoder", prompt, seed, arguments)
    drawing.draw(change, [0, 4, 8])                             # three rows, three outputs

Each row is the prompt, drawn from the same seed, in a run that `change(run, items)` edits: row i as `items[i]` says.
Other encoders are left out of the call: they give every row what they gave when they were read.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any, TypeVar

import torch
from PIL import Image
from torch.utils._pytree import tree_leaves, tree_map_only

from diffsight.errors import DiffsightError, InputError
from diffsight.pipelines.diffusion.encoder_calls import EncoderCall, EncoderRecord
from diffsight.pipelines.diffusion.encoding import EncodingRecord
from diffsight.pipelines.diffusion.model import DiffusionModel
from diffsight.pipelines.diffusion.run import DiffusionRun, progress_bar

_LONG = 60  # letters: longer names are not listed
_MADE = ("images", "image", "frames", "audios")
Item = TypeVar("Item")
Change = Callable[[DiffusionRun, Sequence[Item]], None]


class LensWarning(UserWarning):
    """A lens goes another way than it says."""


class NoPicturesError(InputError):
    """A pipeline makes neither pictures nor videos nor sounds."""


class NotAlikeError(DiffsightError):
    """A pipeline encodes several prompts in another way than one."""


@dataclass(frozen=True)
class Drawing:
    """What the rows have in common. `encoder` names the text encoder that they change; `noun` says what they are."""

    model: DiffusionModel
    reading: EncodingRecord
    encoder: str
    prompt: str
    seed: int
    arguments: Mapping[str, Any]
    noun: str = "layers"
    progress: bool = True

    def draw(self, change: Change, items: Sequence[Item], batch_size: int | None = None) -> tuple[Any, ...]:
        """What the pipeline makes of each of `items`, in calls of `batch_size` rows; None is all in one. Where it
        cannot make several in one call, each has its own, and a LensWarning says so."""
        size, made = batch_size or max(1, len(items)), []
        for start in range(0, len(items), size):
            made.extend(self._draw(change, items[start : start + size]))
        return tuple(made)

    def _draw(self, change: Change, items: Sequence[Item]) -> Sequence[Any]:
        names = ", ".join(map(str, items))
        desc = f"{self.noun} {names}" if len(names) <= _LONG else f"{len(items)} {self.noun}"
        try:
            with progress_bar(self.model.pipeline, desc=desc, disable=not self.progress):
                return self._call(change, items)
        except torch.OutOfMemoryError as error:
            fewer = max(1, len(items) // 2)
            error.add_note(f"{len(items)} {self.noun} are drawn in one call: batch_size={fewer} draws fewer")
            raise
        except Exception as error:
            if len(items) == 1 or isinstance(error, NoPicturesError):
                raise
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            name = type(self.model.pipeline).__name__
            message = f"{name} cannot draw {len(items)} {self.noun} in one call, so each has its own: {reason}"
            warnings.warn(message, LensWarning, stacklevel=4)
        return [self._draw(change, [item])[0] for item in items]

    def _call(self, change: Change, items: Sequence[Item]) -> Sequence[Any]:
        """Raises NotAlikeError where the pipeline does not encode a list of prompts as one batch."""
        edited = self.model.edit(lambda run: change(run, items))
        for name, other in self.reading.encoders.items():
            if name != self.encoder and all(call.output is not None for call in other.calls):
                edited = edited.edit(lambda run, other=other: _repeat(run, other, len(items)))
        given, seed = {"prompt": self.prompt, **self.arguments}, self.seed
        if len(items) > 1:
            given, seed = _several(given, len(items)), [seed] * len(items)
        made = edited.generate(**given, seed=seed).result
        name = next(iter(made), None) if isinstance(made, Mapping) else None
        if name is not None and name not in _MADE:
            raise NoPicturesError(f"{type(self.model.pipeline).__name__} makes {name}: there is no picture to look at")
        made = made[0]
        if len(made) != len(items):
            raise NotAlikeError(f"it makes {len(made)} pictures of {len(items)} prompts")
        return made


def places(call: EncoderCall, items: Sequence[Item]) -> Iterator[tuple[int, int, Item]]:
    """Of each row of the prompt in a batch made for all `items`: its place, the row in the reading, and the item."""
    for row in call.rows:
        for i, item in enumerate(items):
            yield row * len(items) + i, row, item


def calls_in(run: DiffusionRun, reading: EncoderRecord, times: int) -> Iterator[tuple[int, EncoderCall]]:
    """The numbers of an encoder's calls in a run with `times` rows for each of those that were read, as the run comes
    to them, each with the call that it repeats. They end with the run."""
    for number in count():
        yield number, _same_call(reading, number, run[reading.words].calls[number].input, times)


def _same_call(reading: EncoderRecord, number: int, ids: torch.Tensor | None, times: int) -> EncoderCall:
    """The call that was read, of which this one, with `times` rows for each of its own, is a repetition."""
    if number < len(reading.calls) and ids is not None:
        known = repeated(reading.calls[number].ids, len(reading.calls[number].ids), times)
        if known.shape == ids.shape and torch.equal(known, ids.to(known)):
            return reading.calls[number]
    raise NotAlikeError(f"{reading.name} is given other tokens for {times} prompts than {times} times those of one")


def repeated(tensor: torch.Tensor, rows: int, times: int) -> torch.Tensor:
    """Each of a tensor's `rows` as often; a tensor that has no rows is the same for all."""
    return tensor.repeat_interleave(times, 0) if tensor.ndim and len(tensor) == rows else tensor


def with_state(returned: Any, state: torch.Tensor) -> Any:
    """What a layer returned, with another hidden state in it."""
    return (state, *returned[1:]) if isinstance(returned, tuple) else state


def _repeat(run: DiffusionRun, reading: EncoderRecord, times: int) -> None:
    """Leaves an encoder out of its calls: it gives every row what it gave."""
    part = run[reading.name]
    for number in count():
        ids = next((leaf for leaf in tree_leaves(part.calls[number].inputs) if _are_ids(leaf)), None)
        call = _same_call(reading, number, ids, times)
        value = tree_map_only(torch.Tensor, partial(repeated, rows=len(call.ids), times=times), call.output)
        part.calls[number].skip(value)
        part.calls[number].output = value


def _are_ids(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.ndim == 2 and not leaf.is_floating_point()


def _several(arguments: Mapping[str, Any], times: int) -> dict[str, Any]:
    """The arguments of a pipeline's call, for as many prompts as `times`: each its own."""
    return {name: _several_of(name, value, times) for name, value in arguments.items()}


def _several_of(name: str, value: Any, times: int) -> Any:
    if isinstance(value, Image.Image) or ("prompt" in name and isinstance(value, str)):
        return [value] * times
    if "prompt" in name and isinstance(value, list) and len(value) == 1:
        return value * times
    if isinstance(value, torch.Tensor) and value.ndim > 1 and len(value) == 1:
        return repeated(value, 1, times)
    return value
