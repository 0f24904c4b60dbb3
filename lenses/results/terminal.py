"""Draws a result in a terminal, with `rich`: `print(result)` without colours, `rich.print(result)` with them.

Tables are cut into blocks of columns that fit the terminal. At most three sections are drawn; the rest are only
counted.
"""

import io
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from diffsight.lenses.results.sections import (
    Cell,
    CurveSection,
    HeatMapSection,
    ImageSection,
    OverlaySection,
    Section,
    TableSection,
)
from diffsight.lenses.results.shown_settings import settings_of

_MOST_TABLES = 3
_MOST_COLUMNS = 16  # columns of numbers
_LONGEST = 14  # characters of a word in a table with several columns


def text_of(heading: str, record: Mapping[str, Any], sections: Sequence[Section]) -> str:
    """Return a result as plain text, as wide as the terminal."""
    width = max(60, shutil.get_terminal_size((100, 24)).columns)
    console = Console(file=io.StringIO(), width=width, color_system=None, legacy_windows=False)
    for line in lines_of(heading, record, sections, width):
        console.print(line)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())


def lines_of(
    heading: str, record: Mapping[str, Any], sections: Sequence[Section], width: int
) -> Iterator[RenderableType]:
    """Yield the parts of a result for `rich` to print."""
    yield Text(heading, style="bold")
    settings = {name: ", ".join(value.splitlines()) for name, value in settings_of(record).items() if name != "prompt"}
    yield Text("; ".join(f"{name} {value}" for name, value in settings.items()), style="dim")
    for section in sections[:_MOST_TABLES]:
        yield ""
        yield from _drawn(section, width)
    if len(sections) > _MOST_TABLES:
        yield Text(f"\n… and {len(sections) - _MOST_TABLES} more: result.save(folder) writes a page with all")


def _drawn(section: Section, width: int) -> Iterator[RenderableType]:
    if section.title:
        yield Text(section.title)
    match section:
        case ImageSection():
            for row, cells in section.rows.items():
                sizes = {(one.width, one.height) for one in (getattr(c, "image", c) for c in cells.values())}
                size = ", ".join(f"{across} x {down}" for across, down in sorted(sizes))
                yield Text(f"{row + ': ' if row else ''}{_count(len(cells))} ({size}): {', '.join(cells)}")
        case TableSection():
            yield from _tables(section.corner, section.columns, section.rows, width)
        case CurveSection():
            rows = {
                place: [Cell(_number(line[i])) for line in section.lines.values()]
                for i, place in enumerate(section.places)
            }
            yield from _tables(section.axis, list(section.lines), rows, width)
        case HeatMapSection():
            yield from _map(section, width)
        case OverlaySection():
            name = list(section.maps)[-1]
            words = section.words.get(name)
            if words is None:
                rows, columns = section.maps[name].shape
                yield Text(f"{len(section.maps)} maps, {rows} x {columns}: {', '.join(section.maps)}")
            else:
                yield Text(name)
                rows = {str(i): [Cell(word) for word in line] for i, line in enumerate(words)}
                yield from _tables("row", [str(i) for i in range(len(words[0]))], rows, width)


def _map(section: HeatMapSection, width: int) -> Iterator[RenderableType]:
    if len(section.columns) > _MOST_COLUMNS:
        yield Text(f"{section.label}, {len(section.rows)} x {len(section.columns)}: the page shows it")
        return
    rows = {name: [Cell(_number(value)) for value in line] for name, line in zip(section.rows, section.values.tolist())}
    yield from _tables(section.axes[0], section.columns, rows, width)


def _tables(
    corner: str, columns: Sequence[str], rows: Mapping[str, Sequence[Cell]], width: int
) -> Iterator[RenderableType]:
    """Yield tables with as many columns as fit beside each other."""
    lone = len(columns) == 1
    texts = {name: [Text(_cut(cell.text, lone), _style(cell)) for cell in cells] for name, cells in rows.items()}
    heads = [_cut(column, lone) for column in columns]
    first = max(map(len, [corner, *rows]))
    widths = [max([len(head), *(cells[i].cell_len for cells in texts.values())]) + 3 for i, head in enumerate(heads)]
    start = 0
    while start < len(heads):
        stop, room = start + 1, width - first - 5 - widths[start]
        while stop < len(heads) and widths[stop] <= room:
            room -= widths[stop]
            stop += 1
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
        table.add_column(corner, justify="right", no_wrap=True)
        for head in heads[start:stop]:
            table.add_column(Text(head), overflow="fold")
        for name, cells in texts.items():
            table.add_row(Text(name), *cells[start:stop])
        yield table
        start = stop


def _style(cell: Cell) -> str:
    if cell.value is None or not math.isfinite(cell.value):
        return ""
    return "bold green" if cell.value >= 0.5 else "green" if cell.value >= 0.1 else "dim"


def _cut(text: str, whole: bool) -> str:
    return text if whole or len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"


def _number(value: float) -> str:
    return f"{value:.3f}" if math.isfinite(value) else "-"


def _count(count: int) -> str:
    return "1 image" if count == 1 else f"{count} images"
