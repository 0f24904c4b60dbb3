"""The layers and tokens that lenses on language models read, as the user chooses them."""

from collections.abc import Iterable
from typing import Any

import torch

from diffsight.errors import InputError
from diffsight.lenses.layers import EMBEDDING, Layer, Layers, choose_layers, in_model_order
from diffsight.lenses.options import check_kind
from diffsight.pipelines.language.model import LanguageModel, LanguageRun
from diffsight.pipelines.numbers import as_integer, unpacked

Tokens = str | int | Iterable[str | int] | None


def layers_and_tokens(
    lens: str, model: Any, layers: Layers, tokens: Tokens, top_k: int
) -> tuple[tuple[Layer, ...], tuple[int, ...], int]:
    """Return the layers and the token ids that a lens reads, and how many of the most likely tokens.

    Raises:
        InputError: The lens cannot read this model, a layer or token does not exist, or there are fewer than
            `top_k` tokens.
    """
    check_language_model(lens, model)
    top_k = check_count("top_k", top_k, model.vocabulary_size)
    return layers_to_read(model, layers), () if tokens is None else choose_tokens(model, tokens), top_k


def check_language_model(lens: str, model: Any) -> None:
    """Check that `model` has a head, and layers with one hidden state for each token.

    Raises:
        InputError: `model` has no head or no such layers, or is not a LanguageModel.
    """
    check_kind(lens, model, LanguageModel)
    if not hasattr(model, "lm_head"):
        raise InputError(f"{lens}: no lm_head was found in {model.label}, so layers cannot be read as tokens")
    if model.hidden_layout is None:
        raise InputError(
            f"{lens}: the layers of {model.label} do not return one hidden state for each token, or are called several "
            "times in a pass"
        )
    if model.mixes_layers:
        raise InputError(f"{lens}: the logits of {model.label} come from several layers, so no layer alone has any")


def layers_to_read(model: LanguageModel, layers: Layers) -> tuple[Layer, ...]:
    """Return the chosen layers in the order in which the model runs them. None means all layers.

    Raises:
        InputError: A layer does not exist, or no layer is chosen.
    """
    return in_model_order(choose_layers(slice(None) if layers is None else layers, len(model.layers_output)))


def hidden_states(run: LanguageRun, layer: Layer) -> torch.Tensor:
    """Return the hidden states at a layer of a run, (batch, tokens, features)."""
    return run.layers_input[0] if layer == EMBEDDING else run.layers_output[layer]


def choose_tokens(model: LanguageModel, tokens: Tokens) -> tuple[int, ...]:
    """Return the ids of the chosen tokens, given as ids, or as strings that are one token each, such as " Paris".

    Raises:
        InputError: A token does not exist, a string is not one token, or no token is chosen.
    """
    tokens = unpacked(tokens)
    chosen = [tokens] if isinstance(tokens, str) or not isinstance(tokens, Iterable) else list(tokens)
    if not chosen:
        raise InputError("no tokens are chosen: pass some, or omit `tokens`")
    known = model.vocabulary_size
    ids = []
    for token in chosen:
        number = model.token_id(token) if isinstance(token, str) else as_integer(token)
        if number is None:
            raise InputError(f"a token must be a string such as ' Paris', or an id, not {token!r}")
        if number < 0 or (known is not None and number >= known):
            raise InputError(f"there is no token {token}: the model knows 0 to {(known or 1) - 1}")
        ids.append(number)
    return tuple(ids)


def check_count(name: str, value: Any, most: int | None = None) -> int:
    """Return `value` as a positive integer, at most `most`.

    Raises:
        InputError: `value` is not such an integer.
    """
    number = as_integer(value)
    if number is None or number < 1 or (most and number > most):
        wanted = f"an integer from 1 to {most}" if most else "a positive integer"
        raise InputError(f"{name} must be {wanted}, not {value!r}")
    return number
