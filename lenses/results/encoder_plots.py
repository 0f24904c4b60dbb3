"""Figures of text encoders: panels side by side with curves by layer or maps by layer, and a map of layer pairs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from diffsight.lenses.layers import Layer
from diffsight.lenses.results.figure import COLORS, Plot, add_color_bar, layer_positions, name_layers

_MARKERS = "os^Dvv<"


@dataclass(frozen=True)
class Curve:
    """Shares by layer, the number of cases that they are shares of, and the layer to mark, if any."""

    shares: Sequence[float]
    cases: int
    marked: Layer | None = None
    dashed: bool = False


def curve_panels(panels: Mapping[str, tuple[Sequence[Layer], Mapping[str, Curve]]], note: str) -> Figure:
    """Draw a panel for each title: curves by name, each with a band of one standard error.

    Args:
        panels: The layers and the curves of each panel, by title.
        note: The title of the legend.
    """
    figure = Plot(figsize=(1.7 + 3.1 * len(panels), 2.9), layout="constrained")
    everything, handles = _panels(figure, len(panels), sharey=True), {}
    names = dict.fromkeys(name for _, curves in panels.values() for name in curves)
    styles = {name: (COLORS[i % len(COLORS)], _MARKERS[i % len(_MARKERS)]) for i, name in enumerate(names)}
    for axes, (title, (layers, curves)) in zip(everything, panels.items()):
        for name, curve in curves.items():
            handles[name] = _draw_curve(axes, layers, curve, name, *styles[name])
        axes.axhline(0.5, color="#a0a0a0", linewidth=0.6, linestyle=":", zorder=0)
        name_layers(axes, layers)
        axes.set_title(title, size=8, parse_math=False)
        axes.tick_params(labelsize=7)
        axes.spines[["top", "right"]].set_visible(False)
    everything[0].set_ylim(-0.03, 1.03)
    everything[0].set_ylabel("share of prompts", size=8)
    figure.legend(
        handles.values(), handles.keys(), loc="outside right center", frameon=False, fontsize=7, title=note,
        title_fontsize=7,
    )  # fmt: skip
    return figure


def _draw_curve(axes: Axes, layers: Sequence[Layer], curve: Curve, name: str, color: str, marker: str) -> object:
    positions, shares = layer_positions(layers), np.asarray(curve.shares, dtype=float)
    error = np.sqrt(shares * (1 - shares) / curve.cases)
    axes.fill_between(positions, shares - error, shares + error, color=color, alpha=0.1, linewidth=0)
    style = {"color": color, "marker": marker, "markersize": 3, "linewidth": 1.4, "label": name}
    style["zorder"] = 3 if curve.dashed else 2  # so that both are seen where two curves coincide
    (handle,) = axes.plot(positions, shares, "--" if curve.dashed else "-", **style)
    if curve.marked is not None:
        at = list(layers).index(curve.marked)
        axes.plot(positions[at], shares[at], "o", color=color, markersize=8, fillstyle="none", zorder=3)
    return handle


@dataclass(frozen=True, eq=False)
class Map:
    """Values, (rows, columns), the first row at the bottom, and the names of rows and columns. `marks` are the columns
    to mark, one for each row."""

    values: np.ndarray
    rows: Sequence[str]
    columns: Sequence[str]
    marks: Sequence[int] = ()


def map_panels(panels: Mapping[str, Map], title: str, label: str, low: float, axis: str) -> Figure:
    """Draw a map for each title, with layers as rows, all with the same colours.

    Args:
        panels: The maps by title.
        title: The title of the figure.
        label: The label of the colour bar.
        low: The value of the darkest colour; the lightest is 1.
        axis: The label of the axis of columns.
    """
    widths = [max(1.4, 0.16 * len(panel.columns)) for panel in panels.values()]
    scale = min(1.0, 8.0 / sum(widths))
    height = 1.6 + 0.13 * min(40, max(len(panel.rows) for panel in panels.values()))
    figure = Plot(figsize=(1.1 + scale * sum(widths) + 0.35 * len(widths), height), layout="constrained")
    everything = _panels(figure, len(panels), width_ratios=widths)
    for axes, width, (name, panel) in zip(everything, widths, panels.items()):
        image = _draw_map(axes, panel.values, low)
        axes.plot(panel.marks, range(len(panel.marks)), "o", color="white", markeredgecolor="black", markersize=4)
        _name_ticks(axes, panel.rows, panel.columns, scale * width)
        axes.set_xlabel(axis, size=8)
        axes.set_title(name, size=8, parse_math=False)
    everything[0].set_ylabel("layer", size=8)
    add_color_bar(figure, image, everything, label, pad=0.01, aspect=30)
    figure.suptitle(title, size=9, parse_math=False, wrap=True)
    return figure


def block_map(values: np.ndarray, blocks: Mapping[str, Sequence[str]], title: str, label: str) -> Figure:
    """Draw a square map of values from 0 to 1, whose rows and columns are the layers of all blocks in turn.

    Args:
        values: The values, (layers of all blocks, layers of all blocks).
        blocks: The names of the layers of each block, by the name of the block.
        title: The title of the figure.
        label: The label of the colour bar.
    """
    names = [name for block in blocks.values() for name in block]
    ends = np.cumsum([len(block) for block in blocks.values()])
    middles = ends - np.array([len(block) for block in blocks.values()]) / 2 - 0.5
    side = min(6.0, max(2.4, 0.15 * len(names)))
    figure = Plot(figsize=(side + 1.1 + 0.065 * max(map(len, blocks)), side + 1.1), layout="constrained")
    axes = figure.add_subplot()
    image = _draw_map(axes, values, 0)
    for end in ends[:-1]:
        axes.axhline(end - 0.5, color="white", linewidth=1.5)
        axes.axvline(end - 0.5, color="white", linewidth=1.5)
    _name_ticks(axes, names, names, side)
    axes.set_xlabel("layer", size=8)
    axes.set_ylabel("layer", size=8)
    settings = {"fontsize": 8, "parse_math": False}
    top, right = axes.secondary_xaxis("top"), axes.secondary_yaxis("right")
    top.set_xticks(middles, blocks, rotation=30, ha="left", rotation_mode="anchor", **settings)
    right.set_yticks(middles, blocks, **settings)
    for edge in (top, right):
        edge.tick_params(length=0)
        edge.spines[:].set_visible(False)
    add_color_bar(figure, image, [axes], label, pad=0.01, aspect=30)
    figure.suptitle(title, size=9)
    return figure


def _panels(figure: Figure, count: int, sharey: bool = False, **ratios: Sequence[float]) -> list[Axes]:
    return list(figure.subplots(1, count, squeeze=False, sharey=sharey, gridspec_kw=ratios)[0])


def _draw_map(axes: Axes, values: np.ndarray, low: float) -> AxesImage:
    axes.tick_params(labelsize=7, length=0)
    axes.spines[:].set_visible(False)
    return axes.imshow(values, vmin=low, vmax=1, cmap="viridis", aspect="auto", origin="lower")


def _name_ticks(axes: Axes, rows: Sequence[str], columns: Sequence[str], width: float) -> None:
    """Name as many rows and columns as there is room for. `width` is in inches."""
    across, up = (max(1, round(len(names) / 40)) for names in (columns, rows))
    narrow = width / len(columns) * across < 0.04 + 0.06 * max(map(len, columns))
    rotation = 90 if narrow else 0
    axes.set_xticks(range(0, len(columns), across), columns[::across], rotation=rotation, parse_math=False)
    axes.set_yticks(range(0, len(rows), up), rows[::up], parse_math=False)
