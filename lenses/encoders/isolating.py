"""Isolates one text encoder: all other text encoders of the pipeline get an empty prompt."""

import re
from collections.abc import Mapping
from functools import partial
from itertools import count
from typing import Any

import torch

from diffsight.errors import InputError
from diffsight.pipelines.diffusion.encoding import EncodingRecord, record_encoding
from diffsight.pipelines.diffusion.model import DiffusionModel
from diffsight.pipelines.diffusion.run import DiffusionRun
from diffsight.pipelines.diffusion.text_encoders import Encoder


def isolated(
    model: DiffusionModel,
    encoder: Encoder,
    reading: EncodingRecord,
    prompt: str,
    arguments: Mapping[str, Any],
    seed: int,
) -> tuple[DiffusionModel, EncodingRecord]:
    """Return a copy of `model` in which only `encoder` reads the prompt, and the record of its text encoders.

    Args:
        model: The pipeline.
        encoder: The text encoder to isolate.
        reading: The record of the text encoders in `model`.
        prompt: The prompt.
        arguments: Further arguments of the pipeline.
        seed: The seed.

    Raises:
        InputError: Another text encoder cannot get an empty prompt, because it has no tokenizer, or shares the
            tokenizer of `encoder`.
    """
    others = [other for name, other in reading.encoders.items() if name != encoder.name]
    if not others:
        return model, reading
    prompts = [value for name, value in arguments.items() if re.fullmatch(r"prompt_\d+", name)]
    for tokenizer in dict.fromkeys(other.tokenizer for other in others):
        if tokenizer is None or tokenizer == encoder.tokenizer:
            names = ", ".join(other.name for other in others if other.tokenizer == tokenizer)
            why = "its tokenizer was not found in the pipeline" if tokenizer is None else f"they share {tokenizer}"
            raise InputError(f"isolate: {names} cannot be given a different prompt from {encoder.name}, because {why}")
        blank = partial(_blank, texts=[prompt, *filter(None, prompts)], keep=arguments.get("negative_prompt"))
        model = model.edit(lambda run, tokenizer=tokenizer, blank=blank: _change_texts(run, tokenizer, blank))
    alone = record_encoding(model, prompt, arguments, seed)
    for other in others:
        before, after = (one.encoders[other.name].prompt.ids for one in (reading, alone))
        if before.shape == after.shape and torch.equal(before, after):
            raise InputError(
                f"isolate: the prompt did not reach {other.tokenizer} unchanged, so it could not be blanked for "
                f"{other.name}"
            )
    return model, alone


def _change_texts(run: DiffusionRun, tokenizer: str, change: Any) -> None:
    """Change the texts that a tokenizer gets, in all its calls."""
    for number in count():
        call = run[tokenizer].calls[number]
        call.input = change(call.input)


def _blank(given: Any, texts: list[str], keep: str | None) -> Any:
    """Return a tokenizer's input without the prompts in it. Templates around the prompts stay, and so does `keep`."""
    if isinstance(given, (list, tuple)):
        return [_blank(text, texts, keep) for text in given]
    if not isinstance(given, str) or given == keep:
        return given
    for text in texts:  # ignoring case, since some pipelines change the prompt to lower case
        given = re.sub(re.escape(text.strip()), "", given, flags=re.IGNORECASE)
    return given
