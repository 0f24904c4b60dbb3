"""The contents of a result, as data: images, tables of words, curves, heat maps, and maps on an image.

A result lists its sections in `sections()`. The HTML page (`page.py`) and the terminal (`terminal.py`) draw them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from PIL import Image


@dataclass(frozen=True)
class Media:
    """A video or a sound: an image that stands for it, and the file that plays it."""

    image: Image.Image
    mime: str
    data: bytes = field(repr=False)


@dataclass(frozen=True)
class ImageSection:
    """Images in rows, by the names of rows and of cells. A single row may have the name ""."""

    title: str
    rows: Mapping[str, Mapping[str, Image.Image | Media]]


@dataclass(frozen=True)
class Cell:
    """A cell of a table. `value`, from 0 to 1, colours it, and `details` are the texts and values behind it."""

    text: str
    value: float | None = None
    details: Sequence[tuple[str, float]] = ()


@dataclass(frozen=True)
class TableSection:
    """A table: names of rows to their cells, one for each of `columns`. `corner` is the title of the names of rows."""

    title: str
    corner: str
    columns: Sequence[str]
    rows: Mapping[str, Sequence[Cell]]
    label: str = "probability"


@dataclass(frozen=True)
class CurveSection:
    """Curves by name over the same places, such as layers. `axis` names the places, `label` the values."""

    title: str
    axis: str
    places: Sequence[str]
    lines: Mapping[str, Sequence[float]]
    label: str = "probability"


@dataclass(frozen=True, eq=False)
class HeatMapSection:
    """A heat map of values, (rows, columns)."""

    title: str
    rows: Sequence[str]
    columns: Sequence[str]
    values: torch.Tensor
    label: str
    axes: tuple[str, str] = ("layer", "layer")  # titles of rows and columns


@dataclass(frozen=True, eq=False)
class OverlaySection:
    """Maps by name, (rows, columns) each, on an image, and the words of their cells if there are any."""

    title: str
    image: Image.Image
    maps: Mapping[str, torch.Tensor]
    words: Mapping[str, Sequence[Sequence[str]]] = field(default_factory=dict)
    label: str = "probability"


def distinct(names: Sequence[str]) -> list[str]:
    """Return names, with the position added where a name occurs several times."""
    return [f"{name} ({i})" if names.count(name) > 1 else name for i, name in enumerate(names, 1)]


Section = ImageSection | TableSection | CurveSection | HeatMapSection | OverlaySection
