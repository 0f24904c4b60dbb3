"""The prompts' own tokens among those that a text encoder reads: no padding, special tokens or templates.

places = places_of(model, "tokenizer", ["a red circle", "a cat"], ids)      # ids: (2, tokens)
places[0]                                                                   # range(1, 4)
"""

from collections.abc import Sequence
from typing import Any

import torch

from diffsight.pipelines.diffusion.encoder_calls import EncoderRecord
from diffsight.pipelines.diffusion.model import DiffusionModel
from diffsight.pipelines.diffusion.prompts import as_read, text_tokenizer


def places_of(
    model: DiffusionModel, tokenizer: str | None, prompts: Sequence[str], ids: torch.Tensor
) -> list[range | None]:
    """Return the place of each prompt's tokens in its row of `ids`, or None if they do not appear there.

    Args:
        model: The pipeline.
        tokenizer: The name of the component that the tokens come from, or None if it is unknown.
        prompts: The prompts.
        ids: The tokens that the text encoder reads, (prompts, tokens).
    """
    if tokenizer is None:
        return [None] * len(prompts)
    part = text_tokenizer(getattr(model.pipeline, tokenizer))
    texts, rows = as_read(model.pipeline, prompts, part), ids.tolist()
    places = [_place(own, row) for own, row in zip(_ids_of(part, texts), rows)]
    missing = [number for number, place in enumerate(places) if place is None]
    if missing:  # some pipelines clean the prompt
        cleaned = _ids_of(part, [texts[number].lower().strip() for number in missing])
        for number, own in zip(missing, cleaned):
            places[number] = _place(own, rows[number])
    return places


def own_places(model: DiffusionModel, encoder: EncoderRecord, prompt: str) -> list[int]:
    """Return the positions of a prompt's own tokens or, if they are not found, of all but the special tokens."""
    call = encoder.prompt
    ids = call.ids[call.rows[0]]
    if encoder.tokenizer is None:
        return list(range(len(ids)))
    place = places_of(model, encoder.tokenizer, [prompt], ids[None])[0]
    if place is not None:
        return list(place)
    special = set(text_tokenizer(getattr(model.pipeline, encoder.tokenizer)).all_special_ids)
    return [place for place, token in enumerate(ids.tolist()) if token not in special]


def _ids_of(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]


def _place(own: list[int], row: list[int]) -> range | None:
    for start in range(len(row) - len(own) + 1):
        if row[start : start + len(own)] == own:
            return range(start, start + len(own))
    return None
