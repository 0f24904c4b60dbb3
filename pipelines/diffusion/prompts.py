"""Check prompts before a pipeline runs: no prompts, prompts that are too long, and unknown words."""

import sys
import warnings
from collections.abc import Sequence
from typing import Any

from diffsight.errors import InputError
from diffsight.pipelines.diffusion.call_arguments import call_defaults
from diffsight.pipelines.shapes.scenes import NOUNS

_SMALL_VOCABULARY = 500  # tokens; a vocabulary up to this size is listed in full


class PromptWarning(UserWarning):
    """A prompt contains words that the model has never seen."""


def check_prompts(pipeline: Any, prompts: str | Sequence[str], arguments: dict[str, Any]) -> None:
    """Check the prompts of a call, and warn about words that a tokenizer does not know.

    Args:
        pipeline: The pipeline.
        prompts: One prompt, or several.
        arguments: The arguments of the call, which may limit the number of tokens.

    Raises:
        InputError: There is no prompt, or every tokenizer would truncate one. An empty prompt is allowed.
    """
    prompts = list(prompts) if isinstance(prompts, (list, tuple)) else [prompts]
    if not prompts:
        raise InputError("there is no prompt, because the list is empty")
    for prompt in prompts:
        if not isinstance(prompt, str):
            raise InputError(f"a prompt is a string, not {type(prompt).__name__}: {prompt!r}")
    tokenizers = [part for name, part in pipeline.components.items() if name.startswith("tokenizer") and part]
    for prompt in prompts:
        _check_length(pipeline, tokenizers, prompt, arguments)
        for tokenizer in tokenizers:
            _warn_of_unknown_words(tokenizer, prompt)


def as_read(pipeline: Any, prompt: str, tokenizer: Any) -> str:
    """Return the prompt as the pipeline passes it to a tokenizer: with all vectors of tokens of textual inversion."""
    convert = getattr(pipeline, "maybe_convert_prompt", None)
    return prompt if convert is None or not hasattr(tokenizer, "tokenize") else convert(prompt, tokenizer)


def _check_length(pipeline: Any, tokenizers: list, prompt: str, arguments: dict[str, Any]) -> None:
    dropped = []
    for tokenizer in tokenizers:
        prompt = as_read(pipeline, prompt, tokenizer)
        ids = tokenizer(prompt, verbose=False).input_ids
        limit = _limit(pipeline, tokenizer, arguments)
        if limit is None or len(ids) <= limit:
            return
        content = tokenizer(prompt, add_special_tokens=False, verbose=False).input_ids
        special = len(ids) - len(content)
        dropped.append((limit, tokenizer.decode(content[limit - special :])))
    if dropped:
        limit, words = max(dropped, key=lambda item: item[0])
        raise InputError(
            f"the prompt is too long: only {limit} tokens are read, and these words would be dropped: {words!r}"
        )


def _limit(pipeline: Any, tokenizer: Any, arguments: dict[str, Any]) -> int | None:
    """Return how many tokens the pipeline accepts from this tokenizer."""
    asked = arguments.get("max_sequence_length", call_defaults(pipeline).get("max_sequence_length"))
    limits = [n for n in (tokenizer.model_max_length, asked) if isinstance(n, int) and n < 1_000_000]
    return min(limits, default=None)


def _warn_of_unknown_words(tokenizer: Any, prompt: str) -> None:
    unknown = getattr(tokenizer, "unk_token_id", None)
    if unknown is None or unknown not in (tokenizer(prompt, add_special_tokens=False, verbose=False).input_ids):
        return
    words = [w for w in prompt.split() if unknown in tokenizer(w, add_special_tokens=False, verbose=False).input_ids]
    if not words:
        return
    message = f"the model does not know {', '.join(map(repr, words))}"
    if len(tokenizer) <= _SMALL_VOCABULARY:
        left_out = {*tokenizer.all_special_tokens, *NOUNS}
        known = sorted(tokenizer.get_vocab())
        message += f". It knows: {', '.join(word for word in known if word not in left_out)}"
        invented = [word for word in known if word in NOUNS]
        message += f"; and {len(invented)} invented nouns, such as {invented[0]!r}" if invented else ""
    depth, frame = 1, sys._getframe(0)  # so that the warning shows the user's line
    while frame.f_back is not None and frame.f_globals["__name__"].startswith("diffsight."):
        depth, frame = depth + 1, frame.f_back
    warnings.warn(message, PromptWarning, stacklevel=depth)
