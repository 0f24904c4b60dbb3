"""Find or replace the tensor at a point when a module returns or is passed a tuple or the like.

tensor_of((hidden, weights), "layers[3].self_attn.output", None)        # hidden: the others are of another kind
tensor_of((text, image), "transformer_blocks[0].output", 1)             # image
with_tensor((text, image), image * 0, "transformer_blocks[0].output", 1)
"""

from collections.abc import Mapping
from typing import Any

import torch

from diffsight.errors import InputError


def tensor_of(whole: Any, path: str, item: int | None) -> torch.Tensor:
    """Return the tensor at a point.

    Args:
        whole: The output or input of the module.
        path: The path of the point.
        item: The number of the tensor. None: the only one.

    Raises:
        InputError: There are several tensors of the same kind and `item` is None, or there is no tensor.
    """
    return _items(whole)[_place(whole, path, item)]


def with_tensor(whole: Any, tensor: torch.Tensor, path: str, item: int | None) -> Any:
    """Return the output or input of a module with another tensor at a point. For arguments, see `tensor_of`."""
    if isinstance(whole, torch.Tensor):
        return tensor
    place = _place(whole, path, item)
    if isinstance(whole, Mapping):
        return type(whole)(**{**whole, list(whole)[place]: tensor})
    return type(whole)([*whole[:place], tensor, *whole[place + 1 :]])


def _items(whole: Any) -> list[Any]:
    if isinstance(whole, torch.Tensor):
        return [whole]
    if isinstance(whole, Mapping):
        return list(whole.values())
    return list(whole) if isinstance(whole, (tuple, list)) else []


def _place(whole: Any, path: str, item: int | None) -> int:
    """Return the index of a point's tensor among the items of a value."""
    items = _items(whole)
    tensors = [i for i, one in enumerate(items) if isinstance(one, torch.Tensor) and one.is_floating_point()]
    if item is not None and (isinstance(whole, torch.Tensor) or item not in tensors):
        raise InputError(f"{path} has no tensor {item}: it has {len(tensors) if len(items) > 1 else 'a single'}")
    if item is not None:
        return item
    if not tensors:
        raise InputError(f"{path} is a {type(whole).__name__} without a tensor of numbers: choose another module")
    first = items[tensors[0]]
    alike = [i for i in tensors if items[i].ndim == first.ndim and items[i].shape[-1] == first.shape[-1]]
    if len(alike) > 1:
        raise InputError(f"{path} has several tensors: write {' or '.join(f'{path}[{i}]' for i in alike)}")
    return tensors[0]
