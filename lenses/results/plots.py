"""Pictures of predictions, for papers: a table of tokens by layer, and curves of probabilities.

They are drawn at the size at which they are read (10 inches wide at most, text of 7 points), in colours that differ in
lightness as well, on white.
"""

import io
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.patheffects import withStroke
from PIL import Image

DPI = 200
_SCREEN_DPI = 120
_FONT = {"family": "DejaVu Sans"}
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito
_DASHES = ("-", "--", "-.", ":")
_LONGEST = 12  # letters of a token that a cell shows


class Plot(Figure):
    """A figure that a notebook shows by itself; one of matplotlib's own is shown where pyplot was imported before."""

    def _repr_png_(self) -> bytes:
        data = io.BytesIO()
        self.savefig(data, format="png", dpi=_SCREEN_DPI)
        return data.getvalue()


def table(
    words: Sequence[Sequence[str]],
    probabilities: torch.Tensor,
    columns: Sequence[str],
    layers: Sequence[int],
    title: str,
) -> Figure:
    """`words` and `probabilities`, (layers, columns), as a table: the last layer on top, darker where surer."""
    count = len(columns)
    shown = [[shorten(visible(word)) for word in row] for row in words]
    widest = max(len(text) for row in [*shown, [shorten(name) for name in columns]] for text in row)
    width = min(10, max(3.3, 1.3 + count * (0.2 + 0.066 * widest)))
    size = 7 if 1.3 + count * (0.2 + 0.066 * widest) <= 10 else max(4, 7 * 8.7 / count / (0.2 + 0.066 * widest))
    figure = Plot(figsize=(width, 0.9 + 0.165 * len(layers)), layout="constrained")
    axes = figure.add_subplot()
    picture = axes.imshow(probabilities.numpy(), cmap="Blues", vmin=0, vmax=1, aspect="auto", origin="lower")
    for row, texts in enumerate(shown):
        for column, text in enumerate(texts):
            color = "white" if probabilities[row, column] > 0.55 else "#202020"
            axes.text(column, row, text, ha="center", va="center", size=size, color=color, **_FONT)
    axes.set_xticks(range(count), [shorten(name) for name in columns], size=size, **_FONT)
    axes.xaxis.tick_top()
    step = max(1, round(len(layers) / 40))
    axes.set_yticks(range(0, len(layers), step), layers[::step], size=7)
    axes.set_ylabel("layer", size=8)
    axes.tick_params(length=0)
    for edge in axes.spines.values():
        edge.set_visible(False)
    bar = figure.colorbar(picture, ax=axes, pad=0.01, aspect=40)
    bar.set_label("probability", size=8)
    bar.ax.tick_params(labelsize=7)
    bar.outline.set_visible(False)
    _head(figure, title)
    return figure


def curves(lines: Mapping[str, torch.Tensor], layers: Sequence[int], title: str) -> Figure:
    """Probabilities by layer: a line a name. Of several prompts, (prompts, layers), their mean, and each one thin."""
    figure = Plot(figsize=(4.5, 2.8), layout="constrained")
    axes = figure.add_subplot()
    for i, (name, values) in enumerate(lines.items()):
        values = values if values.ndim > 1 else values[None]
        color, dash = _COLORS[i % len(_COLORS)], _DASHES[i // len(_COLORS) % len(_DASHES)]
        for one in values if len(values) > 1 else ():
            axes.plot(layers, one.numpy(), color=color, linewidth=0.5, alpha=0.3)
        mean = values.mean(0).numpy()
        axes.plot(layers, mean, dash, color=color, linewidth=1.6, marker=".", markersize=4, label=name)
    axes.set_ylim(-0.02, 1.02)
    axes.set_xlabel("layer", size=8)
    axes.set_ylabel("probability", size=8)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.tick_params(labelsize=7)
    axes.grid(axis="y", color="#e0e0e0", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, prop={"size": 7, **_FONT})
    _head(figure, title)
    return figure


def bars(values: Mapping[str, torch.Tensor], title: str) -> Figure:
    """Probabilities, (prompts,), of a few names: a bar for their mean, and a point a prompt."""
    figure = Plot(figsize=(3.3, 0.8 + 0.3 * len(values)), layout="constrained")
    axes = figure.add_subplot()
    for i, (name, each) in enumerate(values.items()):
        axes.barh(i, each.mean().item(), height=0.6, color=_COLORS[i % len(_COLORS)], alpha=0.6, label=name)
        axes.plot(each.numpy(), [i] * len(each), "|", color="#202020", markersize=8)
    axes.set_yticks(range(len(values)), values, size=8, **_FONT)
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.set_xlabel("probability", size=8)
    axes.tick_params(labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)
    _head(figure, title)
    return figure


def words_on_picture(picture: Image.Image, words: Sequence[Sequence[str]], title: str) -> Figure:
    """Words, (rows, columns), on the patches of a picture, which is dimmed for them to be read."""
    rows, columns = len(words), len(words[0])
    width = min(10, max(3.3, 0.5 * columns))
    size = max(2.5, min(7, 7 * width / columns / 0.5))
    figure = Plot(figsize=(width, 0.4 + width * picture.height / picture.width), layout="constrained")
    axes = figure.add_subplot()
    _lay(axes, picture, rows, columns, alpha=0.45)
    axes.set_xticks(range(columns + 1), [])
    axes.set_yticks(range(rows + 1), [])
    axes.grid(color="white", linewidth=0.5)
    axes.tick_params(length=0)
    for row, texts in enumerate(words):
        for column, text in enumerate(texts):
            shown = visible(text)
            shown = shown if len(shown) <= 7 else f"{shown[:6]}…"
            written = axes.text(column + 0.5, row + 0.5, shown, ha="center", va="center", size=size, **_FONT)
            written.set_path_effects([withStroke(linewidth=1.2, foreground="white")])
    _head(figure, title)
    return figure


def maps_on_picture(
    picture: Image.Image, shown: Mapping[str, torch.Tensor], layers: Sequence[int], title: str
) -> Figure:
    """Probabilities, (layers, rows, columns) by name, on a picture in grey: a row a name, a column a layer."""
    across, down = len(layers), len(shown)
    rows, columns = next(iter(shown.values())).shape[1:]
    side = min(1.4, 9.5 / across)
    figure = Plot(figsize=(max(3.3, side * across + 0.9), 0.6 + down * (side * picture.height / picture.width + 0.1)))
    figure.set_layout_engine("constrained")
    most = max(values.max().item() for values in shown.values())
    each = figure.subplots(down, across, squeeze=False)
    for i, (name, values) in enumerate(shown.items()):
        for j, layer in enumerate(layers):
            axes = each[i, j]
            drawn = axes.imshow(values[j].numpy(), extent=(0, columns, rows, 0), cmap="magma", vmin=0, vmax=most)
            _lay(axes, picture.convert("L"), rows, columns, alpha=0.3)
            axes.set_xticks([])
            axes.set_yticks([])
            if i == 0:
                axes.set_title(f"layer {layer}", size=7)
            if j == 0:
                axes.set_ylabel(name, size=7, **_FONT)
    bar = figure.colorbar(drawn, ax=each, aspect=30, pad=0.02)
    bar.set_label("probability", size=7)
    bar.ax.tick_params(labelsize=6)
    _head(figure, title)
    return figure


def write(draw: Callable[[], Figure], path: Path) -> None:
    """Writes the picture that `draw` makes."""
    draw().savefig(path, dpi=DPI)


def visible(text: str) -> str:
    """A token so that all of it can be seen: a leading space, line breaks, letters that the font does not have."""
    text = text.replace("\n", "\\n").replace("\t", "\\t").replace("\r", "\\r")
    text = "␣" + text[1:] if text.startswith(" ") else text
    return "".join(letter if _is_seen(letter) else "□" for letter in text) or "∅"


def shorten(text: str) -> str:
    """A text of at most as many letters as a cell has room for."""
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"


def _is_seen(letter: str) -> bool:
    return letter.isprintable() and ord(letter) in _letters()


@cache
def _letters() -> frozenset[int]:
    return frozenset(get_font(findfont(FontProperties(**_FONT))).get_charmap())


def _lay(axes: Axes, picture: Image.Image, rows: int, columns: int, alpha: float) -> None:
    """A picture that fills so many rows and columns of patches."""
    axes.imshow(picture, extent=(0, columns, rows, 0), alpha=alpha, cmap="gray")
    axes.set_xlim(0, columns)
    axes.set_ylim(rows, 0)
    axes.set_aspect(picture.height / rows / (picture.width / columns))  # patches need not be squares


def _head(figure: Figure, title: str) -> None:
    title = " ".join(title.split())
    room = int(figure.get_figwidth() / 0.075)
    figure.suptitle(title if len(title) <= room else f"{title[: room - 1]}…", size=9, parse_math=False, **_FONT)
