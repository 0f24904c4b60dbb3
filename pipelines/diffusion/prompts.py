"""Check prompts before a pipeline runs, for missing prompts, prompts that are too long, and unknown words."""

from collections.abc import Sequence
from typing import Any

from transformers import ProcessorMixin

from diffsight.errors import InputError, warn_user
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
        InputError: There is no prompt, or every tokenizer would truncate a prompt. An empty prompt is allowed.
    """
    prompts = list(prompts) if isinstance(prompts, (list, tuple)) else [prompts]
    if not prompts:
        raise InputError("there is no prompt, because the list is empty")
    for prompt in prompts:
        if not isinstance(prompt, str):
            raise InputError(f"a prompt is a string, not {type(prompt).__name__}: {prompt!r}")
    parts = [part for name, part in pipeline.components.items() if name.startswith("tokenizer") and part]
    tokenizers = [text_tokenizer(part) for part in parts]
    read, given = [], prompts
    for tokenizer in tokenizers:
        given = as_read(pipeline, given, tokenizer)
        read.append(tokenizer(given, verbose=False).input_ids)  # all at once, which is much faster
    limits = [_limit(pipeline, tokenizer, arguments) for tokenizer in tokenizers]
    for prompt, *ids in zip(prompts, *read):
        if ids and all(limit is not None and len(own) > limit for own, limit in zip(ids, limits)):
            raise _error(pipeline, tokenizers, prompt, arguments)
    for tokenizer, ids in zip(tokenizers, read):
        unknown = getattr(tokenizer, "unk_token_id", None)
        for prompt in (prompt for prompt, own in zip(prompts, ids) if unknown in own):
            _warn_of_unknown_words(tokenizer, prompt)


def text_tokenizer(part: Any) -> Any:
    """Return the text tokenizer in a tokenizer of a pipeline, which may be a processor of text and images."""
    return part.tokenizer if isinstance(part, ProcessorMixin) else part


def as_read(pipeline: Any, prompts: Sequence[str], tokenizer: Any) -> list[str]:
    """Return prompts as the pipeline passes them to a tokenizer: textual inversion tokens name all their vectors."""
    convert = getattr(pipeline, "maybe_convert_prompt", None)
    added = getattr(tokenizer, "added_tokens_encoder", {})
    if convert is None or not any(f"{token}_1" in added for token in added):
        return list(prompts)
    return convert(list(prompts), tokenizer)


def _error(pipeline: Any, tokenizers: list, prompt: str, arguments: dict[str, Any]) -> InputError:
    """Return the error for a prompt that no tokenizer reads in full."""
    dropped = []
    for tokenizer in tokenizers:
        (prompt,) = as_read(pipeline, [prompt], tokenizer)
        limit = _limit(pipeline, tokenizer, arguments)
        content = tokenizer(prompt, add_special_tokens=False, verbose=False).input_ids
        special = len(tokenizer(prompt, verbose=False).input_ids) - len(content)
        dropped.append((limit, tokenizer.decode(content[limit - special :])))
    limit, words = max(dropped, key=lambda item: item[0])
    return InputError(
        f"the prompt is too long: only {limit} tokens are read, and these words would be dropped: {words!r}"
    )


def _limit(pipeline: Any, tokenizer: Any, arguments: dict[str, Any]) -> int | None:
    """Return how many tokens the pipeline accepts from this tokenizer."""
    asked = arguments.get("max_sequence_length", call_defaults(pipeline).get("max_sequence_length"))
    limits = [n for n in (tokenizer.model_max_length, asked) if isinstance(n, int) and n < 1_000_000]
    return min(limits, default=None)


def _warn_of_unknown_words(tokenizer: Any, prompt: str) -> None:
    unknown = tokenizer.unk_token_id
    if unknown not in tokenizer(prompt, add_special_tokens=False, verbose=False).input_ids:  # it may be an end token
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
    warn_user(message, PromptWarning)
