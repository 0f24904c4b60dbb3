"""Where the tokens of a picture lie on it: the vision tower cuts a picture into patches, and each image token is one of
them, or a square of several.

    grid = image_grids(model, tokenizer, values, positions)[0][0]      # of the first picture of the first input
    hidden[0, grid]                                                     # (rows, columns, features)
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
_MIXED = re.compile(r"resampler|qformer|perceiver", re.IGNORECASE)  # mixes all patches into tokens without a place


def image_grids(
    net: nn.Module, tokenizer: Any, values: Mapping[str, Any], positions: Sequence[torch.Tensor]
) -> list[list[torch.Tensor]]:
    """For each input, for each of its pictures, the positions of the picture's tokens as they lie on it, (rows,
    columns). `values` are the arguments of the forward pass, `positions` those of the image tokens, of each input.

    Of a picture that is looked at in tiles and as a whole, it is the tiles, put together.

    Raises InputError where the tokens lie on no grid, or it cannot be told."""
    mixes = next((m for m in net.modules() if _MIXED.search(type(m).__name__)), None)
    if mixes is not None:
        raise InputError(
            f"the image tokens of {type(net).__name__} lie on no grid: {type(mixes).__name__} mixes the patches"
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
            f"where the image tokens of {type(net).__name__} lie on the picture cannot be told: their number does not "
            "follow from the size of the picture and of its patches. run.image_tokens are their positions"
        )
    return found


# ---- picture after picture


def _in_order(net: nn.Module, values: Mapping, positions: Sequence[torch.Tensor]) -> list[list[torch.Tensor]] | None:
    """The grids of pictures whose tokens follow each other, line by line."""
    extra = 1 if getattr(net.config, "vision_feature_select_strategy", None) == "full" else 0  # a class token, first
    sizes = _told_sizes(net, values) or _sizes(net, values, sum(map(len, positions)), extra)
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


def _told_sizes(net: nn.Module, values: Mapping) -> list[tuple[int, int]] | None:
    """The sizes that the processor tells, in patches; Qwen2-VL and its kin merge squares of them."""
    told = values.get("image_grid_thw")
    if told is None:
        return None
    merged = getattr(net.config.vision_config, "spatial_merge_size", 1)
    return [(frames * height // merged, width // merged) for frames, height, width in told.tolist()]


def _sizes(net: nn.Module, values: Mapping, tokens: int, extra: int) -> list[tuple[int, int]] | None:
    """The sizes in tokens that follow from those in pixels, where all pictures together have `tokens`."""
    pixels, patch = values.get("pixel_values"), _patch(net)
    if patch is None or not isinstance(pixels, torch.Tensor) or pixels.ndim != 4:
        return None
    told = values.get("image_sizes")
    sizes = [tuple(pixels.shape[-2:])] * len(pixels) if told is None else torch.as_tensor(told).tolist()
    patches = [(height // patch, width // patch) for height, width in sizes]
    return next((found for found in _merged(patches) if sum(h * w + extra for h, w in found) == tokens), None)


def _merged(patches: Sequence[tuple[int, int]]) -> Iterator[list[tuple[int, int]]]:
    """The sizes with squares of 1, 4, 9 … patches as one token."""
    for side in takewhile(lambda side: side <= min(min(size) for size in patches), count(1)):
        if all(height % side == 0 and width % side == 0 for height, width in patches):
            yield [(height // side, width // side) for height, width in patches]


def _patch(net: nn.Module) -> int | None:
    size = getattr(getattr(net.config, "vision_config", None), "patch_size", None)
    return size[0] if isinstance(size, (list, tuple)) else size


# ---- tiles, as Idefics3 and SmolVLM mark them


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
            else:  # comes last
                own.append(_joined(tiles) if tiles else tile)
                tiles = {}
        grids.append(own)
    return grids


# ---- tiles without marks, as LLaVA-NeXT has them


def _of_unpadded_tiles(net: nn.Module, values: Mapping, positions: Sequence[torch.Tensor]) -> list | None:
    """First come the tokens of the whole picture, then those of the tiles, put together and without what was padded,
    line by line, each with a token for its end."""
    choices, told = getattr(net.config, "image_grid_pinpoints", None), values.get("image_sizes")
    vision = net.config.vision_config if choices and told is not None else None
    if vision is None:
        return None
    side = vision.image_size // _patch(net)
    sizes, grids = iter(torch.as_tensor(told).tolist()), []
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
    """Of a grid of tokens, (rows, columns), the part that a picture of the size (height, width) takes, which is scaled
    to fit and stands in the middle."""
    (height, width), (rows, columns) = size, tokens
    if width / height > columns / rows:
        return rows - (rows - int(round(height * columns / width, 7))) // 2 * 2, columns
    return rows, columns - (columns - int(round(width * rows / height, 7))) // 2 * 2


def _runs(positions: torch.Tensor) -> list[torch.Tensor]:
    """Positions, cut where one is left out."""
    gaps = (positions.diff() != 1).nonzero().flatten() + 1
    return [run for run in positions.tensor_split(gaps.cpu()) if len(run)]


def _joined(tiles: Mapping[tuple[int, int], torch.Tensor]) -> torch.Tensor:
    rows = sorted({row for row, _ in tiles})
    return torch.cat([torch.cat([tiles[at] for at in sorted(tiles) if at[0] == row], dim=1) for row in rows])


def _count(size: tuple[int, int]) -> int:
    return size[0] * size[1]
