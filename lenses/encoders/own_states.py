"""The hidden states of many prompts' own tokens, read in one batch.

    layers = {model.encoders["text_encoder"]: (4, 8)}
    read = read_together(model, layers, prompts, arguments, seed=0)
    read["text_encoder"].states             # (2, tokens of all prompts, features)

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
from diffsight.pipelines.diffusion.model import DiffusionModel
from diffsight.pipelines.diffusion.prompts import PromptWarning
from diffsight.pipelines.diffusion.run import DiffusionRun, progress_bar
from diffsight.pipelines.diffusion.text_encoders import Encoder


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
    layers: Mapping[Encoder, Sequence[Layer]],
    prompts: Sequence[str],
    arguments: Mapping[str, object],
    seed: int,
) -> dict[str, OwnStates] | None:
    """Return the hidden states of all prompts by the name of the text encoder, from one run of the pipeline.

    Return None if the pipeline does not encode a list of prompts in one batch, in order, or if a prompt is invalid.
    The prompts must then be read one by one.

    Args:
        model: The pipeline.
        layers: The layers of each text encoder.
        prompts: The prompts.
        arguments: Further arguments of the pipeline, as for one prompt.
        seed: The seed of the run.
    """
    if any(encoder.prompt_call is None for encoder in layers):
        return None
    gpus = range(torch.cuda.device_count() if torch.cuda.is_initialized() else 0)
    with warnings.catch_warnings(), torch.random.fork_rng(gpus), progress_bar(model.pipeline, disable=True):
        warnings.simplefilter("ignore", PromptWarning)
        try:
            given = for_each_row(arguments, len(prompts))
            with torch.no_grad(), model.generate(prompt=list(prompts), seed=seed, **given) as run:
                found = {encoder.name: _read(model, run, encoder, layers[encoder], prompts) for encoder in layers}
                run.stop()
        except Exception:  # it takes one prompt only, or a prompt is wrong, which is raised when it is read alone
            return None
    return None if None in found.values() else found


def _read(
    model: DiffusionModel, run: DiffusionRun, encoder: Encoder, layers: Sequence[Layer], prompts: Sequence[str]
) -> OwnStates | None:
    """Return the hidden states of the prompts in the call that encodes them, or None if it does not have them all."""
    known, count = encoder.prompt_call, len(prompts)
    ids, first = run[known.words].calls[known.number].input, known.row * count
    if len(ids) != known.shape[0] * count:
        return None
    places = places_of(model, encoder.tokenizer, prompts, ids[first : first + count])
    if None in places:
        return None
    rows = torch.tensor([first + row for row, place in enumerate(places) for _ in place])
    columns = torch.tensor([column for place in places for column in place])
    states, part = {}, run[encoder.name]
    for layer in in_model_order(layers):
        call = part.layers[0 if layer == EMBEDDING else layer].calls[known.number]
        hidden = call.input if layer == EMBEDDING else hidden_in(call.output)
        states[layer] = hidden[rows.to(hidden.device), columns.to(hidden.device)].float().cpu()
    own = tuple(tuple(ids[first + row, place.start : place.stop].tolist()) for row, place in enumerate(places))
    return OwnStates(torch.stack([states[layer] for layer in layers]), own)
