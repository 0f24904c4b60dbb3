"""Prompts in batches, and the positions in them that a lens reads.

    for batch in open_batches(model, ["The cat", "The Eiffel Tower is in"], positions=-1, size=32):
        with batch.run as run:
            hidden = batch.pick(run.layers_output[5])       # (2, features): the last token of each prompt

All prompts and positions are checked before the first batch runs.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from diffsight.errors import InputError
from diffsight.lenses.tokens.choosing import check_count
from diffsight.pipelines.language.model import LanguageModel, LanguageRun
from diffsight.pipelines.numbers import as_integer, as_slice, unpacked
from diffsight.pipelines.vision_language.model import VisionLanguageRun

Positions = int | slice | Sequence[int] | Sequence[Sequence[int]] | torch.Tensor | str | None
IMAGE = "image"  # the positions of image tokens
_BY_PROMPT = ("images", "decoder_input_ids")


@dataclass(frozen=True, eq=False)
class Batch:
    """Some of the prompts: a run over them that has not started, and the chosen positions of their tokens.

    Attributes:
        model: The model.
        run: The run.
        start: The number of the first prompt.
        tokens: The tokens that the layers read, (rows, tokens). In an encoder-decoder model, the decoder's
            tokens.
        where: The chosen positions in the padded batch, (rows, positions).
        chosen: Which entries of `where` are valid, (rows, positions). Shorter prompts may have fewer positions.
        positions: The chosen positions in each prompt, counted from 0 and without padding, (rows, positions). -1
            means no position.
    """

    model: LanguageModel
    run: LanguageRun
    start: int
    tokens: torch.Tensor
    where: torch.Tensor
    chosen: torch.Tensor
    positions: torch.Tensor

    @property
    def indices(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The row and the token of each chosen position, both (chosen positions,)."""
        rows, columns = self.chosen.nonzero(as_tuple=True)
        return rows, self.where[rows, columns]

    def pick(self, values: torch.Tensor) -> torch.Tensor:
        """Return the values of a layer at the chosen positions, (chosen positions, ...).

        Raises:
            InputError: There is not one value for each token.
        """
        values = self.model.hidden_layout.tokens_first(values)
        if values.shape[:2] != self.tokens.shape:
            raise InputError(
                f"the shape {tuple(values.shape)} does not have one value for each of {tuple(self.tokens.shape)} "
                "tokens: choose another point of the layer"
            )
        return values[*(place.to(values.device) for place in self.indices)]

    def spread(self, values: torch.Tensor) -> torch.Tensor:
        """Return values of the chosen positions, (layers, chosen positions, ...), as (rows, layers, positions, ...).

        Where there is no position, the values are NaN, or -1 for integers."""
        rows, columns = self.chosen.nonzero(as_tuple=True)
        shape = (len(self.chosen), len(values), self.chosen.shape[1], *values.shape[2:])
        whole = torch.full(shape, torch.nan if values.is_floating_point() else -1, dtype=values.dtype)
        whole[rows, :, columns] = values.transpose(0, 1)
        return whole


def as_prompts(prompts: Any) -> list[Any]:
    """Return the prompts as a list of single prompts: strings, token ids, or chats.

    Raises:
        InputError: The list is empty.
    """
    if isinstance(prompts, torch.Tensor):
        return list(prompts) if prompts.ndim > 1 else [prompts]
    if isinstance(prompts, (str, Mapping)) or not isinstance(prompts, Iterable):
        return [prompts]
    prompts = list(prompts)
    if not prompts:
        raise InputError("there is no prompt: the list is empty")
    one = isinstance(prompts[0], Mapping) or as_integer(prompts[0]) is not None
    return [prompts] if one else prompts


def open_batches(
    model: LanguageModel,
    prompts: Any,
    positions: Positions,
    size: int,
    open_run: Callable[..., LanguageRun] | None = None,
    **inputs: Any,
) -> list[Batch]:
    """Open a run without gradients for each batch of prompts. None of them starts yet.

    Args:
        model: The model.
        prompts: The prompts.
        positions: Positions in each prompt: 0 is its first token, whatever padding comes before it, -1 its last. A list
            of lists has its own positions for each prompt. None means all, and "image" the image tokens. In an
            encoder-decoder model, they are positions of the decoder's tokens.
        size: The number of prompts in a batch.
        open_run: A function that opens a run, such as `model.generate`. Default: `model.trace`, one forward pass.
        inputs: Further inputs of the model. Images and the decoder's tokens may differ by prompt.

    Raises:
        InputError: A prompt or position is invalid.
    """
    prompts, size = as_prompts(prompts), check_count("batch_size", size)
    if open_run is None and model.takes_argument("use_cache"):
        inputs = {"use_cache": False, **inputs}  # a cache would only serve further tokens
    each = _positions_of_each(positions, len(prompts))
    batches = []
    with torch.no_grad():
        for start in range(0, len(prompts), size):
            some = prompts[start : start + size]
            own = {name: _of_batch(name, value, start, len(some), len(prompts)) for name, value in inputs.items()}
            run = (open_run or model.trace)(some[0] if len(some) == 1 else some, **own)
            batches.append(_batch(model, run, start, each[start : start + size]))
    return batches


def batch_of(model: LanguageModel, run: LanguageRun, positions: Positions) -> Batch:
    """Return a run as a batch with these positions."""
    return _batch(model, run, 0, _positions_of_each(positions, len(run.rows)))


def join(parts: list[torch.Tensor], dim: int) -> torch.Tensor:
    """Concatenate tensors whose lengths along `dim` differ: shorter ones are padded with NaN, or -1 for integers."""
    longest = max(part.shape[dim] for part in parts)
    padded = []
    for part in parts:
        shape = [*part.shape]
        shape[dim] = longest - shape[dim]
        fill: Any = torch.nan if part.is_floating_point() else -1
        padded.append(torch.cat([part, torch.full(shape, fill, dtype=part.dtype)], dim) if shape[dim] else part)
    return torch.cat(padded)


def _of_batch(name: str, value: Any, start: int, size: int, count: int) -> Any:
    """Return the part of an input that belongs to a batch, or all of it if it is not passed for each prompt."""
    if count == 1 or name not in _BY_PROMPT:
        return value
    if isinstance(value, (list, tuple)) and len(value) == count:
        return value[start] if size == 1 else value[start : start + size]
    if name != "images" and isinstance(value, torch.Tensor):
        return value.expand(count, -1)[start : start + size]
    return value


def _positions_of_each(positions: Positions, count: int) -> list[Any]:
    """Return the positions of each of `count` prompts, as the user wrote them."""
    positions = unpacked(positions)
    if not isinstance(positions, Iterable) or isinstance(positions, str):
        return [positions] * count
    positions = list(map(unpacked, positions))
    if not positions:
        raise InputError("no positions are chosen: pass some, or None for all")
    if all(isinstance(place, (list, tuple, range)) for place in positions):
        if len(positions) != count:
            raise InputError(f"positions were passed for {len(positions)} prompts, but there are {count}")
        return list(map(list, positions))
    return [positions] * count


def _batch(model: LanguageModel, run: LanguageRun, start: int, each: list[Any]) -> Batch:
    decodes = model.is_encoder_decoder
    tokens = run.decoder_tokens if decodes else run.tokens
    if tokens is None:
        raise InputError("the lens needs to know the tokens: pass strings or token ids, not embeddings or labels")
    mask = torch.ones_like(tokens) if decodes or run.mask is None else run.mask
    real = [row.nonzero().flatten().cpu() for row in mask.cpu()]
    each = [_of_images(run, i, row, start) if one == IMAGE else one for i, (one, row) in enumerate(zip(each, real))]
    own = [_own_positions(positions, len(row), start + i) for i, (positions, row) in enumerate(zip(each, real))]
    longest = max(len(found) for found in own)
    where = torch.zeros(len(own), longest, dtype=torch.long)
    positions, chosen = torch.full_like(where, -1), torch.zeros_like(where, dtype=torch.bool)
    for i, (found, row) in enumerate(zip(own, real)):
        positions[i, : len(found)] = torch.tensor(found)
        where[i, : len(found)], chosen[i, : len(found)] = row[found], True
    return Batch(model, run, start, tokens, where, chosen, positions)


def _of_images(run: LanguageRun, row: int, real: torch.Tensor, start: int) -> list[int]:
    """Return the positions of the image tokens in a prompt. `real` are the prompt's positions in the padded batch."""
    found = run.image_tokens[row].to(real.device) if isinstance(run, VisionLanguageRun) else real[:0]
    if not len(found):
        raise InputError(f'positions="image": prompt {start + row} has no image')
    return torch.searchsorted(real, found).tolist()


def _own_positions(positions: Any, length: int, prompt: int) -> list[int]:
    """Return the chosen positions in a prompt of `length` tokens, counted from 0."""
    if isinstance(positions, slice) and as_slice(positions) is None:
        raise InputError(f"a slice of positions goes from one integer to another, unlike {positions!r}")
    if positions is None or isinstance(positions, slice):
        found = list(range(length)[positions or slice(None)])
    else:
        several = isinstance(positions, Iterable) and not isinstance(positions, str)
        found = list(positions) if several else [positions]
    numbers = list(map(as_integer, found))
    for place, number in zip(found, numbers):
        if number is None or not -length <= number < length:
            raise InputError(
                f"there is no position {place!r} in prompt {prompt}: it has {length} token{'s' * (length != 1)} "
                f"(0 to {length - 1})"
            )
    if not found:
        raise InputError(f"no positions are chosen in prompt {prompt}, which has {length} tokens")
    return [number % length for number in numbers]
