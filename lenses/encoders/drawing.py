"""Draws images that differ in one intervention, as rows of one call of a pipeline, or of as few calls as possible.

    reading = record_encoding(model, prompt, arguments)         # the text encoders run here, once
    drawing = Drawing(model, reading, "text_encoder", [prompt], [seed], arguments)
    drawing.draw(change, [0, 4, 8])                             # three rows, three outputs

`change(run, rows)` edits the run: `rows.items[i]` says how row i is changed. All rows have the same prompt and seed, or
each has one of several, whose readings `encoders/joining.py` joins. The other text encoders are skipped: every row gets
the output that was read.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any, Generic, TypeVar

import torch
from PIL import Image
from torch.utils._pytree import tree_leaves, tree_map_only

from diffsight.errors import DiffsightError, warn_user
from diffsight.lenses.results.outputs import NoImagesError, outputs_in
from diffsight.pipelines.diffusion.encoder_calls import EncoderCall, EncoderRecord
from diffsight.pipelines.diffusion.encoding import EncodingRecord
from diffsight.pipelines.diffusion.model import DiffusionModel
from diffsight.pipelines.diffusion.run import DiffusionRun, progress_bar

Item = TypeVar("Item")


class LensWarning(UserWarning):
    """A lens cannot work as described, and falls back to something slower."""


class BatchMismatchError(DiffsightError):
    """A pipeline does not treat a list of prompts like the single prompt that was read."""


@dataclass(frozen=True)
class Rows(Generic[Item]):
    """The rows of one call of a pipeline.

    Attributes:
        items: The item that sets each row apart, such as a layer.
        prompts: The number of the prompt of each row.
        count: The number of prompts that were read.
    """

    items: Sequence[Item]
    prompts: Sequence[int]
    count: int

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, chosen: slice) -> "Rows[Item]":
        return Rows(self.items[chosen], self.prompts[chosen], self.count)

    def spread(self, tensor: torch.Tensor, read: int) -> torch.Tensor:
        """Return the rows of the call from a tensor that was read with `read` rows.

        A tensor without rows is the same for all, and is returned unchanged."""
        if not tensor.ndim or len(tensor) != read:
            return tensor
        rows = [block * self.count + prompt for block in range(read // self.count) for prompt in self.prompts]
        return tensor[rows]

    def of_call(self, call: EncoderCall) -> Iterator[tuple[int, int, Item]]:
        """Yield, for each row with a prompt in an encoder's call, the row there, the row read, and the item."""
        for block in dict.fromkeys(row // self.count for row in call.rows):
            for i, (item, prompt) in enumerate(zip(self.items, self.prompts)):
                yield block * len(self) + i, block * self.count + prompt, item


Change = Callable[[DiffusionRun, Rows], None]


@dataclass(frozen=True)
class Drawing:
    """The settings that all rows share.

    Args:
        model: The pipeline.
        reading: The record of its text encoders for the prompts.
        encoder: The name of the text encoder that the rows change.
        prompts: The prompts.
        seeds: The seed of each prompt's rows.
        arguments: Further arguments of the pipeline.
        noun: A plural noun for the rows, for messages and the progress bar.
        progress: Whether to show a progress bar.
    """

    model: DiffusionModel
    reading: EncodingRecord
    encoder: str
    prompts: Sequence[str]
    seeds: Sequence[int]
    arguments: Mapping[str, Any]
    noun: str = "layers"
    progress: bool = True

    def draw(
        self,
        change: Change,
        items: Sequence[Item],
        batch_size: int | None = None,
        prompts: Sequence[int] | None = None,
    ) -> tuple[Any, ...]:
        """Return the pipeline's output for each of `items`.

        If the pipeline cannot draw several rows in one call, each row gets a call of its own, with a LensWarning.

        Args:
            change: Edits a run with the given rows.
            items: One for each row.
            batch_size: The number of rows in a call. Default: all.
            prompts: The number of the prompt of each row. Default: the first.
        """
        rows = Rows(items, [0] * len(items) if prompts is None else prompts, len(self.prompts))
        size, outputs = batch_size or max(1, len(items)), []
        for start in range(0, len(items), size):
            outputs.extend(self._draw_batch(change, rows[start : start + size]))
        return tuple(outputs)

    def _draw_batch(self, change: Change, rows: Rows) -> Sequence[Any]:
        count = len(rows)
        desc = f"{count} {self.noun}" if count > 1 else f"{self.noun.removesuffix('s')} {rows.items[0]}"
        try:
            with progress_bar(self.model.pipeline, desc=desc, disable=not self.progress):
                return self._call(change, rows)
        except torch.OutOfMemoryError as error:
            fewer = max(1, count // 2)
            error.add_note(f"one call was drawing {count} {self.noun}: use fewer rows, such as batch_size={fewer}")
            raise
        except Exception as error:
            if count == 1 or isinstance(error, NoImagesError):
                raise
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            name = type(self.model.pipeline).__name__
            message = f"{name} cannot draw {count} {self.noun} in one call, so each has its own: {reason}"
            warn_user(message, LensWarning)
        return [self._draw_batch(change, rows[i : i + 1])[0] for i in range(count)]

    def _call(self, change: Change, rows: Rows) -> Sequence[Any]:
        """Call the pipeline once, with these rows.

        Raises:
            BatchMismatchError: The pipeline does not encode a list of prompts as one batch.
            NoImagesError: The pipeline returns something other than images, videos or sounds.
        """
        edited = self.model.edit(lambda run: change(run, rows))
        for name, other in self.reading.encoders.items():
            if name != self.encoder and all(call.output is not None for call in other.calls):
                edited = edited.edit(lambda run, other=other: _replay(run, other, rows))
        prompts, seeds = ([of[number] for number in rows.prompts] for of in (self.prompts, self.seeds))
        if len(rows) > 1:
            given = {"prompt": prompts, "seed": seeds, **for_each_row(self.arguments, len(rows))}
        else:
            given = {"prompt": prompts[0], "seed": seeds[0], **self.arguments}
        outputs = outputs_in(edited.generate(**given).result, self.model.pipeline)
        if len(outputs) != len(rows):
            raise BatchMismatchError(f"it returned {len(outputs)} images for {len(rows)} prompts")
        return outputs


def calls_in(run: DiffusionRun, reading: EncoderRecord, rows: Rows) -> Iterator[tuple[int, EncoderCall]]:
    """Yield the encoder's calls in a run with these rows, as they happen: the number of the call, and the call that was
    read. The iteration ends with the run."""
    for number in count():
        yield number, _same_call(reading, number, run[reading.words].calls[number].input, rows)


def _same_call(reading: EncoderRecord, number: int, ids: torch.Tensor | None, rows: Rows) -> EncoderCall:
    """Return the call that was read and that call `number` repeats with these rows."""
    if number < len(reading.calls) and ids is not None:
        known = rows.spread(reading.calls[number].ids, len(reading.calls[number].ids))
        if known.shape == ids.shape and torch.equal(known, ids.to(known)):
            return reading.calls[number]
    raise BatchMismatchError(
        f"{reading.name} receives different tokens for {len(rows)} prompts at once than for one prompt alone"
    )


def with_state(returned: Any, state: torch.Tensor) -> Any:
    """Return a layer's output with another hidden state in it."""
    return (state, *returned[1:]) if isinstance(returned, tuple) else state


def _replay(run: DiffusionRun, reading: EncoderRecord, rows: Rows) -> None:
    """Skip all calls of an encoder, so that every row gets the output that was read."""
    part = run[reading.name]
    for number in count():
        ids = next((leaf for leaf in tree_leaves(part.calls[number].inputs) if _are_ids(leaf)), None)
        call = _same_call(reading, number, ids, rows)
        value = tree_map_only(torch.Tensor, partial(rows.spread, read=len(call.ids)), call.output)
        part.calls[number].skip(value)
        part.calls[number].output = value


def _are_ids(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.ndim == 2 and not leaf.is_floating_point()


def for_each_row(arguments: Mapping[str, Any], times: int) -> dict[str, Any]:
    """Return the arguments for one prompt, repeated for as many prompts as `times`."""
    return {name: _repeat_argument(name, value, times) for name, value in arguments.items()}


def _repeat_argument(name: str, value: Any, times: int) -> Any:
    if isinstance(value, Image.Image) or ("prompt" in name and isinstance(value, str)):
        return [value] * times
    if "prompt" in name and isinstance(value, list) and len(value) == 1:
        return value * times
    if isinstance(value, torch.Tensor) and value.ndim > 1 and len(value) == 1:
        return value.repeat_interleave(times, 0)
    return value
