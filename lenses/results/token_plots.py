"""Figures of token predictions: tables of tokens by layer, curves and bars of probabilities, tokens on an image."""

from collections.abc import Mapping, Sequence
from functools import cache

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.patheffects import withStroke
from PIL import Image

from diffsight.lenses.layers import Layer, layer_title
from diffsight.lenses.results.figure import (
    COLORS,
    FONT,
    Plot,
    add_color_bar,
    layer_positions,
    name_layers,
    set_heading,
)
from diffsight.lenses.results.marked_text import marked

_DASHES = ("-", "--", "-.", ":")
_LONGEST = 12  # characters of a token that a cell shows


def table(
    words: Sequence[Sequence[str]],
    probabilities: torch.Tensor,
    columns: Sequence[str],
    layers: Sequence[Layer],
    title: str,
) -> Figure:
    """Draw tokens as a table: a row for each layer, the last on top, darker where the probability is higher.

    Args:
        words: The tokens as text, (layers, columns).
        probabilities: Their probabilities, (layers, columns).
        columns: The names of the columns.
        layers: The layers.
        title: The title of the figure.
    """
    count = len(columns)
    shown = [[shorten(visible(word)) for word in row] for row in words]
    widest = max(len(text) for row in [*shown, [shorten(name) for name in columns]] for text in row)
    width = min(10, max(3.3, 1.3 + count * (0.2 + 0.066 * widest)))
    size = 7 if 1.3 + count * (0.2 + 0.066 * widest) <= 10 else max(4, 7 * 8.7 / count / (0.2 + 0.066 * widest))
    figure = Plot(figsize=(width, 0.9 + 0.165 * len(layers)), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(probabilities.numpy(), cmap="Blues", vmin=0, vmax=1, aspect="auto", origin="lower")
    for row, texts in enumerate(shown):
        for column, text in enumerate(texts):
            color = "white" if probabilities[row, column] > 0.55 else "#202020"
            axes.text(column, row, text, ha="center", va="center", size=size, color=color, **FONT)
    axes.set_xticks(range(count), [shorten(name) for name in columns], size=size, **FONT)
    axes.xaxis.tick_top()
    step = max(1, round(len(layers) / 40))
    axes.set_yticks(range(0, len(layers), step), layers[::step], size=7)
    axes.set_ylabel("layer", size=8)
    axes.tick_params(length=0)
    for edge in axes.spines.values():
        edge.set_visible(False)
    add_color_bar(figure, image, axes, "probability", pad=0.01, aspect=40)
    set_heading(figure, title)
    return figure


def curves(lines: Mapping[str, torch.Tensor], layers: Sequence[Layer], title: str) -> Figure:
    """Draw probabilities by layer as one curve for each name.

    Args:
        lines: Probabilities by name, (layers,) or (prompts, layers). For several prompts, a bold curve shows the mean
            over prompts, and thin curves show each prompt.
        layers: The layers.
        title: The title of the figure.
    """
    figure = Plot(figsize=(4.5, 2.8), layout="constrained")
    axes = figure.add_subplot()
    positions = layer_positions(layers)
    for i, (name, values) in enumerate(lines.items()):
        values = values if values.ndim > 1 else values[None]
        color, dash = COLORS[i % len(COLORS)], _DASHES[i // len(COLORS) % len(_DASHES)]
        for one in values if len(values) > 1 else ():
            axes.plot(positions, one.numpy(), color=color, linewidth=0.5, alpha=0.3)
        mean = values.mean(0).numpy()
        axes.plot(positions, mean, dash, color=color, linewidth=1.6, marker=".", markersize=4, label=name)
    axes.set_ylim(-0.02, 1.02)
    axes.set_ylabel("probability", size=8)
    name_layers(axes, layers)
    axes.tick_params(labelsize=7)
    axes.grid(axis="y", color="#e0e0e0", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, prop={"size": 7, **FONT})
    set_heading(figure, title)
    return figure


def bars(values: Mapping[str, torch.Tensor], title: str) -> Figure:
    """Draw probabilities by name, (prompts,) each: a bar for the mean, and a mark for each prompt."""
    figure = Plot(figsize=(3.3, 0.8 + 0.3 * len(values)), layout="constrained")
    axes = figure.add_subplot()
    for i, (name, each) in enumerate(values.items()):
        axes.barh(i, each.mean().item(), height=0.6, color=COLORS[i % len(COLORS)], alpha=0.6, label=name)
        axes.plot(each.numpy(), [i] * len(each), "|", color="#202020", markersize=8)
    axes.set_yticks(range(len(values)), values, size=8, **FONT)
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.set_xlabel("probability", size=8)
    axes.tick_params(labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)
    set_heading(figure, title)
    return figure


def words_on_image(image: Image.Image, words: Sequence[Sequence[str]], title: str) -> Figure:
    """Write tokens, (rows, columns), on the patches of an image, which is dimmed so that they can be read."""
    rows, columns = len(words), len(words[0])
    width = min(10, max(3.3, 0.5 * columns))
    size = max(2.5, min(7, 7 * width / columns / 0.5))
    figure = Plot(figsize=(width, 0.4 + width * image.height / image.width), layout="constrained")
    axes = figure.add_subplot()
    _show_patches(axes, image, rows, columns, alpha=0.45)
    axes.set_xticks(range(columns + 1), [])
    axes.set_yticks(range(rows + 1), [])
    axes.grid(color="white", linewidth=0.5)
    axes.tick_params(length=0)
    for row, texts in enumerate(words):
        for column, text in enumerate(texts):
            shown = visible(text)
            shown = shown if len(shown) <= 7 else f"{shown[:6]}…"
            written = axes.text(column + 0.5, row + 0.5, shown, ha="center", va="center", size=size, **FONT)
            written.set_path_effects([withStroke(linewidth=1.2, foreground="white")])
    set_heading(figure, title)
    return figure


def maps_on_image(image: Image.Image, shown: Mapping[str, torch.Tensor], layers: Sequence[Layer], title: str) -> Figure:
    """Draw probabilities by name, (layers, rows, columns) each, on a grey image: a row for each name, a column for
    each layer."""
    across, down = len(layers), len(shown)
    rows, columns = next(iter(shown.values())).shape[1:]
    side = min(1.4, 9.5 / across)
    figure = Plot(figsize=(max(3.3, side * across + 0.9), 0.6 + down * (side * image.height / image.width + 0.1)))
    figure.set_layout_engine("constrained")
    most = max(values.max().item() for values in shown.values())
    each = figure.subplots(down, across, squeeze=False)
    for i, (name, values) in enumerate(shown.items()):
        for j, layer in enumerate(layers):
            axes = each[i, j]
            drawn = axes.imshow(values[j].numpy(), extent=(0, columns, rows, 0), cmap="magma", vmin=0, vmax=most)
            _show_patches(axes, image.convert("L"), rows, columns, alpha=0.3)
            axes.set_xticks([])
            axes.set_yticks([])
            if i == 0:
                axes.set_title(layer_title(layer), size=7)
            if j == 0:
                axes.set_ylabel(name, size=7, **FONT)
    add_color_bar(figure, drawn, each, "probability", size=7, aspect=30, pad=0.02)
    set_heading(figure, title)
    return figure


def visible(text: str) -> str:
    """Return a token as text that a figure can show: as `marked` does, but with "□" for characters without a
    glyph."""
    return "".join(character if ord(character) in _glyphs() else "□" for character in marked(text))


def shorten(text: str, longest: int = _LONGEST) -> str:
    """Return a text cut to a number of characters, by default as many as a cell has room for."""
    return text if len(text) <= longest else text[: longest - 1] + "…"


@cache
def _glyphs() -> frozenset[int]:
    return frozenset(get_font(findfont(FontProperties(**FONT))).get_charmap())


def _show_patches(axes: Axes, image: Image.Image, rows: int, columns: int, alpha: float) -> None:
    """Draw an image in coordinates in which each of its patches is one unit wide and high."""
    axes.imshow(image, extent=(0, columns, rows, 0), alpha=alpha, cmap="gray")
    axes.set_xlim(0, columns)
    axes.set_ylim(rows, 0)
    axes.set_aspect(image.height / rows / (image.width / columns))  # patches need not be squares
