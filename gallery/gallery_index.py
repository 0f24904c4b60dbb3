"""The gallery of a folder: a page on which all results in the folder can be filtered and compared.

    write_gallery("study")          # study/index.html

The results are listed in `gallery_data.js` beside the page, which checks this file for new results every few seconds.
Results with a grid were saved with a thumbnail. Thumbnails of other large images are made once, in `thumbnails`.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

from diffsight.errors import InputError
from diffsight.lenses.results.saved_results import files_of_record, read_record
from diffsight.lenses.results.saving import check_writable, save_files
from diffsight.lenses.results.shown_settings import settings_of, subject_of
from diffsight.lenses.results.thumbnail import GRID, THUMBNAIL, write_thumbnail
from diffsight.pipelines.local_paths import find_path, shortened

PAGE, DATA, THUMBNAILS = "index.html", "gallery_data.js", "thumbnails"
_IMAGES = (".png", ".gif", ".jpg", ".webp")
_SMALL = 200_000  # images up to this many bytes are shown directly, without a thumbnail
_PARTS = Path(__file__).parent / "gallery_parts"


@dataclass(frozen=True)
class FoundResult:
    """A result in a folder: its record and the file that holds it."""

    path: Path
    record: Mapping[str, Any]


def write_gallery(folder: str | Path) -> Path:
    """Write the gallery of a folder, and return the path of its page.

    Args:
        folder: A folder with results in it or in its subfolders, at any depth.

    Raises:
        InputError: The folder does not exist, has no results, or cannot be written.
    """
    given, folder = folder, find_path(folder)
    if folder is None or not folder.is_dir():
        raise InputError(f"{shortened(str(given))} is not a folder")
    found = list(find_results(folder))
    if not found:
        raise InputError(f"there are no results in {folder}: save some with result.save(folder)")
    check_writable(folder)
    with ThreadPoolExecutor() as workers:
        shown = list(workers.map(lambda one: _entry(folder, one), found))
    data = f"galleryData({json.dumps(shown, ensure_ascii=True)});\n"
    page = _page(folder.resolve().name)
    writes = {DATA: data, PAGE: page}
    save_files(folder, {name: _writer(text) for name, text in writes.items()})
    return folder / PAGE


def find_results(folder: Path) -> Iterator[FoundResult]:
    """Yield the results in a folder and its subfolders, in the order of their paths."""
    for place, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if name != THUMBNAILS and not name.startswith("."))
        for name in sorted(files):
            if name.endswith(".json"):
                record = read_record(Path(place, name))
                if record is not None:
                    yield FoundResult(Path(place, name), record)


def _entry(folder: Path, found: FoundResult) -> dict[str, Any]:
    """Return the data that the page shows for a result."""
    record, place = found.record, found.path.parent
    own = files_of_record(record)
    images = (path.name for path in place.iterdir() if path.suffix.lower() in _IMAGES)
    names = sorted(name for name in images if not own or name in own)  # a record of an older version lists no files
    page = place / "page.html"
    settings = settings_of(record)
    date = record.get("call", {}).get("date") or datetime.fromtimestamp(found.path.stat().st_mtime, UTC).isoformat()
    return {
        "folder": place.relative_to(folder).as_posix(),
        "lens": record["lens"],
        "model": settings.get("model", ""),
        "prompt": subject_of(record) or (f"{len(record['prompts'])} prompts" if record.get("prompts") else "no prompt"),
        "seed": record.get("seed"),
        "date": date[:19],
        "settings": settings,
        "base": _address(place, folder),
        "record": quote(found.path.name),
        "page": page.name if page.is_file() else "",
        "images": {Path(name).stem: quote(name) for name in names if name not in (GRID, THUMBNAIL)},
        "cover": _cover(folder, place, names),
    }


def _cover(folder: Path, place: Path, names: list[str]) -> str:
    """Return the address of the cover image of a result: the image itself if it is small, otherwise a thumbnail."""
    if not names:
        return ""
    name = next((name for name in (THUMBNAIL, GRID) if name in names), names[0])
    path = place / name
    state = path.stat()
    if state.st_size <= _SMALL:
        return f"{_address(place, folder)}{quote(name)}"
    key = hashlib.sha256(f"{path.relative_to(folder)} {state.st_mtime_ns} {state.st_size}".encode()).hexdigest()[:20]
    thumbnail = folder / THUMBNAILS / f"{key}.jpg"
    if not thumbnail.exists():
        save_files(thumbnail.parent, {thumbnail.name: partial(write_thumbnail, path)})
    return f"{THUMBNAILS}/{thumbnail.name}"


def _address(place: Path, folder: Path) -> str:
    relative = place.relative_to(folder).as_posix()
    return "" if relative == "." else f"{quote(relative)}/"


def _page(title: str) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    loader = FileSystemLoader(_PARTS)
    pages = Environment(loader=loader, autoescape=True, undefined=StrictUndefined)
    return pages.get_template("gallery.html.jinja").render(title=title, data=DATA)


def _writer(text: str) -> Any:
    return lambda path: path.write_text(text, encoding="utf-8")
