"""The inputs of several invokes as one batch, and the seeds of its images."""

from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

import torch
from PIL.Image import Image

from diffsight.errors import InputError

_TOKENS = {"input_ids", "attention_mask"}


def joined_inputs(invoked_with: Sequence[tuple[tuple, dict[str, Any]]], tokenizer: Any) -> list[Any]:
    """Return one list with the inputs of all invokes.

    Args:
        invoked_with: The arguments of each invoke: a text, a list or a tensor, or token ids by name.
        tokenizer: Tokenizes the texts if some inputs are texts and others token ids; None if there is no tokenizer.
    """
    rows = [row for args, kwargs in invoked_with for row in _rows(args, kwargs)]
    if tokenizer is not None and len({isinstance(row, str) for row in rows}) == 2:
        rows = [torch.tensor(tokenizer(row)["input_ids"]) if isinstance(row, str) else row for row in rows]
    return [row[None] if isinstance(row, torch.Tensor) else row for row in rows]


def joined_seeds(invoked_with: Sequence[tuple[tuple, dict[str, Any]]], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the seeds of all images of several invokes, as an argument: each image has the seed that it had there.

    Args:
        invoked_with: The arguments of each invoke.
        arguments: The arguments of all of them, such as `seed` and `num_images_per_prompt`.
    """
    seed = arguments.get("seed")
    if seed is None:
        return {}
    each = import_module("diffsight.pipelines.diffusion.input_counts").count_images_each(arguments)
    seeds_of_images = import_module("diffsight.pipelines.seeds").seeds_of_images
    return {"seed": [one for invoked in invoked_with for one in seeds_of_images(seed, len(_rows(*invoked)) * each)]}


def _rows(args: tuple, kwargs: Mapping[str, Any]) -> Sequence[Any]:
    (given,) = args if len(args) == 1 and not kwargs else (None,)
    named = given if isinstance(given, Mapping) else kwargs
    if isinstance(given, (str, Image)):
        return [given]
    if isinstance(given, (list, torch.Tensor)) and len(given):
        return [given] if isinstance(given[0], int) or getattr(given, "ndim", 2) < 2 else list(given)
    if (not args and "input_ids" in named and named.keys() <= _TOKENS) or (
        isinstance(given, Mapping) and given.keys() <= _TOKENS
    ):
        return _tokens(torch.as_tensor(named["input_ids"]), named.get("attention_mask"))
    raise InputError(
        "invoke() without an input joins texts, lists, tensors and token ids, and an invoke before it has something "
        "else: trace all inputs at once"
    )


def _tokens(ids: torch.Tensor, mask: Any) -> list[torch.Tensor]:
    """Return the token ids of each row without padding."""
    ids = ids if ids.ndim == 2 else ids[None]
    if mask is None:
        return list(ids)
    return [row[own.bool()] for row, own in zip(ids, torch.as_tensor(mask).reshape(ids.shape))]
