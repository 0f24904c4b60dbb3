"""Panels side by side, at the size of a page: curves by layer, and maps of numbers by layer.

Drawn at the size at which they are read (text of 7 points and more), in colours that differ in lightness as well.
"""

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

DPI = 200
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
    figure = Figure(figsize=(1.7 + 3.1 * len(panels), 2.9), layout="constrained")
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
    """Numbers as (rows, columns), the first row at the bottom, with the names of both; `cuts` are the numbers of rows
    and columns before which a line parts them, `marks` the column that a row points out."""

    values: np.ndarray
    rows: Sequence[str]
    columns: Sequence[str]
    cuts: tuple[Sequence[int], Sequence[int]] = ((), ())
    marks: Sequence[int] = ()


def map_panels(
    panels: Mapping[str, Map], title: str, label: str, low: float, axis: str, height: float, width: float | None = None
) -> Figure:
    """A panel a title, all in the same colours, from `low` to 1; `axis` names the columns; `height` and `width` are
    in inches, by default as wide as it takes."""
    widths = [max(1.4, 0.16 * len(panel.columns)) for panel in panels.values()]
    width = width or min(9.0, 1.1 + sum(widths) + 0.35 * len(widths))
    figure = Figure(figsize=(width, height), layout="constrained")
    everything = list(_axes(figure, len(panels), width_ratios=widths))
    for axes, (name, panel) in zip(everything, panels.items()):
        picture = axes.imshow(panel.values, vmin=low, vmax=1, cmap="viridis", aspect="auto", origin="lower")
        for draw, cuts in ((axes.axhline, panel.cuts[0]), (axes.axvline, panel.cuts[1])):
            for cut in cuts:
                draw(cut - 0.5, color="white", linewidth=1.5)
        if len(panel.marks):
            axes.plot(panel.marks, range(len(panel.rows)), "o", color="white", markeredgecolor="black", markersize=4)
        _ticks(axes.set_xticks, panel.columns, 45, rotation=90 if max(map(len, panel.columns)) > 2 else 0)
        _ticks(axes.set_yticks, panel.rows, 45)
        axes.set_xlabel(axis, size=8)
        _plain(axes, name)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
    everything[0].set_ylabel("layer", size=8)
    bar = figure.colorbar(picture, ax=everything, pad=0.01, aspect=30)
    bar.set_label(label, size=8)
    bar.ax.tick_params(labelsize=7)
    bar.outline.set_visible(False)
    if title:
        figure.suptitle(title, size=9, parse_math=False, wrap=True)
    return figure


def write(draw: Callable[[], Figure], path: Path) -> None:
    """Writes the picture that `draw` makes."""
    draw().savefig(path, dpi=DPI)


def png(figure: Figure) -> bytes:
    """A figure for a notebook."""
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=DPI)
    return data.getvalue()


def _axes(figure: Figure, count: int, sharey: bool = False, **ratios: Sequence[float]) -> list[Axes]:
    return list(figure.subplots(1, count, squeeze=False, sharey=sharey, gridspec_kw=ratios)[0])


def _plain(axes: Axes, title: str) -> None:
    axes.set_title(title, size=8, parse_math=False)
    axes.tick_params(labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)


def _ticks(put: Callable, names: Sequence[str], most: int, rotation: int = 0) -> None:
    step = -(-len(names) // most)
    put(range(0, len(names), step), names[::step], parse_math=False, rotation=rotation)
