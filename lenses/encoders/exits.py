"""Early exits: rows of one call of a pipeline that each leave a text encoder at a different layer.

    reading = record_encoding(model, prompt, arguments)         # the text encoders run here, once
    exits = Exits(model, encoder, reading, norm=False, pooled="layer")
    drawing.draw(exits.leave, ["embedding", 4, 8])              # and not here: three rows, three images

A row that leaves at layer 4 skips the layers after it: each of them returns the output of layer 4. The final norm, the
pooling and the projections after the layers run as usual for every row. Other rows of the encoder's batch, such as
the rows of the negative prompt, get the outputs that were read for them.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from diffsight.lenses.encoders.drawing import Rows, calls_in, with_state
from diffsight.lenses.layers import Layer, state_of
from diffsight.pipelines.diffusion.encoder_calls import EncoderCall
from diffsight.pipelines.diffusion.encoding import EncodingRecord
from diffsight.pipelines.diffusion.model import DiffusionModel
from diffsight.pipelines.diffusion.run import DiffusionRun
from diffsight.pipelines.diffusion.text_encoders import Encoder


@dataclass(frozen=True)
class Exits:
    """The settings that all rows share.

    Args:
        model: The pipeline.
        encoder: The text encoder that the rows leave.
        reading: The record of the text encoders for the prompts.
        norm: Whether to apply the final norm to hidden states that the pipeline uses without it.
        pooled: "layer" for the pooled vector of the layer, "full" for the pooled vector of the whole encoder.
    """

    model: DiffusionModel
    encoder: Encoder
    reading: EncodingRecord
    norm: bool
    pooled: str

    def leave(self, run: DiffusionRun, layers: Rows[Layer]) -> None:
        """Skip the encoder's layers in all calls of a run: their outputs are known."""
        reading, part = self.reading.encoders[self.encoder.name], run[self.encoder.name]
        for number, call in calls_in(run, reading, layers):
            rows = _Exited(call, layers)
            last = rows.outputs(self.encoder.count - 1)
            for index, layer in enumerate(part.layers):
                state = last
                if index in self.encoder.unnormed_layers:
                    state = rows.outputs(index, part.ln_final if self.norm else None)
                value = with_state(call.returned[index], state)
                layer.calls[number].skip(self._for_edits(value))
                layer.calls[number].output = value
            if self.norm and self.encoder.count - 1 in self.encoder.unnormed_layers:
                part.ln_final.calls[number].input = last
            if self.pooled == "full" and self.encoder.pooled is not None:
                rows.restore(self._pooled(run, number), call.pooled[self.encoder.pooled])

    def _for_edits(self, value: Any) -> Any:
        """Return a copy for the model's edits to change, since what was read already contains their changes."""
        return tree_map_only(torch.Tensor, torch.clone, value) if self.model.edits else value

    def _pooled(self, run: DiffusionRun, number: int) -> torch.Tensor:
        """Return the pooled vectors in a call of the encoder, (rows, features)."""
        name, part = self.encoder.pooled, run[self.encoder.name]
        if hasattr(getattr(self.model.pipeline, self.encoder.name), name):  # a child computes them
            output = part[name].calls[number].output
            return output if isinstance(output, torch.Tensor) else output[0]
        output = part.calls[number].output
        return output[int(name)] if name.isdigit() else output[name]


class _Exited:
    """The rows of one call of the encoder, each with the layer at which it leaves."""

    def __init__(self, call: EncoderCall, rows: Rows[Layer]) -> None:
        self.call, self.rows = call, rows

    @torch.no_grad()
    def outputs(self, layer: int, norm: Any = None) -> torch.Tensor:
        """Return the output of `layers[layer]`, (rows, tokens, features).

        A row that left at this layer or an earlier one has the output of the layer at which it left, passed through
        `norm` if there is one."""
        output = self.call.hidden(layer)
        outputs = self.rows.spread(output, len(output))
        for place, row, left in self.rows.of_call(self.call):
            if state_of(left) <= state_of(layer):
                state = self.call.hidden(left)[row]
                outputs[place] = state if norm is None else norm(state)
        return outputs

    def restore(self, vectors: torch.Tensor, full: torch.Tensor) -> None:
        """Replace the vectors of the rows that left by the whole encoder's, `full`, (rows, features)."""
        for place, row, _ in self.rows.of_call(self.call):
            vectors[place] = full[row]
