"""Two text encoders, of which one gives hidden states to the other: which they are, their layers, their words."""

from collections.abc import Iterable, Mapping, Sequence
from inspect import signature
from typing import Any

from diffsight.errors import InputError
from diffsight.lenses.encoders.checks import choose_layers
from diffsight.pipelines.diffusion.encoder_calls import EncoderRecord
from diffsight.pipelines.diffusion.encoding import EncodingRecord
from diffsight.pipelines.diffusion.model import DiffusionModel
from diffsight.pipelines.diffusion.text_encoders import Encoder, encoders_in
from diffsight.pipelines.words import PromptWords, align_words


def choose_source(model: DiffusionModel, reading: EncodingRecord, target: Encoder, name: str | None) -> Encoder:
    """The encoder of `model` called `name`; for None the one called as the target's, if there is one."""
    found = encoders_in(model, reading)
    return found.choose(target.name if name is None and target.name in found else name)


def choose_pairs(
    layers: int | slice | Iterable[int] | None,
    source_layers: int | Sequence[int] | None,
    target: Encoder,
    source: Encoder,
) -> tuple[tuple[int, int], ...]:
    """Layers of the target's encoder, each with the layer of the source's that it gets states of."""
    last = min(target.last, source.count) if layers is None and source_layers is None else target.last
    chosen = choose_layers(layers, last)
    if source_layers is None:
        given = list(chosen)
    elif isinstance(source_layers, Iterable):
        given = list(source_layers)
    else:
        given = [source_layers] * len(chosen)
    if len(given) != len(chosen):
        raise InputError(f"there are {len(given)} source_layers for {len(chosen)} layers: give one for each, or one")
    try:
        return tuple((layer, *choose_layers(origin, source.count)) for layer, origin in zip(chosen, given))
    except InputError as error:
        raise InputError(f"in the source's {source.name} {error}") from None


def words_read(model: DiffusionModel, reading: EncoderRecord, prompt: str) -> PromptWords:
    """The words of the prompt, and their tokens among those that the encoder is given."""
    if reading.tokenizer is None:
        raise InputError(f"the tokens of {reading.name} come from no tokenizer of the pipeline: no words are known")
    tokenizer = getattr(model.pipeline, reading.tokenizer)
    tokenizer = tokenizer.tokenizer if reading.tokenizer == "processor" else tokenizer
    call = reading.prompt
    return align_words(tokenizer, prompt, call.ids[call.rows[0]].tolist())


def known_to(model: DiffusionModel, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Those arguments of a call that the pipeline of another model takes as well."""
    known = signature(model.pipeline.__call__).parameters
    return {name: value for name, value in arguments.items() if name in known}
