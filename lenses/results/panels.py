"""Panels side by side, at the size of a page: curves by layer, and maps of numbers by layer.

Drawn at the size at which they are read (text of 7 points and more), in colours that differ in lightness as well.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from diffsight.lenses.results.plots import Plot

_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#56B4E9", "#E69F00")  # Okabe and Ito
_MARKERS = "os^Dvv<"


@dataclass(frozen=True)
class Curve:
    """Shares by layer, the number of cases behind them, and the layer to mark, if any."""

    shares: Sequence[float]
    cases: int
    marked: int | None = None
    dashed: bool = False


def curve_panels(panels: Mapping[str, tuple[Sequence[int], Mapping[str, Curve]]], note: str) -> Figure:
    """A panel a title: its layers, and its curves by name, each with a band of one standard error."""
    figure = Plot(figsize=(1.7 + 3.1 * len(panels), 2.9), layout="constrained")
    first, handles = None, {}
    colors = {name: i for i, name in enumerate(dict.fromkeys(name for _, curves in panels.values() for name in curves))}
    for axes, (title, (layers, curves)) in zip(_axes(figure, len(panels), sharey=True), panels.items()):
        first = first or axes
        for name, curve in curves.items():
            color, shares = _COLORS[colors[name] % len(_COLORS)], np.asarray(curve.shares, dtype=float)
            error = np.sqrt(shares * (1 - shares) / curve.cases)
            axes.fill_between(layers, shares - error, shares + error, color=color, alpha=0.1, linewidth=0)
            marker = _MARKERS[colors[name] % len(_MARKERS)]
            style = {"color": color, "marker": marker, "markersize": 3, "linewidth": 1.4, "label": name}
            style["zorder"] = 3 if curve.dashed else 2  # where lines lie on each other both are seen
            (handles[name],) = axes.plot(layers, shares, "--" if curve.dashed else "-", **style)
            if curve.marked is not None:
                at = shares[list(layers).index(curve.marked)]
                axes.plot(curve.marked, at, "o", color=color, markersize=8, fillstyle="none", zorder=3)
        axes.axhline(0.5, color="#a0a0a0", linewidth=0.6, linestyle=":", zorder=0)
        axes.set_xlabel("layer", size=8)
        axes.xaxis.get_major_locator().set_params(integer=True)
        _plain(axes, title)
    first.set_ylim(-0.03, 1.03)
    first.set_ylabel("share of prompts", size=8)
    figure.legend(
        handles.values(), handles.keys(), loc="outside right center", frameon=False, fontsize=7, title=note,
        title_fontsize=7,
    )  # fmt: skip
    return figure


@dataclass(frozen=True)
class Map:
    """Numbers as (rows, columns), the first row at the bottom, with the names of both; `marks` are the columns that the
    rows point out."""

    values: np.ndarray
    rows: Sequence[str]
    columns: Sequence[str]
    marks: Sequence[int] = ()


def map_panels(panels: Mapping[str, Map], title: str, label: str, low: float, axis: str) -> Figure:
    """A panel a title, rows being layers, all in the same colours, from `low` to 1; `axis` names the columns."""
    widths = [max(1.4, 0.16 * len(panel.columns)) for panel in panels.values()]
    scale = min(1.0, 8.0 / sum(widths))
    height = 1.6 + 0.13 * min(40, max(len(panel.rows) for panel in panels.values()))
    figure = Plot(figsize=(1.1 + scale * sum(widths) + 0.35 * len(widths), height), layout="constrained")
    everything = list(_axes(figure, len(panels), width_ratios=widths))
    for axes, width, (name, panel) in zip(everything, widths, panels.items()):
        picture = _map(axes, panel.values, low)
        axes.plot(panel.marks, range(len(panel.marks)), "o", color="white", markeredgecolor="black", markersize=4)
        _ticks(axes, panel.rows, panel.columns, scale * width)
        axes.set_xlabel(axis, size=8)
        axes.set_title(name, size=8, parse_math=False)
    everything[0].set_ylabel("layer", size=8)
    _bar(figure, picture, everything, label)
    figure.suptitle(title, size=9, parse_math=False, wrap=True)
    return figure


def block_map(values: np.ndarray, blocks: Mapping[str, Sequence[str]], title: str, label: str) -> Figure:
    """A square of numbers from 0 to 1, whose rows and columns are those of the blocks, one after the other."""
    names = [name for block in blocks.values() for name in block]
    ends = np.cumsum([len(block) for block in blocks.values()])
    middles = ends - np.array([len(block) for block in blocks.values()]) / 2 - 0.5
    side = min(6.0, max(2.4, 0.15 * len(names)))
    figure = Plot(figsize=(side + 1.1 + 0.065 * max(map(len, blocks)), side + 1.1), layout="constrained")
    axes = figure.add_subplot()
    picture = _map(axes, values, 0)
    for end in ends[:-1]:
        axes.axhline(end - 0.5, color="white", linewidth=1.5)
        axes.axvline(end - 0.5, color="white", linewidth=1.5)
    _ticks(axes, names, names, side)
    axes.set_xlabel("layer", size=8)
    axes.set_ylabel("layer", size=8)
    settings = {"fontsize": 8, "parse_math": False}
    top, right = axes.secondary_xaxis("top"), axes.secondary_yaxis("right")
    top.set_xticks(middles, blocks, rotation=30, ha="left", rotation_mode="anchor", **settings)
    right.set_yticks(middles, blocks, **settings)
    for edge in (top, right):
        edge.tick_params(length=0)
        edge.spines[:].set_visible(False)
    _bar(figure, picture, [axes], label)
    figure.suptitle(title, size=9)
    return figure


def _axes(figure: Figure, count: int, sharey: bool = False, **ratios: Sequence[float]) -> list[Axes]:
    return list(figure.subplots(1, count, squeeze=False, sharey=sharey, gridspec_kw=ratios)[0])


def _plain(axes: Axes, title: str) -> None:
    axes.set_title(title, size=8, parse_math=False)
    axes.tick_params(labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)


def _map(axes: Axes, values: np.ndarray, low: float) -> AxesImage:
    axes.tick_params(labelsize=7, length=0)
    axes.spines[:].set_visible(False)
    return axes.imshow(values, vmin=low, vmax=1, cmap="viridis", aspect="auto", origin="lower")


def _ticks(axes: Axes, rows: Sequence[str], columns: Sequence[str], width: float) -> None:
    """Names of rows and columns, no more than there is room for; `width` is in inches."""
    across, up = (max(1, round(len(names) / 40)) for names in (columns, rows))
    narrow = width / len(columns) * across < 0.04 + 0.06 * max(map(len, columns))
    rotation = 90 if narrow else 0
    axes.set_xticks(range(0, len(columns), across), columns[::across], rotation=rotation, parse_math=False)
    axes.set_yticks(range(0, len(rows), up), rows[::up], parse_math=False)


def _bar(figure: Figure, picture: AxesImage, axes: Sequence[Axes], label: str) -> None:
    bar = figure.colorbar(picture, ax=axes, pad=0.01, aspect=30)
    bar.set_label(label, size=8)
    bar.ax.tick_params(labelsize=7)
    bar.outline.set_visible(False)
