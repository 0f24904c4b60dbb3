"""Image grids: the places of a text's image tokens on the image.

    grid = image_grids(model, tokenizer, values, positions)[0][0]      # the first image of the first input
    hidden[0, grid]                                                     # (rows, columns, features)

The vision tower cuts an image into patches, and each image token stands for a patch or a square of patches.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import count, takewhile
from typing import Any

import torch
from torch import nn
from transformers.image_processing_utils import select_best_resolution

from diffsight.errors import InputError

_TILE = re.compile(r"<row_(\d+)_col_(\d+)>")
_WHOLE = "<global-img>"
_MIXED = re.compile(r"resampler|qformer|perceiver", re.IGNORECASE)  # mix all patches, so tokens have no place


def image_grids(
    net: nn.Module, tokenizer: Any, values: Mapping[str, Any], positions: Sequence[torch.Tensor]
) -> list[list[torch.Tensor]]:
    """Return the grids of the positions of image tokens: for each input, a list with one grid per image.

    If the model receives an image both in tiles and as a whole, the grid covers the assembled tiles.

    Args:
        net: The model.
        tokenizer: Its tokenizer.
        values: The arguments of the forward pass.
        positions: The positions of the image tokens of each input.

    Returns:
        For each input and each of its images, the positions of the image's tokens, `(rows, columns)`.

    Raises:
        InputError: The tokens have no grid, or the grid is unknown.
    """
    mixes = next((m for m in net.modules() if _MIXED.search(type(m).__name__)), None)
    if mixes is not None:
        raise InputError(
            f"the image tokens of {type(net).__name__} lie on no grid, because {type(mixes).__name__} mixes the patches"
        )
    if not any(map(len, positions)):
        return [[] for _ in positions]
    found = (
        _of_tiles(net, tokenizer, values, positions)
        or _of_unpadded_tiles(net, values, positions)
        or _in_order(net, values, positions)
    )
    if found is None:
        raise InputError(
            f"the places of the image tokens of {type(net).__name__} on the image are unknown: their number does not "
            "follow from the size of the image and of its patches. run.image_tokens has their positions"
        )
    return found


# ---- one image after the other


def _in_order(net: nn.Module, values: Mapping, positions: Sequence[torch.Tensor]) -> list[list[torch.Tensor]] | None:
    """Return the grids of images whose tokens follow each other, line by line."""
    extra = (
        1 if getattr(net.config, "vision_feature_select_strategy", None) == "full" else 0
    )  # a class token at the beginning
    sizes = _reported_sizes(net, values) or _sizes(net, values, sum(map(len, positions)), extra)
    if sizes is None:
        return None
    waiting, grids = iter(sizes), []
    for row in positions:
        own, start = [], 0
        while start < len(row):
            height, width = next(waiting, (0, 0))
            end = start + extra + height * width
            if not height * width or end > len(row):
                return None
            own.append(row[start + extra : end].reshape(height, width))
            start = end
        grids.append(own)
    return grids


def _reported_sizes(net: nn.Module, values: Mapping) -> list[tuple[int, int]] | None:
    """Return the sizes that the processor reports. Qwen2-VL and similar models merge squares of patches."""
    reported = values.get("image_grid_thw")
    if reported is None:
        return None
    merged = getattr(net.config.vision_config, "spatial_merge_size", 1)
    return [(frames * height // merged, width // merged) for frames, height, width in reported.tolist()]


def _sizes(net: nn.Module, values: Mapping, tokens: int, extra: int) -> list[tuple[int, int]] | None:
    """Return each image's size in tokens, computed from its size in pixels; None unless they add up to `tokens`."""
    pixels, patch = values.get("pixel_values"), _patch(net)
    if patch is None or not isinstance(pixels, torch.Tensor) or pixels.ndim != 4:
        return None
    reported = values.get("image_sizes")
    sizes = [tuple(pixels.shape[-2:])] * len(pixels) if reported is None else torch.as_tensor(reported).tolist()
    patches = [(height // patch, width // patch) for height, width in sizes]
    return next((found for found in _merged(patches) if sum(h * w + extra for h, w in found) == tokens), None)


def _merged(patches: Sequence[tuple[int, int]]) -> Iterator[list[tuple[int, int]]]:
    """Yield the sizes of the images in tokens, where each token stands for a square of 1, 4, 9 … patches."""
    for side in takewhile(lambda side: side <= min(min(size) for size in patches), count(1)):
        if all(height % side == 0 and width % side == 0 for height, width in patches):
            yield [(height // side, width // side) for height, width in patches]


def _patch(net: nn.Module) -> int | None:
    size = getattr(getattr(net.config, "vision_config", None), "patch_size", None)
    return size[0] if isinstance(size, (list, tuple)) else size


# ---- tiles with markers, as in Idefics3 and SmolVLM


def _of_tiles(
    net: nn.Module, tokenizer: Any, values: Mapping, positions: Sequence[torch.Tensor]
) -> list[list[torch.Tensor]] | None:
    pixels, patch, grids = values.get("pixel_values"), _patch(net), []
    if patch is None or not isinstance(pixels, torch.Tensor) or tokenizer is None:
        return None
    height, width = (side // patch for side in pixels.shape[-2:])
    for ids, row in zip(values["input_ids"].tolist(), positions):
        own, tiles = [], {}
        for run in _runs(row):
            before = int(run[0]) - 1
            mark = tokenizer.convert_ids_to_tokens(ids[before]) if before >= 0 else ""
            place = _TILE.fullmatch(mark)
            size = next((found[0] for found in _merged([(height, width)]) if _count(found[0]) == len(run)), None)
            if size is None or not (place or mark == _WHOLE):
                return None
            tile = run.reshape(size)
            if place:
                tiles[int(place[1]), int(place[2])] = tile
            else:  # the whole image comes last
                own.append(_joined(tiles) if tiles else tile)
                tiles = {}
        grids.append(own)
    return grids


# ---- tiles without markers, as in LLaVA-NeXT


def _of_unpadded_tiles(net: nn.Module, values: Mapping, positions: Sequence[torch.Tensor]) -> list | None:
    """Return the grids of assembled tiles whose tokens follow the tokens of the whole image. The tokens of the tiles
    are in lines, without the padding, and each line ends with an extra token."""
    choices, reported = getattr(net.config, "image_grid_pinpoints", None), values.get("image_sizes")
    vision = net.config.vision_config if choices and reported is not None else None
    if vision is None:
        return None
    side = vision.image_size // _patch(net)
    sizes, grids = iter(torch.as_tensor(reported).tolist()), []
    for row in positions:
        own, start = [], 0
        while start < len(row):
            size = next(sizes, None)
            if size is None:
                return None
            height, width = select_best_resolution(size, choices)
            rows, columns = _unpadded(size, (height // vision.image_size * side, width // vision.image_size * side))
            first = start + side * side
            end = first + rows * (columns + 1)
            if end > len(row):
                return None
            own.append(row[first:end].reshape(rows, columns + 1)[:, :-1])
            start = end
        grids.append(own)
    return grids


def _unpadded(size: Sequence[int], tokens: tuple[int, int]) -> tuple[int, int]:
    """Return the part of a grid of tokens, `(rows, columns)`, that an image of size `(height, width)` covers when it is
    scaled to fit and centred."""
    (height, width), (rows, columns) = size, tokens
    if width / height > columns / rows:
        return rows - (rows - int(round(height * columns / width, 7))) // 2 * 2, columns
    return rows, columns - (columns - int(round(width * rows / height, 7))) // 2 * 2


def _runs(positions: torch.Tensor) -> list[torch.Tensor]:
    """Split positions into runs of consecutive positions."""
    gaps = (positions.diff() != 1).nonzero().flatten() + 1
    return [run for run in positions.tensor_split(gaps.cpu()) if len(run)]


def _joined(tiles: Mapping[tuple[int, int], torch.Tensor]) -> torch.Tensor:
    rows = sorted({row for row, _ in tiles})
    return torch.cat([torch.cat([tiles[at] for at in sorted(tiles) if at[0] == row], dim=1) for row in rows])


def _count(size: tuple[int, int]) -> int:
    return size[0] * size[1]
