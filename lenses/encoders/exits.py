"""Early exits: the rows of one call of a pipeline, each of which leaves a text encoder at a layer of its own.

    reading = read(model, prompt, arguments)                    # the encoders run here, once
    exits = Exits(encoder, reading, norm=False, pooled="layer", is_edited=False)
    drawing.draw(exits.leave, [0, 4, 8])                        # and not here: three rows, three pictures

Row i of the call goes through the first `layers[i]` layers of the encoder; those behind it are left out, so that all
that the pipeline takes of them is what layer `layers[i]` gave. The final norm, the pooling and the projections behind
the layers run for every row, as they are. Other rows of the encoder's batch, such as those of the negative prompt, give
what they gave when they were read.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from diffsight.lenses.encoders.drawing import calls_in, places, repeated, with_state
from diffsight.pipelines.diffusion.encoder_calls import EncoderCall
from diffsight.pipelines.diffusion.encoding import EncodingRecord
from diffsight.pipelines.diffusion.run import DiffusionRun
from diffsight.pipelines.diffusion.text_encoders import Encoder


@dataclass(frozen=True)
class Exits:
    """What the rows have in common. With `norm` the final norm is applied to a hidden state that the pipeline takes
    without it; with `pooled="full"` the pooled vector is the one that the whole encoder makes. Where the model
    `is_edited`, its edits may change what is given in the place of layers, and have changed already what was read."""

    encoder: Encoder
    reading: EncodingRecord
    norm: bool
    pooled: str
    is_edited: bool

    def leave(self, run: DiffusionRun, layers: Sequence[int]) -> None:
        """Leaves the encoder's layers out of its calls: what they would give is known."""
        reading, part = self.reading.encoders[self.encoder.name], run[self.encoder.name]
        for number, call in calls_in(run, reading, len(layers)):
            rows = _Rows(call, layers)
            last = rows.states(self.encoder.count)
            for index, layer in enumerate(part.layers, 1):
                state = last
                if index in self.encoder.raw_states:
                    state = rows.states(index, part.ln_final if self.norm else None)
                value = with_state(call.returned[index - 1], state)
                layer.calls[number].skip(tree_map_only(torch.Tensor, torch.clone, value) if self.is_edited else value)
                layer.calls[number].output = value
            if self.norm and self.encoder.count in self.encoder.raw_states:
                part.ln_final.calls[number].input = last
            if self.pooled == "full" and self.encoder.pooled is not None:
                rows.restore(_vector(run, self.encoder, number), call.pooled[self.encoder.pooled])


class _Rows:
    """The rows of one call of the encoder, with `layers` for each row of the prompt."""

    def __init__(self, call: EncoderCall, layers: Sequence[int]) -> None:
        self.call, self.layers = call, layers

    @torch.no_grad()
    def states(self, index: int, norm: Any = None) -> torch.Tensor:
        """What layer `index` gives, (rows, tokens, features): behind the layer where a row leaves, what that one gave,
        through `norm`."""
        states = self.call.states
        made = repeated(states[index], len(states[index]), len(self.layers))
        for place, row, layer in places(self.call, self.layers):
            state = states[min(index, layer)][row]
            made[place] = norm(state) if norm is not None and layer <= index else state
        return made

    def restore(self, vectors: torch.Tensor, full: torch.Tensor) -> None:
        """Puts the vectors of the whole encoder, (rows, features), into those of the rows that leave it."""
        for place, row, _ in places(self.call, self.layers):
            vectors[place] = full[row]


def _vector(run: DiffusionRun, encoder: Encoder, number: int) -> torch.Tensor:
    """The pooled vectors in a call of the encoder, (rows, features)."""
    name = encoder.pooled
    module = run[encoder.name]
    if hasattr(module._owner, name):  # made by a part of it
        output = module[name].calls[number].output
        return output if isinstance(output, torch.Tensor) else output[0]
    output = module.calls[number].output
    return output[int(name)] if name.isdigit() else output[name]
