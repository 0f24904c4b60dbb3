"""Early exits: one call of a pipeline, each row of which leaves a text encoder at a layer of its own.

    reading = read(model, prompt, arguments)                    # the encoders run here, once
    exits = Exits(encoder, reading, norm=False, pooled="layer")
    exits.draw(model, [0, 4, 8], prompt, seed, arguments)       # and not here: three rows, three pictures

Row i of the call goes through the first `layers[i]` layers of the encoder; those behind it are left out, so that all
that the pipeline takes of them is what layer `layers[i]` gave. The final norm, the pooling and the projections behind
the layers run for every row, as they are. Other rows of the encoder's batch, such as those of the negative prompt, and
other encoders give what they gave when they were read.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any

import torch
from PIL import Image
from torch.utils._pytree import tree_leaves, tree_map_only

from diffsight.errors import DiffsightError, InputError
from diffsight.pipelines.diffusion import DiffusionModel, DiffusionRun
from diffsight.pipelines.encoders import Encoder
from diffsight.pipelines.reading import Call, EncoderReading, Reading

_MADE = ("images", "image", "frames", "audios")


class NoPicturesError(InputError):
    """A pipeline makes neither pictures nor videos nor sounds."""


class NotAlikeError(DiffsightError):
    """A pipeline encodes several prompts in another way than one."""


@dataclass(frozen=True)
class Exits:
    """What the rows have in common. With `norm` the final norm is applied to a hidden state that the pipeline takes
    without it; with `pooled="full"` the pooled vector is the one that the whole encoder makes."""

    encoder: Encoder
    reading: Reading
    norm: bool
    pooled: str

    def draw(
        self, model: DiffusionModel, layers: Sequence[int], prompt: str, seed: int, arguments: Mapping[str, Any]
    ) -> Sequence[Any]:
        """What the pipeline makes of each of `layers`, in one call and from one seed.

        Raises NotAlikeError where the pipeline does not encode a list of prompts as one batch."""
        edited = model.edit(lambda run: self._leave(run, layers, bool(model.edits)))
        for name, other in self.reading.encoders.items():
            if name != self.encoder.name and all(call.output is not None for call in other.calls):
                edited = edited.edit(lambda run, other=other: _repeat(run, other, len(layers)))
        given = {"prompt": prompt, **arguments}
        if len(layers) == 1:
            made = edited.generate(**given, seed=seed).result
        else:
            made = edited.generate(**several(given, len(layers)), seed=[seed] * len(layers)).result
        name = next(iter(made), None) if isinstance(made, Mapping) else None
        if name is not None and name not in _MADE:
            raise NoPicturesError(f"{type(model.pipeline).__name__} makes {name}: there is no picture to look at")
        made = made[0]
        if len(made) != len(layers):
            raise NotAlikeError(f"it makes {len(made)} pictures of {len(layers)} prompts")
        return made

    def _leave(self, run: DiffusionRun, layers: Sequence[int], is_edited: bool) -> None:
        """Leaves the encoder's layers out of its calls: what they would give is known. Other edits may change what is
        given in their place, and have changed already what was read."""
        reading, part = self.reading.encoders[self.encoder.name], run[self.encoder.name]
        for number in count():
            call = _same_call(reading, number, run[reading.words].calls[number].input, len(layers))
            rows = _Rows(call, layers)
            last = rows.states(self.encoder.count)
            for index, layer in enumerate(part.layers, 1):
                state = last
                if index in self.encoder.raw_states:
                    state = rows.states(index, part.ln_final if self.norm else None)
                value = _with_state(call.returned[index - 1], state)
                layer.calls[number].skip(tree_map_only(torch.Tensor, torch.clone, value) if is_edited else value)
                layer.calls[number].output = value
            if self.norm and self.encoder.count in self.encoder.raw_states:
                part.ln_final.calls[number].input = last
            if self.pooled == "full" and self.encoder.pooled is not None:
                rows.restore(_vector(run, self.encoder, number), call.pooled[self.encoder.pooled])


class _Rows:
    """The rows of one call of the encoder, with `layers` for each row of the prompt."""

    def __init__(self, call: Call, layers: Sequence[int]) -> None:
        self.call, self.layers = call, layers

    @torch.no_grad()
    def states(self, index: int, norm: Any = None) -> torch.Tensor:
        """What layer `index` gives, (rows, tokens, features): behind the layer where a row leaves, what that one gave,
        through `norm`."""
        states = self.call.states
        made = repeated(states[index], len(states[index]), len(self.layers))
        for place, row, layer in self._places():
            state = states[min(index, layer)][row]
            made[place] = norm(state) if norm is not None and layer <= index else state
        return made

    def restore(self, vectors: torch.Tensor, full: torch.Tensor) -> None:
        """Puts the vectors of the whole encoder, (rows, features), into those of the rows that leave it."""
        for place, row, _ in self._places():
            vectors[place] = full[row]

    def _places(self) -> list[tuple[int, int, int]]:
        """The places in the batch of the rows that leave: with the row in the reading, and the layer."""
        layers = list(enumerate(self.layers))
        return [(row * len(layers) + i, row, layer) for row in self.call.rows for i, layer in layers]


def _repeat(run: DiffusionRun, reading: EncoderReading, times: int) -> None:
    """Leaves an encoder out of its calls: it gives every row what it gave."""
    part = run[reading.name]
    for number in count():
        ids = next((leaf for leaf in tree_leaves(part.calls[number].inputs) if _are_ids(leaf)), None)
        call = _same_call(reading, number, ids, times)
        value = tree_map_only(torch.Tensor, partial(repeated, rows=len(call.ids), times=times), call.output)
        part.calls[number].skip(value)
        part.calls[number].output = value


def _same_call(reading: EncoderReading, number: int, ids: torch.Tensor | None, times: int) -> Call:
    """The call that was read, of which this one is a repetition."""
    if number < len(reading.calls) and ids is not None:
        known = repeated(reading.calls[number].ids, len(reading.calls[number].ids), times)
        if known.shape == ids.shape and torch.equal(known, ids.to(known)):
            return reading.calls[number]
    raise NotAlikeError(f"{reading.name} is given other tokens for {times} prompts than {times} times those of one")


def _are_ids(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.ndim == 2 and not leaf.is_floating_point()


def _with_state(returned: Any, state: torch.Tensor) -> Any:
    """What a layer returned, with another hidden state in it."""
    return (state, *returned[1:]) if isinstance(returned, tuple) else state


def _vector(run: DiffusionRun, encoder: Encoder, number: int) -> torch.Tensor:
    """The pooled vectors in a call of the encoder, (rows, features)."""
    name = encoder.pooled
    module = run[encoder.name]
    if hasattr(module._owner, name):  # made by a part of it
        output = module[name].calls[number].output
        return output if isinstance(output, torch.Tensor) else output[0]
    output = module.calls[number].output
    return output[int(name)] if name.isdigit() else output[name]


def repeated(tensor: torch.Tensor, rows: int, times: int) -> torch.Tensor:
    """Each of a tensor's `rows` as often; a tensor that has no rows is the same for all."""
    return tensor.repeat_interleave(times, 0) if tensor.ndim and len(tensor) == rows else tensor


def several(arguments: Mapping[str, Any], times: int) -> dict[str, Any]:
    """The arguments of a pipeline's call, for as many prompts as `times`: each its own."""
    return {name: _several(name, value, times) for name, value in arguments.items()}


def _several(name: str, value: Any, times: int) -> Any:
    if isinstance(value, Image.Image) or ("prompt" in name and isinstance(value, str)):
        return [value] * times
    if isinstance(value, torch.Tensor) and value.ndim > 1 and len(value) == 1:
        return repeated(value, 1, times)
    return value
