"""Draws a result as a self-contained HTML page, with images, styles and scripts inside it.

    page_of("diffusion_lens: a red circle", sections, record, code)

The page works from disk and offline. A content security policy forbids every request, and all text is escaped, so a
prompt with markup in it is shown as it was written.
"""

import base64
import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

from diffsight.lenses.results.record import as_json, versions
from diffsight.lenses.results.sections import (
    CurveSection,
    HeatMapSection,
    ImageSection,
    Media,
    OverlaySection,
    Section,
    TableSection,
)
from diffsight.lenses.results.shown_settings import settings_of

_WIDTH, _HEIGHT = 640, 280  # of a plot of curves, in pixels
_DASHES = ("", "7 4", "2 3", "9 3 2 3")
_COLORS = 7  # colours of curves in page.css
_LONGEST_RECORD = 200_000  # characters of a record that the page shows; longer ones can be downloaded


def page_of(
    heading: str,
    sections: Sequence[Section],
    record: Mapping[str, Any],
    code: str,
) -> str:
    """Return a page.

    Args:
        heading: The title of the page.
        sections: The sections of the page.
        record: The record. The page lists its settings.
        code: The code that repeats the result.
    """
    text = as_json(record)
    return _environment().get_template("page.html.jinja").render(
        heading=heading,
        sections=[{"kind": _KINDS[type(section)][0]} | _KINDS[type(section)][1](section) for section in sections],
        settings=settings_of(record),
        versions=versions(),
        record=text if len(text) < _LONGEST_RECORD else None,
        download=_data("application/json", text.encode()),
        code=code,
    )  # fmt: skip


def framed(page: str, title: str) -> str:
    """Return a page as a frame for a notebook. Its styles and scripts do not affect the notebook."""
    return _environment().get_template("frame.html.jinja").render(page=page, title=title)


# ---- template data for each kind of section


def _images(section: ImageSection) -> dict[str, Any]:
    rows, number = [], 0
    for row, cells in section.rows.items():
        shown = []
        for cell, image in cells.items():
            name = f"{row}: {cell}" if row else cell
            shown.append({"name": name, "cell": cell, "number": number} | _image(image))
            number += 1
        rows.append({"name": row, "cells": shown})
    return {"title": section.title, "rows": rows, "count": number}


def _table(section: TableSection) -> dict[str, Any]:
    rows = {
        name: [
            {"text": cell.text, "value": _share(cell.value), "details": [[t, float(v)] for t, v in cell.details]}
            for cell in cells
        ]
        for name, cells in section.rows.items()
    }
    lines = [[section.corner, *section.columns]]
    lines += ([name, *(cell.text for cell in cells)] for name, cells in section.rows.items())
    return vars(section) | {"rows": rows, "download": _csv(lines)}


def _curves(section: CurveSection) -> dict[str, Any]:
    lines = {name: _rounded(np.asarray(values, float)) for name, values in section.lines.items()}
    finite = [value for values in lines.values() for value in values if value is not None] or [0.0]
    low, high = min(0.0, *finite), max(1e-9, *finite)
    high = 1.0 if low >= 0 and 0.2 < high <= 1 else high
    across = [round(_WIDTH * (i + 0.5) / len(section.places), 1) for i in range(len(section.places))]
    drawn = []
    for i, (name, values) in enumerate(lines.items()):
        known = [(x, value) for x, value in zip(across, values) if value is not None]
        points = [(x, round(_HEIGHT * (high - value) / (high - low), 1)) for x, value in known]
        style = {"color": i % _COLORS, "dash": _DASHES[i // _COLORS % len(_DASHES)]}
        drawn.append({"name": name, "points": points, "values": values} | style)
    rows = [[section.axis, *lines], *([place, *values] for place, *values in zip(section.places, *lines.values()))]
    step = max(1, round(len(section.places) / 12))
    ticks = [(x, place) for x, place in zip(across[::step], section.places[::step])]
    grid = [(_HEIGHT * part, f"{high - (high - low) * part:.2g}") for part in (0, 0.25, 0.5, 0.75, 1)]
    size = {"width": _WIDTH, "height": _HEIGHT}
    kept = {"title": section.title, "axis": section.axis, "label": section.label, "places": list(section.places)}
    return kept | size | {"lines": drawn, "across": across, "ticks": ticks, "grid": grid, "download": _csv(rows)}


def _heat_map(section: HeatMapSection) -> dict[str, Any]:
    values = section.values.float().numpy()
    low, high = _range(values)
    rows = [["", *section.columns], *([name, *line] for name, line in zip(section.rows, values.tolist()))]
    steps = [max(1, round(len(names) / 24)) for names in (section.rows, section.columns)]
    return {
        "title": section.title,
        "label": section.label,
        "axes": section.axes,
        "rows": list(section.rows),
        "columns": list(section.columns),
        "row_step": steps[0],
        "column_step": steps[1],
        "values": _rounded(values),
        "source": _png(_colored(values, "viridis", low, high)),
        "bar": _png(_colored(np.linspace(0, 1, 64)[None], "viridis", 0, 1)),
        "low": f"{low:.3g}",
        "high": f"{high:.3g}",
        "download": _csv(rows),
    }


def _overlay(section: OverlaySection) -> dict[str, Any]:
    arrays = {name: values.float().numpy() for name, values in section.maps.items()}
    low, high = _range(np.concatenate([values.ravel() for values in arrays.values()]))
    maps = []
    for name, values in arrays.items():
        shape = {"rows": values.shape[0], "columns": values.shape[1]}
        words = section.words.get(name)
        drawn = _png(_colored(values, "magma", min(low, 0), high))
        maps.append({"name": name, "source": drawn, "values": _rounded(values), "words": words} | shape)
    lines = [["map", "row", "column", section.label, "word"]]
    for one in maps:
        for i, line in enumerate(one["values"]):
            for j, value in enumerate(line):
                lines.append([one["name"], i, j, value, one["words"][i][j] if one["words"] else ""])
    kept = {"title": section.title, "label": section.label, "maps": maps, "image": _image(section.image)}
    return kept | {"low": f"{min(low, 0):.3g}", "high": f"{high:.3g}", "download": _csv(lines)}


_KINDS = {
    ImageSection: ("images", _images),
    TableSection: ("table", _table),
    CurveSection: ("curves", _curves),
    HeatMapSection: ("heat_map", _heat_map),
    OverlaySection: ("overlay", _overlay),
}


# ---- data inside the page


def _image(image: Image.Image | Media) -> dict[str, Any]:
    """Return the template data of an image, a video (an animated image) or a sound (with a player)."""
    if isinstance(image, Media):
        sound = _data(image.mime, image.data) if image.mime.startswith("audio/") else None
        source = _png(image.image) if sound else _data(image.mime, image.data)
        return {"source": source, "sound": sound, "width": image.image.width, "height": image.image.height}
    return {"source": _png(image), "sound": None, "width": image.width, "height": image.height}


def _png(image: Image.Image) -> str:
    data = io.BytesIO()
    image.save(data, "png")
    return _data("image/png", data.getvalue())


def _data(mime: str, data: bytes) -> str:
    return f"data:{mime};base64,{base64.b64encode(data).decode()}"


def _csv(rows: Iterable[Iterable[Any]]) -> str:
    text = io.StringIO()
    csv.writer(text).writerows(rows)
    return _data("text/csv;charset=utf-8", text.getvalue().encode())


def _colored(values: np.ndarray, name: str, low: float, high: float) -> Image.Image:
    from matplotlib import colormaps  # slow to import, and most pages have no map

    colors = colormaps[name].with_extremes(bad="#808080")((values - low) / max(high - low, 1e-12), bytes=True)
    return Image.fromarray(colors[..., :3])


def _range(values: np.ndarray) -> tuple[float, float]:
    finite = values[np.isfinite(values)]
    return (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)


def _share(value: float | None) -> float | None:
    """Return how strongly a cell is coloured, from 0 to 1, or None if it has no value."""
    return None if value is None or not np.isfinite(value) else round(min(max(float(value), 0.0), 1.0), 3)


def _rounded(values: np.ndarray) -> list:
    """Return values as nested lists with four significant digits, and None for those that are not finite."""
    if values.ndim > 1:
        return [_rounded(line) for line in values]
    return [float(f"{value:.4g}") if np.isfinite(value) else None for value in values.tolist()]


@cache
def _environment() -> Environment:
    loader = PackageLoader("diffsight.lenses.results", "page_parts")
    return Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
