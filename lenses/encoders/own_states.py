"""The hidden states of many prompts' own tokens, read in one batch.

    reading = record_encoding(model, prompts[0], arguments)                 # one prompt shows how the pipeline encodes
    read = read_together(model, reading, {"text_encoder": (4, 8)}, prompts, arguments, seed=0)
    read["text_encoder"].states                                             # (2, tokens of all prompts, features)

The pipeline is stopped when its text encoders have read the prompts, so it does not encode the negative prompts.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from diffsight.lenses.encoders.drawing import for_each_row
from diffsight.lenses.encoders.own_tokens import own_places, places_of
from diffsight.lenses.layers import EMBEDDING, Layer, in_model_order
from diffsight.pipelines.diffusion.encoder_calls import EncoderRecord, hidden_in
from diffsight.pipelines.diffusion.encoding import EncodingRecord
from diffsight.pipelines.diffusion.model import DiffusionModel
from diffsight.pipelines.diffusion.prompts import PromptWarning
from diffsight.pipelines.diffusion.run import DiffusionRun, progress_bar


@dataclass(frozen=True)
class OwnStates:
    """The hidden states of some prompts in one text encoder.

    Attributes:
        states: The hidden states of the own tokens of all prompts, one prompt after the other, on the CPU in single
            precision, (layers, tokens of all prompts, features).
        ids: The ids of the own tokens, for each prompt.
    """

    states: torch.Tensor = field(repr=False)
    ids: tuple[tuple[int, ...], ...]


def read_alone(model: DiffusionModel, encoder: EncoderRecord, layers: Sequence[Layer], prompt: str) -> OwnStates:
    """Return the hidden states of a prompt that has been read on its own."""
    call, places = encoder.prompt, own_places(model, encoder, prompt)
    row = call.rows[0]
    states = torch.stack([call.hidden(layer)[row][places] for layer in layers]).float().cpu()
    return OwnStates(states, (tuple(call.ids[row][places].tolist()),))


def read_together(
    model: DiffusionModel,
    reading: EncodingRecord,
    layers: Mapping[str, Sequence[Layer]],
    prompts: Sequence[str],
    arguments: Mapping[str, object],
    seed: int,
) -> dict[str, OwnStates] | None:
    """Return the hidden states of all prompts by the name of the text encoder, from one run of the pipeline.

    Return None if the pipeline does not encode a list of prompts in one batch, in order, or if a prompt is invalid.
    The prompts must then be read one by one.

    Args:
        model: The pipeline.
        reading: The record of its text encoders for one prompt.
        layers: The layers of each text encoder.
        prompts: The prompts.
        arguments: Further arguments of the pipeline, as for one prompt.
        seed: The seed of the run.
    """
    gpus = range(torch.cuda.device_count() if torch.cuda.is_initialized() else 0)
    with warnings.catch_warnings(), torch.random.fork_rng(gpus), progress_bar(model.pipeline, disable=True):
        warnings.simplefilter("ignore", PromptWarning)
        try:
            given = for_each_row(arguments, len(prompts))
            with torch.no_grad(), model.generate(prompt=list(prompts), seed=seed, **given) as run:
                found = {name: _read(model, run, reading.encoders[name], layers[name], prompts) for name in layers}
                run.stop()
        except Exception:  # it takes one prompt only, or a prompt is wrong, which is raised when it is read alone
            return None
    return None if None in found.values() else found


def _read(
    model: DiffusionModel, run: DiffusionRun, encoder: EncoderRecord, layers: Sequence[Layer], prompts: Sequence[str]
) -> OwnStates | None:
    """Return the hidden states of the prompts in the call that encodes them, or None if it does not have them all.

    `encoder` is the record of the encoder for one prompt."""
    known, number = encoder.prompt, encoder.calls.index(encoder.prompt)
    if any(len(call.hidden_states) != len(known.hidden_states) for call in encoder.calls[:number]):
        return None  # so the calls of a layer and of the encoder are numbered differently
    ids, count = run[encoder.words].calls[number].input, len(prompts)
    first = known.rows[0] * count if known.rows else 0
    if not known.rows or len(ids) != len(known.ids) * count:
        return None
    places = places_of(model, encoder.tokenizer, prompts, ids[first : first + count])
    if None in places:
        return None
    rows = torch.tensor([first + row for row, place in enumerate(places) for _ in place])
    columns = torch.tensor([column for place in places for column in place])
    states, part = {}, run[encoder.name]
    for layer in in_model_order(layers):
        call = part.layers[0 if layer == EMBEDDING else layer].calls[number]
        hidden = call.input if layer == EMBEDDING else hidden_in(call.output)
        states[layer] = hidden[rows.to(hidden.device), columns.to(hidden.device)].float().cpu()
    own = tuple(tuple(ids[first + row, place.start : place.stop].tolist()) for row, place in enumerate(places))
    return OwnStates(torch.stack([states[layer] for layer in layers]), own)
