"""Draws prompts from several layers of a text encoder, with the layers of all prompts as rows of the same calls.

readings = [read_layers(model, prompt, seed, arguments, layers=[0, 4]) for prompt, seed in zip(prompts, seeds)]
draw_layers(readings, batch_size=32)[0]             # the outputs of the first prompt, one for each layer
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from diffsight.errors import InputError
from diffsight.lenses.encoders.checks import check_used, check_whole
from diffsight.lenses.encoders.drawing import BatchMismatchError, Drawing
from diffsight.lenses.encoders.exits import Exits
from diffsight.lenses.encoders.isolating import isolated
from diffsight.lenses.encoders.joining import join_readings
from diffsight.lenses.layers import Layer, Layers, choose_layers
from diffsight.pipelines.diffusion.encoding import EncodingRecord, record_encoding
from diffsight.pipelines.diffusion.model import DiffusionModel
from diffsight.pipelines.diffusion.text_encoders import Encoder, encoders_in


@dataclass(frozen=True)
class LayerReading:
    """A prompt, and the record of the text encoders for it.

    Attributes:
        model: The pipeline, in which the other text encoders may be isolated.
        prompt: The prompt.
        seed: The seed of its images.
        arguments: Further arguments of the pipeline.
        encoder: The text encoder whose layers are drawn.
        layers: The layers.
        norm: As in `diffusion_lens`.
        record: The record of the text encoders.
    """

    model: DiffusionModel
    prompt: str
    seed: int
    arguments: Mapping[str, Any]
    encoder: Encoder
    layers: tuple[Layer, ...]
    norm: bool
    record: EncodingRecord


def read_layers(
    model: DiffusionModel,
    prompt: str,
    seed: int,
    arguments: Mapping[str, Any],
    *,
    encoder: str | None = None,
    layers: Layers = None,
    isolate: bool = False,
    norm: bool = False,
    like: LayerReading | None = None,
) -> LayerReading:
    """Encode a prompt. The arguments are as for `diffusion_lens`.

    `like` is another prompt that was read with the same arguments. Its encoder is used without looking for it again.

    Raises:
        InputError: The encoder or a layer does not exist, no use of the encoder was found, its tokenizer truncates the
            prompt, or the other encoders cannot be isolated.
    """
    record = record_encoding(model, prompt, arguments, seed)
    found = encoders_in(model, record).choose(encoder) if like is None else like.encoder
    chosen = choose_layers(layers, found.count, found.used_count)
    check_used(model, found)
    if norm and found.ln_final is None:
        raise InputError(f"norm: {found.name} has no final norm")
    check_whole(model, record.encoders[found.name], prompt)
    if isolate:
        model, record = isolated(model, found, record, prompt, arguments, seed)
    return LayerReading(model, prompt, seed, arguments, found, chosen, norm, record)


def draw_layers(
    readings: Sequence[LayerReading], pooled: str = "layer", batch_size: int | None = None, progress: bool = False
) -> list[tuple[Any, ...]]:
    """Return the outputs of the pipeline for each prompt, one for each layer.

    Args:
        readings: The prompts, encoded with the same model and options.
        pooled: As in `diffusion_lens`.
        batch_size: The number of rows in a call. Default: all.
        progress: Whether to show a progress bar.

    Raises:
        BatchMismatchError: The prompts cannot be rows of one call, because they have different numbers of tokens,
            or the encoder is isolated.
    """
    first = readings[0]
    if any(reading.model is not first.model for reading in readings):
        raise BatchMismatchError("an isolated text encoder cannot read several prompts in one call")
    record = join_readings([reading.record for reading in readings])
    exits = Exits(first.model, first.encoder, record, first.norm, pooled)
    prompts, seeds = [reading.prompt for reading in readings], [reading.seed for reading in readings]
    drawing = Drawing(first.model, record, first.encoder.name, prompts, seeds, first.arguments, progress=progress)
    numbers = [number for number in range(len(readings)) for _ in first.layers]
    outputs = drawing.draw(exits.leave, first.layers * len(readings), batch_size, numbers)
    return [outputs[start : start + len(first.layers)] for start in range(0, len(outputs), len(first.layers))]
