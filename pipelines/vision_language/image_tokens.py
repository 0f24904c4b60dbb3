"""Image tokens: the tokens of a text that stand for its images.

positions = image_tokens(model.module.config, processor, ids)[0]    # of the first input, in order
hidden[0, positions]                                                # (image tokens, features)
"""

from typing import Any

import torch

from diffsight.errors import InputError


def image_tokens(config: Any, processor: Any, tokens: torch.Tensor | None) -> list[torch.Tensor]:
    """Return the positions of the image tokens of each input, in order.

    Args:
        config: The configuration of the model.
        processor: Its processor.
        tokens: The token ids, (batch, tokens).

    Raises:
        InputError: The model has no image tokens, or no ids were passed.
    """
    names = ("image_token_id", "image_token_index")
    known = [*(getattr(config, name, None) for name in names), getattr(processor, "image_token_id", None)]
    mark = next((mark for mark in known if mark is not None), None)
    if mark is None:
        raise InputError(f"{type(config).__name__.removesuffix('Config')} has no image tokens in its sequence")
    if tokens is None:
        raise InputError("run.image_tokens needs token ids as inputs, since image tokens are found by their id")
    return [(row == mark).nonzero().flatten() for row in tokens]
