"""The figures of results: their size, fonts, colours, titles, and the axis of layers.

Figures are drawn at the size at which they are read: text of 7 points, on white, in colours that also differ in
lightness.
"""

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from diffsight.lenses.layers import EMBEDDING, Layer, in_model_order

FONT = {"family": "DejaVu Sans"}
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#56B4E9", "#E69F00")  # Okabe and Ito
_DPI = 200
_SCREEN_DPI = 120
_TICKS = 6  # layers that are named along an axis


class Plot(Figure):
    """A figure that a notebook displays. A plain matplotlib figure is displayed only if pyplot was imported before."""

    def _repr_png_(self) -> bytes:
        data = io.BytesIO()
        self.savefig(data, format="png", dpi=_SCREEN_DPI)
        return data.getvalue()


def write_figure(draw: Callable[[], Figure], path: Path) -> None:
    """Write the figure that `draw` returns to a file."""
    draw().savefig(path, dpi=_DPI)


def set_heading(figure: Figure, title: str) -> None:
    """Put a title above the figure, on one line. A title that is too long is cut."""
    title = " ".join(title.split())
    room = int(figure.get_figwidth() / 0.075)
    figure.suptitle(title if len(title) <= room else f"{title[: room - 1]}…", size=9, parse_math=False, **FONT)


def add_color_bar(figure: Figure, image: Any, axes: Any, label: str, size: int = 8, **settings: float) -> None:
    """Put the colour bar of an image beside its axes."""
    bar = figure.colorbar(image, ax=axes, **settings)
    bar.set_label(label, size=size)
    bar.ax.tick_params(labelsize=size - 1)
    bar.outline.set_visible(False)


def layer_positions(layers: Sequence[Layer]) -> list[int]:
    """Return the positions of layers on an axis: layer i at i, the embedding at -1."""
    return [-1 if layer == EMBEDDING else layer for layer in layers]


def name_layers(axes: Axes, layers: Sequence[Layer]) -> None:
    """Name the layers along the horizontal axis."""
    axes.set_xlabel("layer", size=8)
    if EMBEDDING not in layers:
        axes.xaxis.get_major_locator().set_params(integer=True)
        return
    numbers = in_model_order(layers)[1:]
    numbers = numbers[:: max(1, round(len(numbers) / _TICKS))]
    axes.set_xticks([-1, *numbers], [EMBEDDING, *map(str, numbers)])
    axes.get_xticklabels()[0].set_horizontalalignment("right")  # otherwise it runs into the next name
