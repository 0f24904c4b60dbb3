"""Unembedding: how a language model turns the output of its last layer into logits.

    logits = norm_and_head([norm, head], hidden)                # (..., features) to (..., vocabulary)
    logits = run_tail(model, layers, tuples, layout, hidden)    # the same, where the model does more

In most models this is the final norm and the head, and nothing else. Some models also scale hidden states, cap the
logits or join several streams of hidden states. For these, the model itself is run over single tokens with all layers
replaced: the last layer returns `hidden`, and everything after it is the model's own code.
"""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from diffsight.extending import Target
from diffsight.pipelines.module_spans import Span
from diffsight.pipelines.standard_names import embeddings


@dataclass(frozen=True)
class HiddenLayout:
    """Which dimensions of the hidden states that layers return are the batch and the tokens."""

    batch: int = 0
    tokens: int = 1
    dims: int = 3

    @classmethod
    def of(cls, shape: torch.Size, batch: int, tokens: int) -> "HiddenLayout | None":
        """Return the layout of hidden states of `batch` inputs with `tokens` tokens each; None if it is unclear.

        No other dimension may have the size `tokens`."""
        known = list(shape[:-1])
        if known[:2] == [batch, tokens]:
            return cls(dims=len(shape))
        if known.count(tokens) != 1 or known.count(batch) != 1:
            return None
        return cls(known.index(batch), known.index(tokens), len(shape))

    @property
    def is_common(self) -> bool:
        """Whether the batch is the first dimension and the tokens the second, as in almost every model."""
        return (self.batch, self.tokens) == (0, 1)

    def tokens_first(self, hidden: torch.Tensor) -> torch.Tensor:
        """Convert hidden states from a layer to `(batch, tokens, ...)`."""
        return hidden.movedim((self.batch, self.tokens), (0, 1))

    def as_given(self, hidden: torch.Tensor) -> torch.Tensor:
        """Convert `(batch, tokens, ...)` to the layout of the model's layers."""
        return hidden.movedim((0, 1), (self.batch, self.tokens))


def hidden_dtype(model: nn.Module) -> torch.dtype | None:
    """Return the type of the hidden states of a model, which is that of its word embeddings; None if it is unknown."""
    table = embeddings(model)
    weights = table.parameters() if table is not None else ()
    return next((weight.dtype for weight in weights if weight.is_floating_point() and weight.dtype.itemsize > 1), None)


def norm_and_head(parts: Sequence[Target | None], hidden: torch.Tensor) -> torch.Tensor:
    """Return the logits of hidden states, `(..., features)`, for a model that applies only norm and head.

    A part that the model does not have is None."""
    for part in parts:
        if part is not None:
            hidden = part.call(hidden) if isinstance(part, Span) else part.owner(hidden)
    return hidden


def run_tail(
    model: nn.Module, layers: Sequence[nn.Module], tuples: Sequence[int], layout: HiddenLayout, hidden: torch.Tensor
) -> torch.Tensor:
    """Return the logits that the model computes if its last layer returns `hidden`.

    Args:
        model: The model.
        layers: Its layers.
        tuples: The size of the tuple that each layer returns, 0 for a tensor.
        layout: The layout of the layers' hidden states.
        hidden: `(..., features)`, or the shape that layers return if it is not `(batch, tokens, features)`.

    Returns:
        Logits, `(..., vocabulary)`.
    """
    if not layout.is_common:
        hidden = layout.tokens_first(hidden)
    outer = hidden.shape[: hidden.ndim + 2 - layout.dims]
    rows = hidden.reshape(-1, *hidden.shape[len(outer) :])
    with _returning(layers, tuples, layout.as_given(rows[:, None])):
        output = model(**_one_token_each(model, rows))
    logits = output["logits"] if isinstance(output, Mapping) else output[0]
    return logits.reshape(*outer, -1)


def _one_token_each(model: nn.Module, hidden: torch.Tensor) -> dict[str, Any]:
    """Return inputs of one token per row. Their values do not matter, since the layers are replaced."""
    ids = torch.full((len(hidden), 1), 2, device=hidden.device)
    inputs: dict[str, Any] = {"input_ids": ids}
    known = inspect.signature(model.forward).parameters
    if model.config.is_encoder_decoder and "decoder_input_ids" in known:
        encoded = hidden.new_zeros(len(hidden), 1, hidden.shape[-1])
        inputs = {"decoder_input_ids": ids, "encoder_outputs": (encoded,)}
    return inputs | ({"use_cache": False} if "use_cache" in known else {})


@contextmanager
def _returning(layers: Sequence[nn.Module], tuples: Sequence[int], value: torch.Tensor) -> Iterator[None]:
    """Make every layer return `value`, whatever its input is."""
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
