"""One text encoder alone: all others of the pipeline are given an empty prompt."""

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
    """A copy of `model`, in which only `encoder` reads the prompt, and what its encoders do then. `reading` is what
    they do in `model`.

    Raises InputError where another encoder cannot be given an empty prompt: it shares its tokenizer, or has none."""
    others = [other for name, other in reading.encoders.items() if name != encoder.name]
    if not others:
        return model, reading
    prompts = [value for name, value in arguments.items() if re.fullmatch(r"prompt_\d+", name)]
    for tokenizer in dict.fromkeys(other.tokenizer for other in others):
        if tokenizer is None or tokenizer == encoder.tokenizer:
            names = ", ".join(other.name for other in others if other.tokenizer == tokenizer)
            why = (
                "its tokens come from no tokenizer of the pipeline" if tokenizer is None else f"both share {tokenizer}"
            )
            raise InputError(f"isolate: {names} cannot be given an empty prompt beside {encoder.name}, since {why}")
        blank = partial(_blank, texts=[prompt, *filter(None, prompts)], but=arguments.get("negative_prompt"))
        model = model.edit(lambda run, tokenizer=tokenizer, blank=blank: _give(run, tokenizer, blank))
    alone = record_encoding(model, prompt, arguments, seed)
    for other in others:
        before, after = (one.encoders[other.name].prompt.ids for one in (reading, alone))
        if before.shape == after.shape and torch.equal(before, after):
            raise InputError(f"isolate: the prompt does not come to {other.name} through {other.tokenizer} as it is")
    return model, alone


def _give(run: DiffusionRun, tokenizer: str, change: Any) -> None:
    """Gives the tokenizer changed texts, in all its calls."""
    for number in count():
        call = run[tokenizer].calls[number]
        call.input = change(call.input)


def _blank(given: Any, texts: list[str], but: str | None) -> Any:
    """The texts that a tokenizer is given, without the prompts in them; templates around them stay."""
    if isinstance(given, (list, tuple)):
        return [_blank(text, texts, but) for text in given]
    if not isinstance(given, str) or given == but:
        return given
    for text in texts:  # as it was given, or as it was cleaned
        given = re.sub(re.escape(text.strip()), "", given, flags=re.IGNORECASE)
    return given
