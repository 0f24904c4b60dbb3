"""Draws images that differ in one intervention, as rows of one call of a pipeline, or of as few calls as possible.

    reading = record_encoding(model, prompt, arguments)         # the text encoders run here, once
    drawing = Drawing(model, reading, "text_encoder", prompt, seed, arguments)
    drawing.draw(change, [0, 4, 8])                             # three rows, three outputs

Every row has the same prompt and seed. `change(run, items)` edits the run: row i in the way that `items[i]` says. The
other text encoders are skipped, and return for every row what they returned when they were read.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any, TypeVar

import torch
from diffusers.modular_pipelines import PipelineState
from PIL import Image
from torch.utils._pytree import tree_leaves, tree_map_only

from diffsight.errors import DiffsightError, InputError
from diffsight.pipelines.diffusion.encoder_calls import EncoderCall, EncoderRecord
from diffsight.pipelines.diffusion.encoding import EncodingRecord
from diffsight.pipelines.diffusion.model import DiffusionModel
from diffsight.pipelines.diffusion.run import DiffusionRun, progress_bar

_OUTPUTS = ("images", "image", "frames", "audios")
_OUTPUTS_OF_BLOCKS = ("images", "videos", "frames", "audios")
Item = TypeVar("Item")
Change = Callable[[DiffusionRun, Sequence[Item]], None]


class LensWarning(UserWarning):
    """A lens cannot work as described, and falls back to something slower."""


class NoImagesError(InputError):
    """A pipeline returns neither images nor videos nor sounds."""


class BatchMismatchError(DiffsightError):
    """A pipeline does not treat a list of prompts like the single prompt that was read."""


@dataclass(frozen=True)
class Drawing:
    """What all rows have in common.

    Args:
        model: The pipeline.
        reading: What its text encoders did for `prompt`.
        encoder: The name of the text encoder that the rows change.
        prompt: The prompt.
        seed: The seed of every row.
        arguments: Further arguments of the pipeline.
        noun: What the rows are, for messages and the progress bar.
        progress: Whether to show a progress bar.
    """

    model: DiffusionModel
    reading: EncodingRecord
    encoder: str
    prompt: str
    seed: int
    arguments: Mapping[str, Any]
    noun: str = "layers"
    progress: bool = True

    def draw(self, change: Change, items: Sequence[Item], batch_size: int | None = None) -> tuple[Any, ...]:
        """Return the pipeline's output for each of `items`.

        If the pipeline cannot draw several rows in one call, each row gets a call of its own, with a LensWarning.

        Args:
            change: Edits a run whose rows belong to the given items.
            items: One for each row.
            batch_size: The number of rows in a call. Default: all.
        """
        size, outputs = batch_size or max(1, len(items)), []
        for start in range(0, len(items), size):
            outputs.extend(self._draw_batch(change, items[start : start + size]))
        return tuple(outputs)

    def _draw_batch(self, change: Change, items: Sequence[Item]) -> Sequence[Any]:
        desc = f"{len(items)} {self.noun}" if len(items) > 1 else f"{self.noun.removesuffix('s')} {items[0]}"
        try:
            with progress_bar(self.model.pipeline, desc=desc, disable=not self.progress):
                return self._call(change, items)
        except torch.OutOfMemoryError as error:
            fewer = max(1, len(items) // 2)
            error.add_note(f"one call was drawing {len(items)} {self.noun}: use fewer rows, such as batch_size={fewer}")
            raise
        except Exception as error:
            if len(items) == 1 or isinstance(error, NoImagesError):
                raise
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            name = type(self.model.pipeline).__name__
            message = f"{name} cannot draw {len(items)} {self.noun} in one call, so each has its own: {reason}"
            warnings.warn(message, LensWarning, stacklevel=6)
        return [self._draw_batch(change, [item])[0] for item in items]

    def _call(self, change: Change, items: Sequence[Item]) -> Sequence[Any]:
        """Call the pipeline once, with a row for each item.

        Raises:
            BatchMismatchError: The pipeline does not encode a list of prompts as one batch.
            NoImagesError: It returns something other than images, videos or sounds.
        """
        edited = self.model.edit(lambda run: change(run, items))
        for name, other in self.reading.encoders.items():
            if name != self.encoder and all(call.output is not None for call in other.calls):
                edited = edited.edit(lambda run, other=other: _replay(run, other, len(items)))
        arguments, seed = {"prompt": self.prompt, **self.arguments}, self.seed
        if len(items) > 1:
            arguments, seed = for_each_row(arguments, len(items)), [seed] * len(items)
        result = edited.generate(**arguments, seed=seed).result
        name = next(iter(result), None) if isinstance(result, Mapping) else None
        if name is not None and name not in _OUTPUTS:
            raise NoImagesError(f"{type(self.model.pipeline).__name__} returns {name}: there is no image to look at")
        outputs = _outputs_in(result.values) if isinstance(result, PipelineState) else result[0]
        if len(outputs) != len(items):
            raise BatchMismatchError(f"it returned {len(outputs)} images for {len(items)} prompts")
        return outputs


def _outputs_in(state: Mapping[str, Any]) -> Sequence[Any]:
    """Return the images, videos or sounds in the final state of a modular pipeline."""
    name = next((name for name in _OUTPUTS_OF_BLOCKS if state.get(name) is not None), None)
    if name is None:
        raise NoImagesError("the modular pipeline has made no images to look at")
    return state[name]


def rows_of_call(call: EncoderCall, items: Sequence[Item]) -> Iterator[tuple[int, int, Item]]:
    """Yield the prompt's rows in a batch for all `items`: the row in the batch, the row that was read, the item."""
    for row in call.rows:
        for i, item in enumerate(items):
            yield row * len(items) + i, row, item


def calls_in(run: DiffusionRun, reading: EncoderRecord, times: int) -> Iterator[tuple[int, EncoderCall]]:
    """Yield the encoder's calls in a run, as they happen: the number of each, and the call that was read.

    The run has `times` rows for each row that was read. The iteration ends with the run.
    """
    for number in count():
        yield number, _same_call(reading, number, run[reading.words].calls[number].input, times)


def _same_call(reading: EncoderRecord, number: int, ids: torch.Tensor | None, times: int) -> EncoderCall:
    """Return the call that was read and that this call repeats, with `times` rows for each of its rows."""
    if number < len(reading.calls) and ids is not None:
        known = repeated(reading.calls[number].ids, len(reading.calls[number].ids), times)
        if known.shape == ids.shape and torch.equal(known, ids.to(known)):
            return reading.calls[number]
    raise BatchMismatchError(
        f"{reading.name} receives different tokens for {times} prompts at once than for one prompt alone"
    )


def repeated(tensor: torch.Tensor, rows: int, times: int) -> torch.Tensor:
    """Repeat each of a tensor's `rows`. A tensor without rows is the same for all, and stays."""
    return tensor.repeat_interleave(times, 0) if tensor.ndim and len(tensor) == rows else tensor


def with_state(returned: Any, state: torch.Tensor) -> Any:
    """Return what a layer returned, with another hidden state in it."""
    return (state, *returned[1:]) if isinstance(returned, tuple) else state


def _replay(run: DiffusionRun, reading: EncoderRecord, times: int) -> None:
    """Skip all calls of an encoder: it returns for every row what it returned when it was read."""
    part = run[reading.name]
    for number in count():
        ids = next((leaf for leaf in tree_leaves(part.calls[number].inputs) if _are_ids(leaf)), None)
        call = _same_call(reading, number, ids, times)
        value = tree_map_only(torch.Tensor, partial(repeated, rows=len(call.ids), times=times), call.output)
        part.calls[number].skip(value)
        part.calls[number].output = value


def _are_ids(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.ndim == 2 and not leaf.is_floating_point()


def for_each_row(arguments: Mapping[str, Any], times: int) -> dict[str, Any]:
    """Return the arguments of one prompt as those of as many prompts as `times`."""
    return {name: _repeat_argument(name, value, times) for name, value in arguments.items()}


def _repeat_argument(name: str, value: Any, times: int) -> Any:
    if isinstance(value, Image.Image) or ("prompt" in name and isinstance(value, str)):
        return [value] * times
    if "prompt" in name and isinstance(value, list) and len(value) == 1:
        return value * times
    if isinstance(value, torch.Tensor) and value.ndim > 1 and len(value) == 1:
        return repeated(value, 1, times)
    return value
