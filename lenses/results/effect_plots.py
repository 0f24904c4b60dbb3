"""Figures of effects by site: maps of sites and columns, bars, and one method against another."""

from collections.abc import Sequence

import numpy as np
import torch
from matplotlib.figure import Figure

from diffsight.lenses.results.figure import COLORS, FONT, Plot, add_color_bar, set_heading
from diffsight.lenses.results.token_plots import shorten, visible

_LONGEST = 44  # characters of a name of a row
_END = 12  # characters kept from the end of a name that is cut
_MOST_TICKS = 48


def effect_map(
    values: torch.Tensor, rows: Sequence[str], columns: Sequence[str], axis: str, title: str, label: str
) -> Figure:
    """Draw effects, (rows, columns), in colours around 0: red above, blue below. The first row is at the bottom.

    Args:
        values: The effects.
        rows: The names of the rows.
        columns: The names of the columns.
        axis: The label of the axis of columns.
        title: The title of the figure.
        label: The label of the colour bar.
    """
    rows = list(map(_fitting, rows))
    columns = [shorten(visible(name)) for name in columns]
    widest = max(map(len, rows))
    width = min(10.0, max(3.0, 1.2 + 0.062 * widest + 0.24 * len(columns)))
    height = min(9.0, max(2.8, 1.2 + 0.15 * len(rows)))
    figure = Plot(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    limit = float(values[values.isfinite()].abs().max()) if values.isfinite().any() else 1.0
    shown = np.ma.masked_invalid(values.numpy())
    image = axes.imshow(shown, cmap="RdBu_r", vmin=-limit, vmax=limit or 1, aspect="auto", origin="lower")
    axes.set_facecolor("#b0b0b0")
    up, across = (max(1, -(-len(names) // _MOST_TICKS)) for names in (rows, columns))
    axes.set_yticks(range(0, len(rows), up), rows[::up], size=7, **FONT)
    narrow = max(map(len, columns)) > 3
    turned = {"rotation": 60, "ha": "right", "rotation_mode": "anchor"} if narrow else {}
    axes.set_xticks(range(0, len(columns), across), columns[::across], size=7, parse_math=False, **turned, **FONT)
    axes.set_xlabel(axis, size=8)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    add_color_bar(figure, image, axes, label, pad=0.02, aspect=30)
    set_heading(figure, title)
    return figure


def effect_bars(
    values: torch.Tensor, spread: torch.Tensor | None, names: Sequence[str], title: str, label: str
) -> Figure:
    """Draw effects, (sites,), as bars, with their spread if there is any. The first site is at the bottom.

    Args:
        values: The effects.
        spread: The standard deviation over prompt pairs.
        names: The names of the sites.
        title: The title of the figure.
        label: The label of the horizontal axis.
    """
    names = list(map(_fitting, names))
    width = 3.2 + 0.062 * max(map(len, names))
    figure = Plot(figsize=(width, min(9.0, 0.9 + 0.17 * len(names))), layout="constrained")
    axes = figure.add_subplot()
    axes.barh(range(len(names)), values.numpy(), height=0.7, color=COLORS[0], xerr=spread, error_kw={"linewidth": 0.8})
    up = max(1, -(-len(names) // _MOST_TICKS))
    axes.set_yticks(range(0, len(names), up), names[::up], size=7, **FONT)
    axes.axvline(0, color="#606060", linewidth=0.6)
    axes.set_xlabel(label, size=8)
    axes.tick_params(labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)
    set_heading(figure, title)
    return figure


def comparison(
    first: torch.Tensor, second: torch.Tensor, names: tuple[str, str], correlation: float, title: str
) -> Figure:
    """Draw the effects of one method against those of another, a point for each site and column, and the diagonal.

    Args:
        first: The effects on the horizontal axis.
        second: The effects on the vertical axis.
        names: The names of the methods.
        correlation: Their correlation.
        title: The title of the figure.
    """
    figure = Plot(figsize=(3.4, 3.3), layout="constrained")
    axes = figure.add_subplot()
    ends = [float(min(first.min(), second.min())), float(max(first.max(), second.max()))]
    axes.plot(ends, ends, color="#909090", linewidth=0.8, zorder=0)
    axes.plot(first.flatten().numpy(), second.flatten().numpy(), ".", color=COLORS[0], markersize=4, alpha=0.6)
    axes.set_xlabel(names[0], size=8)
    axes.set_ylabel(names[1], size=8)
    axes.text(0.04, 0.95, f"correlation {correlation:.3f}", transform=axes.transAxes, size=8, va="top")
    axes.tick_params(labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)
    set_heading(figure, title)
    return figure


def _fitting(name: str) -> str:
    """Return the name of a row, shortened before its end if it is too long, since paths differ at both ends."""
    name = visible(name)
    return name if len(name) <= _LONGEST else f"{name[: _LONGEST - _END - 1]}…{name[-_END:]}"
