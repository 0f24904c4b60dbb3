"""Pairs of text encoders, where hidden states of one go into the other: their layers and words."""

from collections.abc import Iterable, Mapping
from typing import Any

from diffsight.errors import InputError
from diffsight.lenses.layers import Layer, Layers, choose_layer, choose_layers
from diffsight.pipelines.diffusion.encoder_calls import EncoderRecord
from diffsight.pipelines.diffusion.encoding import EncodingRecord
from diffsight.pipelines.diffusion.model import DiffusionModel
from diffsight.pipelines.diffusion.prompts import text_tokenizer
from diffsight.pipelines.diffusion.text_encoders import Encoder, encoders_in
from diffsight.pipelines.words import PromptWords, align_words


def choose_source(model: DiffusionModel, reading: EncodingRecord, target: Encoder, name: str | None) -> Encoder:
    """Return the text encoder of `model` called `name`. Default: the encoder with the name of `target`, if any."""
    found = encoders_in(model, reading)
    return found.choose(target.name if name is None and target.name in found else name)


def choose_pairs(
    layers: Layers, source_layers: int | str | Iterable[int | str] | None, target: Encoder, source: Encoder
) -> tuple[tuple[Layer, Layer], ...]:
    """Return the chosen layers of the target, each with the layer of the source whose hidden states it gets.

    Args:
        layers: Layers of the target. None means all layers that the pipeline uses or, if `source_layers` is None as
            well, those of them that the source also has.
        source_layers: A layer of the source for each of `layers`, or one for all. None means the same layers.
        target: The text encoder that gets hidden states.
        source: The text encoder that they come from.

    Raises:
        InputError: A layer does not exist, or the numbers of layers differ.
    """
    is_open = layers is None and source_layers is None
    used = min(target.used_count, source.count) if is_open else target.used_count
    chosen = choose_layers(layers, target.count, used)
    if source_layers is None:
        origins: list[Any] = list(chosen)
    elif isinstance(source_layers, Iterable) and not isinstance(source_layers, str):
        origins = list(source_layers)
    else:
        origins = [source_layers] * len(chosen)
    if len(origins) != len(chosen):
        raise InputError(f"source_layers has {len(origins)} items for {len(chosen)} layers: pass one for each, or one")
    try:
        return tuple((layer, choose_layer(origin, source.count)) for layer, origin in zip(chosen, origins))
    except InputError as error:
        raise InputError(f"in the source's {source.name}, {error}") from None


def words_read(model: DiffusionModel, reading: EncoderRecord, prompt: str) -> PromptWords:
    """Return the words of the prompt, and their tokens among the tokens that the text encoder reads.

    Raises:
        InputError: The encoder's tokenizer was not found.
    """
    if reading.tokenizer is None:
        raise InputError(f"the tokenizer of {reading.name} was not found in the pipeline, so its words are unknown")
    tokenizer = text_tokenizer(getattr(model.pipeline, reading.tokenizer))
    call = reading.prompt
    return align_words(tokenizer, prompt, call.ids[call.rows[0]].tolist())


def known_to(model: DiffusionModel, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments that the pipeline of `model` accepts."""
    return {name: value for name, value in arguments.items() if name in model.argument_names}
