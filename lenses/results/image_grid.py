"""Lay out images as one image: a grid with captions, row titles, column titles and a heading.

    titles = [f"layer {i}" for i in range(12)]
    image_grid(images, titles=titles, title=prompt).save("layers.png")

Each image and each wrapped text first becomes a box: an RGB image that is no larger than necessary. The grid is a table
of boxes. The font is the DejaVu Sans that comes with matplotlib, in Pillow's basic layout, since its other layout
depends on system libraries. So a grid looks the same on every machine.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from importlib.util import find_spec
from itertools import chain
from operator import index
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

_PAPER, _INK = "white", "#202020"
_MOST_PIXELS = 2**29  # 1.5 GiB
_BREAKS = "._-/"  # a word longer than its line is broken after one of these if possible

Row = Sequence[Image.Image | None]
Texts = Sequence[str | None]
Box = Image.Image | None  # None takes no space
Span = tuple[int, int, float]  # left edge, width, and the alignment of a box in it (0 left, 1 right)
Line = tuple[Sequence[Span], Sequence[Box], float, int]  # alignment (0 top, 1 bottom), gap below the line


def image_grid(
    images: Row | Sequence[Row],
    *,
    columns: int | None = None,
    titles: Texts | Sequence[Texts] | None = None,
    row_titles: Texts | None = None,
    column_titles: Texts | None = None,
    title: str | None = None,
    cell: int = 192,
    padding: int = 16,
) -> Image.Image:
    """Lay out images in a grid, as one RGB image on white.

        image_grid(images)                              # about as many columns as rows
        image_grid(images, columns=3, titles=["layer 0", "layer 1", "layer 2"])
        image_grid([[a, b], [c, None]], row_titles=prompts, column_titles=["seed 0", "seed 1"])

    Images keep their aspect ratio and are centred in their cells. Small images are enlarged; from a factor of two on,
    every pixel becomes a sharp square. Large images are reduced with a Lanczos filter. Transparency becomes white.
    Texts keep their line breaks and are wrapped to the available width: a long text makes the grid taller and is never
    cut.

    Args:
        images: Images in reading order, or a list of images for each row. Rows may differ in length. None leaves a cell
            empty.
        columns: The number of columns, if `images` is not given in rows.
        titles: A caption below each image, nested like `images`. None means no text, here and in all other titles.
        row_titles: A text to the left of each row.
        column_titles: A text above each column.
        title: A heading for the whole grid.
        cell: The length of the longer side of every image, in pixels. The font size depends on it.
        padding: The space between cells and around the grid, in pixels.

    Raises:
        TypeError: An argument is not an image, a text or an integer as required.
        ValueError: There is no image; an image has no pixels or no fixed range of brightness (modes I and F); there are
            too few or too many titles; or `columns`, `cell` or `padding` is too small or far too large.
    """
    cell, padding = _whole("cell", cell, least=1), _whole("padding", padding, least=0)
    rows, captions, across = _in_rows(images, titles, columns)
    _check_size(len(rows), across, cell, padding)
    row_titles = _texts("row_titles", row_titles, len(rows), "row")
    column_titles = _texts("column_titles", column_titles, across, "column")
    title = _string("title", title)

    size = max(12, round(cell / 13))
    regular, bold, large = _font(size), _font(size, bold=True), _font(round(1.4 * size), bold=True)
    fitted = [[_fit(image, cell) for image in row] for row in rows]
    width, height = map(max, zip(*(box.size for box in chain(*fitted) if box), strict=True))
    if any([title, *row_titles, *column_titles, *chain(*captions)]):
        width = max(width, 6 * size)  # leave room for text if all images are narrow
    sides = [_text(text, bold, max(cell, width), align=1.0) for text in row_titles]
    side = max((box.width + padding for box in sides if box), default=0)
    whole = side + across * (width + padding) - padding
    lefts = range(padding + side, padding + whole, width + padding)
    spans = [(padding, side - padding, 1.0), *((left, width, 0.5) for left in lefts)]

    heads = [None, *(_text(text, bold, width) for text in column_titles)]
    lines = [
        ([(padding, whole, 0.5)], [_text(title, large, whole)], 0.0, padding),
        (spans, heads, 1.0, padding // 2),
    ]
    blank = Image.new("RGB", (width, height), _PAPER)  # an empty row is as high as the others
    for name, boxes, texts in zip(sides, fitted, captions, strict=True):
        below = [None, *(_text(text, regular, width) for text in texts)]
        boxes = [name, *(boxes if any(boxes) else [blank])]
        lines.append((spans, boxes, 0.5, padding // 2 if any(below) else padding))
        lines.append((spans, below, 0.0, padding))
    return _assemble(lines, whole + 2 * padding, padding)


def _assemble(lines: Sequence[Line], width: int, top: int) -> Image.Image:
    """Paste the lines below each other, the first at `top`. Empty lines take no space."""
    places = []
    for spans, boxes, align, gap in lines:
        height = max((box.height for box in boxes if box), default=-gap)
        for (left, room, where), box in zip(spans, boxes, strict=False):
            if box:
                x, y = (room - box.width) * where, (height - box.height) * align
                places.append((box, (left + int(x), top + int(y))))
        top += height + gap
    paper = Image.new("RGB", (width, top), _PAPER)
    for box, place in places:
        paper.paste(box, place)
    return paper


def _fit(image: Image.Image | None, cell: int) -> Box:
    """Return the image on white, with a longer side of `cell` pixels."""
    if image is None:
        return None
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, _PAPER), image)
    image = image.convert("RGB")
    scale = cell / max(image.size)
    width, height = (max(1, round(length * scale)) for length in image.size)
    if scale < 2:
        return image.resize((width, height), Image.LANCZOS)
    # For sharp squares at any scale: enlarge by an integer factor, then average down to the final size.
    times = math.ceil(scale)
    larger = image.resize((image.width * times, image.height * times), Image.NEAREST)
    return larger.resize((width, height), Image.BOX)


def _text(text: str, font: ImageFont.FreeTypeFont, width: int, align: float = 0.5) -> Box:
    """Return the text wrapped to `width` pixels, with lines aligned left (0), centred (0.5) or right (1)."""
    lines = list(_wrap(text, font, width))
    if not lines:
        return None
    inks = [font.getbbox(line, anchor="ls") for line in lines]  # left, top, right, bottom
    ascent, descent = font.getmetrics()  # some accents extend further
    ascent = max(ascent, *(-ink[1] for ink in inks))
    descent = max(descent, *(ink[3] for ink in inks))
    pitch = ascent + descent + round(0.1 * font.size)
    longest = max(ink[2] - ink[0] for ink in inks)
    box = Image.new("RGB", (longest, pitch * len(lines)), _PAPER)
    draw = ImageDraw.Draw(box)
    for i, (line, ink) in enumerate(zip(lines, inks, strict=True)):
        x = int((longest - ink[2] + ink[0]) * align) - ink[0]
        draw.text((x, i * pitch + ascent), line, _INK, font, anchor="ls")
    return box


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: int) -> Iterator[str]:
    """Yield the lines of `text`, at most `width` pixels wide and at least one character long."""

    def fits(line: str) -> bool:
        if len(line) > 4 * width:  # measuring a long line takes long
            return False
        left, _, right, _ = font.getbbox(line, anchor="ls")
        return right - left <= width or len(line) == 1

    for paragraph in text.strip().splitlines():
        line = ""
        for word in paragraph.split():
            if line and fits(f"{line} {word}"):
                line = f"{line} {word}"
                continue
            if line:
                yield line
            while not fits(word):
                end = _longest(word, fits)
                end = max(word.rfind(mark, 0, end) for mark in _BREAKS) + 1 or end
                yield word[:end]
                word = word[end:]
            line = word
        yield line


def _longest(word: str, fits: Callable[[str], bool]) -> int:
    """Return how many leading characters of a word fit. The whole word must not fit."""
    least, most = 1, 2  # fits, perhaps not
    while most < len(word) and fits(word[:most]):
        least, most = most, 2 * most
    most = min(most, len(word))
    while most - least > 1:
        middle = (least + most) // 2
        least, most = (middle, most) if fits(word[:middle]) else (least, middle)
    return least


@cache
def _font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    matplotlib = Path(find_spec("matplotlib").origin).parent  # it is slow to import
    path = matplotlib / "mpl-data" / "fonts" / "ttf" / name
    return ImageFont.truetype(path, size, layout_engine=ImageFont.Layout.BASIC)


def _in_rows(images, titles, columns: int | None) -> tuple[list[list[Box]], list[list[str]], int]:
    """Check images and captions, and return them in rows, with the number of columns."""
    images = _listed("images", images, "image")
    if any(isinstance(item, list | tuple) for item in images):
        if columns is not None:
            raise ValueError("images is given in rows: omit columns")
        rows = [_images(f"images[{i}]", row) for i, row in enumerate(images)]
        titles = [None] * len(rows) if titles is None else titles
        titles = _listed("titles", titles, "row of images", len(rows))
        captions = [_texts(f"titles[{i}]", titles[i], len(row), f"image of images[{i}]") for i, row in enumerate(rows)]
        columns = max(map(len, rows))
    else:
        flat = _images("images", images)
        texts = _texts("titles", titles, len(flat), "image")
        columns = _near_square(len(flat)) if columns is None else _whole("columns", columns, 1)
        starts = range(0, len(flat), columns)
        rows, captions = ([every[i : i + columns] for i in starts] for every in (flat, texts))
    if not any(chain(*rows)):
        raise ValueError("images contains no image: pass at least one")
    return rows, captions, columns


def _check_size(rows: int, columns: int, cell: int, padding: int) -> None:
    """Raise ValueError if a grid would not fit into memory."""
    height, width = (count * (cell + padding) + padding for count in (rows, columns))
    if height * width > _MOST_PIXELS:
        raise ValueError(
            f"a grid of {rows} x {columns} cells with cell={cell} and padding={padding} is too large: it would have up "
            f"to {height} x {width} pixels. Write smaller numbers"
        )


def _near_square(count: int) -> int:
    """Return a number of columns that is close to the number of rows and leaves few cells empty."""
    root = math.isqrt(max(count - 1, 0)) + 1
    return min(root, root + 1, key=lambda columns: -count % columns)


def _images(name: str, images: Row) -> list[Box]:
    images = _listed(name, images, "image")
    for i, image in enumerate(images):
        if image is None:
            continue
        if not isinstance(image, Image.Image):
            raise TypeError(
                f"{name}[{i}] has type {type(image).__name__}: pass a PIL image (Image.fromarray creates one from an "
                "array), or None for an empty cell"
            )
        if not all(image.size):
            raise ValueError(f"{name}[{i}] has no pixels: write None for an empty cell")
        if image.mode.startswith(("I", "F")):
            raise ValueError(
                f"{name}[{i}] has mode {image.mode}, which does not define how bright white is: scale it to 0..255 and "
                "pass it in mode L"
            )
    return images


def _texts(name: str, texts: Texts | None, needed: int, each: str) -> list[str]:
    texts = [None] * needed if texts is None else _listed(name, texts, each, needed)
    return [_string(f"{name}[{i}]", text) for i, text in enumerate(texts)]


def _string(name: str, text: str | None) -> str:
    if not isinstance(text, str | None):
        raise TypeError(f"{name} has type {type(text).__name__}: write a string, or None")
    return text or ""


def _listed(name: str, items: Iterable, each: str, needed: int | None = None) -> list:
    if callable(getattr(items, "grid", None)):
        raise TypeError(f"{name} has type {type(items).__name__}, which has a grid of its own: write result.grid()")
    if isinstance(items, str | Image.Image) or not isinstance(items, Iterable):
        kind = type(items).__name__
        raise TypeError(f"{name} has type {kind}: write a list with one item for each {each}")
    items = list(items)
    if needed is not None and len(items) != needed:
        raise ValueError(
            f"{name} has {len(items)} item{'s' * (len(items) != 1)}, but needs {needed}: one for each {each} (None for "
            "no text)"
        )
    return items


def _whole(name: str, value: int, least: int) -> int:
    try:
        value = index(value)
    except TypeError:
        raise TypeError(f"{name} is {value!r}: write an integer") from None
    if value < least:
        raise ValueError(f"{name} is {value}: write {least} or more")
    return value
