"""Whether the layers of a language model can start from a stored hidden state alone.

Some models pass more than hidden states from layer to layer, such as keys and values. This is tested by running the
last layer.
"""

from collections.abc import Mapping
from typing import Any

import torch

from diffsight.lenses.patching.shared_prefix import agree
from diffsight.lenses.tokens.batches import open_batches
from diffsight.pipelines.language.model import LanguageModel


@torch.no_grad()
def can_start_from(
    model: LanguageModel,
    prompts: list,
    last_input: torch.Tensor,
    expected: torch.Tensor,
    inputs: Mapping[str, Any] | None = None,
) -> bool:
    """Return whether the last layer, run on a stored input alone, leads to the result of the whole model.

    Args:
        model: The model.
        prompts: The prompts, one for each row.
        last_input: The input of the last layer.
        expected: The logits of the whole model at the last tokens, (rows, vocabulary).
        inputs: Further inputs of the model.
    """
    (batch,) = open_batches(model, prompts, -1, len(prompts), **inputs or {})
    try:
        with batch.run as run:
            run.skip_layers(0, len(model.layers_output) - 2, last_input)
            logits = batch.pick(run.logits)
    except Exception:  # the model needs something besides hidden states
        return False
    return agree(logits, expected, is_same_batch=True)
