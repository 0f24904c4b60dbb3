"""Steering: add a direction to hidden states in everything that a model does.

    direction = happy.mean(0) - sad.mean(0)                 # from collect_activations(...), (features,)
    cheerful = steer(model, [10, 11, 12], direction, factor=4)
    cheerful.generate("I think that", max_new_tokens=20).text

Within a single run, use `run.steer(layers, direction)`.
"""

from collections.abc import Sequence
from typing import Any

import torch

from diffsight.errors import InputError
from diffsight.lenses.layers import EMBEDDING, Layer, Layers
from diffsight.lenses.tokens.batches import batch_of
from diffsight.lenses.tokens.choosing import layers_to_read
from diffsight.pipelines.language.model import LanguageModel, LanguageRun


def steer(
    model: LanguageModel,
    layers: Layers,
    vector: torch.Tensor,
    factor: float = 1.0,
    positions: int | Sequence[int] | None = None,
) -> LanguageModel:
    """Return a copy of the model, sharing its weights, that is steered in every run.

    A copy can be steered again. `cheerful.clear_edits()` removes every edit and attached module from it.

    Args:
        model: The model.
        layers: The layers to whose output `factor * vector` is added. Layer i is `layers[i]`, -1 the last, and
            "embedding" the input of the first. None means all layers.
        vector: The direction, (features,).
        factor: Multiplies the direction.
        positions: Positions in each prompt: 0 is its first token, -1 its last. Default: all tokens, including generated
            ones.

    Returns:
        The steered copy.

    Raises:
        InputError: A layer does not exist, or the vector does not have as many features as a hidden state.
    """
    if not isinstance(model, LanguageModel):
        raise InputError(f"steer takes a LanguageModel, not {type(model).__name__}")
    chosen = layers_to_read(model, layers)
    if not isinstance(vector, torch.Tensor) or vector.ndim != 1:
        given = tuple(vector.shape) if isinstance(vector, torch.Tensor) else type(vector).__name__
        raise InputError(f"steer takes a tensor of shape (features,), not {given}")
    width = getattr(model.config.get_text_config(), "hidden_size", len(vector))
    if len(vector) != width:
        raise InputError(f"the vector has {len(vector)} features, but hidden states have {width}")

    def steered(run: LanguageRun) -> None:
        for step in run.steps:
            if positions is None:
                _add(run, chosen, vector * factor, None)
            elif step.index == 0:
                columns = batch_of(model, run, positions).where
                for row, where in zip(run.rows, columns.tolist()):
                    _add(row, chosen, vector * factor, where)

    return model.edit(steered)


def _add(handle: Any, layers: Sequence[Layer], vector: torch.Tensor, positions: list[int] | None) -> None:
    """Add a vector to what layers return in a run or a row."""
    if EMBEDDING in layers:
        hidden = handle.layers_input[0].clone()
        hidden[..., slice(None) if positions is None else positions, :] += vector.to(hidden)
        handle.layers_input[0] = hidden
    handle.steer([layer for layer in layers if layer != EMBEDDING], vector, positions=positions)
