"""Joins records of text encoders, each for a single prompt, as if all prompts had been encoded in one batch.

    readings = [record_encoding(model, prompt, arguments) for prompt in prompts]
    joined = join_readings(readings)
    joined.encoders["text_encoder"].prompt.hidden(4)        # (prompts, tokens, features)

The rows of a call are ordered as in a batch of the pipeline: where a call has a row for the negative prompt and one for
the prompt, all negative prompts come first.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_map

from diffsight.lenses.encoders.drawing import BatchMismatchError
from diffsight.pipelines.diffusion.encoder_calls import EncoderCall, EncoderRecord
from diffsight.pipelines.diffusion.encoding import EncodingRecord


def join_readings(readings: Sequence[EncodingRecord]) -> EncodingRecord:
    """Return the text encoders' calls for all prompts. The result has no `tensors`.

    Raises:
        BatchMismatchError: The text encoders are called in different ways, or with different numbers of tokens.
    """
    if len(readings) == 1:
        return readings[0]
    first, *others = readings
    joined = {}
    for name, encoder in first.encoders.items():
        several = [encoder, *(other.encoders.get(name) for other in others)]
        if any(one is None or len(one.calls) != len(encoder.calls) for one in several):
            raise BatchMismatchError(f"{name} is called for some of the prompts in another way than for others")
        calls = [_join(name, calls) for calls in zip(*(one.calls for one in several))]
        joined[name] = EncoderRecord(name, encoder.words, encoder.tokenizer, calls)
    return EncodingRecord(joined)


def _join(name: str, calls: Sequence[EncoderCall]) -> EncoderCall:
    """Return one call for all prompts. Its row r of prompt i is row r * prompts + i."""
    first, count = calls[0], len(calls)
    if any(call.ids.shape != first.ids.shape or call.rows != first.rows for call in calls):
        raise BatchMismatchError(f"{name} receives different numbers of tokens for the prompts")
    read = len(first.ids)

    def joined(leaf: Any, *others: Any) -> Any:
        if not isinstance(leaf, torch.Tensor) or not leaf.ndim or len(leaf) != read:
            return leaf
        return torch.stack([leaf, *others], 1).flatten(0, 1)

    def of(attribute: str) -> Any:
        return tree_map(joined, *(getattr(call, attribute) for call in calls))

    rows = [row * count + i for row in first.rows for i in range(count)]
    return EncoderCall(of("ids"), rows, of("hidden_states"), of("returned"), output=of("output"), pooled=of("pooled"))
