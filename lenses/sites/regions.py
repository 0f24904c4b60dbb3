"""Regions of an image: which positions of a value lie in a box of the image.

    part = region_of(value, (0, 0, 1, 0.5), model, site)        # the upper half
    value[part]

A box is (left, top, right, bottom), as shares of width and height: (0, 0) is the upper left corner.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from diffsight.errors import InputError
from diffsight.lenses.sites.site import Site
from diffsight.pipelines.diffusion.model import DiffusionModel
from diffsight.pipelines.numbers import as_number

Box = tuple[float, float, float, float]
NAMED: Mapping[str, Box] = {
    "left": (0, 0, 0.5, 1),
    "right": (0.5, 0, 1, 1),
    "top": (0, 0, 1, 0.5),
    "bottom": (0, 0.5, 1, 1),
}


def choose_regions(positions: Any) -> dict[str, Box | None]:
    """Return the regions by name. None stands for the whole value.

    Args:
        positions: None or "all"; one or several of "left", "right", "top" and "bottom", or boxes; or a mapping of names
            to boxes.

    Raises:
        InputError: A region is not a box.
    """
    if positions is None or (isinstance(positions, str) and positions == "all"):
        return {"everywhere": None}
    is_one = isinstance(positions, str) or not isinstance(positions, Iterable)
    is_one |= isinstance(positions, tuple) and not isinstance(next(iter(positions), ""), (str, tuple))
    listed = [positions] if is_one else list(positions)
    if not listed:
        raise InputError(f"no regions are chosen: pass boxes, or some of {', '.join(NAMED)}")
    if isinstance(positions, Mapping):
        return {str(name): _checked(box) for name, box in positions.items()}
    found = {}
    for item in listed:
        box = NAMED.get(item) if isinstance(item, str) else item
        if box is None:
            raise InputError(
                f"there is no region {item!r}: the regions are {', '.join(NAMED)}, or boxes (left, top, right, bottom)"
            )
        found[item if isinstance(item, str) else str(item)] = _checked(box)
    return found


def region_index(value: torch.Tensor, box: Box, model: DiffusionModel, site: Site) -> tuple[Any, ...]:
    """Return the index of the positions whose centres are in a box. `value` is the site's part of a value: (batch,
    channels, rows, columns) or (batch, positions, ...).

    Raises:
        InputError: The value has no positions of the image, or none of them is in the box.
    """
    if value.ndim == 4 and site.head_dim is None:
        return (slice(None), slice(None), *_inside(*value.shape[2:], box, site))
    dim = site.token_dim_of_part
    first, (rows, columns) = _grid(value.shape[dim], model, site)
    down, across = _inside(rows, columns, box, site)
    places = torch.arange(rows * columns).unflatten(0, (rows, columns))[down, across].flatten() + first
    return (*[slice(None)] * dim, places.to(value.device))


def _grid(count: int, model: DiffusionModel, site: Site) -> tuple[int, tuple[int, int]]:
    """Return the first position of the image among `count` positions, and its rows and columns."""
    known = [one for one in model.attentions.values() if one.grid is not None and one.queries == count]
    grids = {(one.image.start, one.grid) for one in known}
    images = {(0, one.grid) for one in model.attentions.values() if one.image is not None and len(one.image) == count}
    found = grids or images
    if len(found) != 1 or len(next(iter(found))[1]) != 2:
        raise InputError(
            f"{site.point} has {count} positions, and it is not known which of them are positions of the image: omit "
            "`positions`, or choose the output of an attention"
        )
    return next(iter(found))


def _inside(rows: int, columns: int, box: Box, site: Site) -> tuple[slice, slice]:
    left, top, right, bottom = box
    spans = []
    for count, low, high in ((rows, top, bottom), (columns, left, right)):
        inside = [i for i in range(count) if low <= (i + 0.5) / count < high]
        if not inside:
            raise InputError(f"none of the {rows} x {columns} positions of {site.point} is in the box {box}")
        spans.append(slice(inside[0], inside[-1] + 1))
    return spans[0], spans[1]


def is_box(item: Any) -> bool:
    """Return whether something has the form of a box, four numbers."""
    return isinstance(item, tuple) and len(item) == 4 and None not in map(as_number, item)


def _checked(box: Any) -> Box:
    if not is_box(box) or not (0 <= box[0] < box[2] <= 1 and 0 <= box[1] < box[3] <= 1):
        raise InputError(
            f"a region is a box (left, top, right, bottom) in shares of width and height from 0 to 1, not {box!r}"
        )
    return box
