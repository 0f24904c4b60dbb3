"""The tail of a language model: what it does with the hidden states of its last layer, up to the logits.

    logits = run_tail(model, layers, tuples, hidden)    # (..., features) to (..., vocabulary)

In most models this is the final norm and the head, and nothing else. Others scale what lies between, cap the logits or
join several streams of hidden states. There the model itself is run, over single tokens, with all layers left out: its
last layer gives `hidden`, and what follows is the model's own code.
"""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Layout:
    """Where the batch and the tokens stand among the dimensions of the hidden states that layers give."""

    batch: int = 0
    tokens: int = 1
    dims: int = 3

    @classmethod
    def of(cls, shape: torch.Size, batch: int, tokens: int) -> "Layout | None":
        """The layout in which `batch` inputs of `tokens` tokens (a number that nothing else has) give this shape."""
        known = list(shape[:-1])
        if known[:2] == [batch, tokens]:
            return cls(dims=len(shape))
        if known.count(tokens) != 1 or known.count(batch) != 1:
            return None
        return cls(known.index(batch), known.index(tokens), len(shape))

    @property
    def is_common(self) -> bool:
        """Whether the batch comes first and the tokens second, as almost everywhere."""
        return (self.batch, self.tokens) == (0, 1)

    def tokens_first(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states as a layer gives them, as (batch, tokens, ...)."""
        return hidden.movedim((self.batch, self.tokens), (0, 1))

    def as_given(self, hidden: torch.Tensor) -> torch.Tensor:
        """The way back: (batch, tokens, ...) as the model's layers give it."""
        return hidden.movedim((0, 1), (self.batch, self.tokens))


def run_tail(
    model: nn.Module, layers: Sequence[nn.Module], tuples: Sequence[int], layout: Layout, hidden: torch.Tensor
) -> torch.Tensor:
    """The logits, (..., vocabulary), that the model makes of `hidden` as if its last layer had given it; `tuples` are
    the sizes of the tuples that the layers return (0: a tensor). `hidden` is of any shape (..., features); where layers
    do not give (batch, tokens, features), of the shape that they give."""
    if not layout.is_common:
        hidden = layout.tokens_first(hidden)
    outer = hidden.shape[: hidden.ndim + 2 - layout.dims]
    rows = hidden.reshape(-1, *hidden.shape[len(outer) :])
    with _returning(layers, tuples, layout.as_given(rows[:, None])):
        output = model(**_one_token_each(model, rows))
    logits = output["logits"] if isinstance(output, Mapping) else output[0]
    return logits.reshape(*outer, -1)


def _one_token_each(model: nn.Module, hidden: torch.Tensor) -> dict[str, Any]:
    """Inputs of one token a row. What they are plays no part: the layers are left out."""
    ids = torch.full((len(hidden), 1), 2, device=hidden.device)
    inputs: dict[str, Any] = {"input_ids": ids}
    known = inspect.signature(model.forward).parameters
    if model.config.is_encoder_decoder and "decoder_input_ids" in known:
        encoded = hidden.new_zeros(len(hidden), 1, hidden.shape[-1])
        inputs = {"decoder_input_ids": ids, "encoder_outputs": (encoded,)}
    return inputs | ({"use_cache": False} if "use_cache" in known else {})


@contextmanager
def _returning(layers: Sequence[nn.Module], tuples: Sequence[int], value: torch.Tensor) -> Iterator[None]:
    """The layers give `value`, whatever they get."""
    before = [vars(layer).get("forward") for layer in layers]
    try:
        for layer, size in zip(layers, tuples):
            output = (value, *[None] * (size - 1)) if size else value
            vars(layer)["forward"] = lambda *args, _output=output, **kwargs: _output
        yield
    finally:
        for layer, forward in zip(layers, before):
            vars(layer).pop("forward", None)
            if forward is not None:
                vars(layer)["forward"] = forward
