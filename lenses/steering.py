"""Steering: a direction added to what layers give, in everything the model does.

    direction = happy.mean(0) - sad.mean(0)                 # of collect_activations(...), (features,)
    cheerful = steer(model, [10, 11, 12], direction, factor=4)
    cheerful.generate("I think that", max_new_tokens=20).text

Within one run it is `run.steer(layers, direction)`.
"""

from collections.abc import Sequence

import torch

from diffsight.errors import InputError
from diffsight.lenses.tokens.batches import Layers, batch_of, choose_layers
from diffsight.pipelines.language.model import LanguageModel, LanguageRun


def steer(
    model: LanguageModel,
    layers: Layers,
    vector: torch.Tensor,
    factor: float = 1.0,
    positions: int | Sequence[int] | None = None,
) -> LanguageModel:
    """A copy of the model, sharing its weights, that is steered in every run: `factor * vector`, (features,), is added
    to what each of `layers` gives.

    At all tokens, those it writes too; or at `positions` of the prompt, counted in each prompt from its first token on
    (-1 is its last). Copies can be steered again, and `edited.clear_edits()` ends it.

    Raises InputError where there is no such layer, or the vector has not as many features as a hidden state."""
    if not isinstance(model, LanguageModel):
        raise InputError(f"steer takes a LanguageModel, not {type(model).__name__}")
    chosen = choose_layers(model, layers)
    if not isinstance(vector, torch.Tensor) or vector.ndim != 1:
        given = tuple(vector.shape) if isinstance(vector, torch.Tensor) else type(vector).__name__
        raise InputError(f"steer takes a tensor of the shape (features,), not {given}")
    width = getattr(model._owner.config.get_text_config(), "hidden_size", len(vector))
    if len(vector) != width:
        raise InputError(f"the vector has {len(vector)} features, and hidden states have {width}")

    def steered(run: LanguageRun) -> None:
        for step in run.steps:
            if positions is None:
                run.steer(chosen, vector, factor)
            elif step.index == 0:
                places = batch_of(model, run, positions).where
                for row, where in zip(run.rows, places.tolist()):
                    row.steer(chosen, vector, factor, where)

    return model.edit(steered)
