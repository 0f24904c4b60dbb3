"""Padding: on which side texts of different lengths are padded, and which models cannot ignore it.

    pad(rows, padding_token(tokenizer), left=True)      # {"input_ids": …, "attention_mask": …}

Texts are padded on the left if the model continues them, and on the right otherwise. Where padding on the left would
change the results of a forward pass (`reads_left_padded`), its inputs are padded on the right. A model that cannot
ignore padding does not continue texts of different lengths in one batch.
"""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from diffsight.errors import InputError
from diffsight.extending import unwrapped

_IGNORE_MASKS = {"rwkv", "xlstm"}  # recurrent models, in which every token counts
_TABLES = ("embed_positions", "position_embeddings")  # tables of learned or fixed vectors, one per position


def pads_left(model: nn.Module) -> bool:
    """Return whether shorter inputs are padded on the left. They are if the model continues them."""
    return not model.config.is_encoder_decoder and getattr(model, "can_generate", lambda: False)()


def sees_padding(model: nn.Module, layers: str) -> bool:
    """Return whether padding before the tokens of a row changes their results, although it is masked.

    This is the case if the model counts positions from the padding and takes no position ids, or if it ignores masks.
    `layers` is the path of the layers."""
    known = inspect.signature(unwrapped(model).forward).parameters
    if "attention_mask" not in known or getattr(model.config, "model_type", "") in _IGNORE_MASKS:
        return True
    tables = (path for path, _ in model.named_modules() if path.endswith(_TABLES))
    return "position_ids" not in known and any(layers.startswith(path.rpartition(".")[0]) for path in tables)


def reads_left_padded(model: nn.Module, layers: str) -> bool:
    """Return whether padding on the left leaves the results of a forward pass as they are.

    It does not if the model sees the padding, or if its attention selects a few tokens or blocks of tokens, which would
    include the padding."""
    picks_tokens = any("Indexer" in type(module).__name__ for module in model.modules())
    return not (picks_tokens or sees_padding(model, layers))


def cannot_ignore_padding(model: nn.Module) -> InputError:
    """Return the error for texts of different lengths that a model cannot continue in one batch."""
    return InputError(
        f"{type(model).__name__} cannot ignore padding, so it cannot continue texts of different lengths in one batch: "
        "use [model.generate(text) for text in texts]"
    )


def padding_token(tokenizer: Any) -> int:
    """Return the token id that a tokenizer pads with; 0 if it has none."""
    known = (getattr(tokenizer, name, None) for name in ("pad_token_id", "eos_token_id"))
    return next((n for n in known if n is not None), 0)


def pad(rows: Sequence[torch.Tensor], padding: int, left: bool) -> dict[str, torch.Tensor]:
    """Return the token ids of all rows, `(rows, tokens)`, and the mask that is 0 where a row is padded."""
    length = max(len(row) for row in rows)
    ids = torch.full((len(rows), length), padding, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        place = slice(length - len(row), length) if left else slice(0, len(row))
        ids[i, place], mask[i, place] = row, 1
    return {"input_ids": ids, "attention_mask": mask}
