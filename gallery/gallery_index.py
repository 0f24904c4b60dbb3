"""The gallery of a folder: a page on which all results in the folder can be filtered and compared.

    write_gallery("study")          # study/index.html

The results are listed in `gallery_data.js` beside the page, which checks this file for new results every few seconds.
Results with a grid were saved with a thumbnail. Thumbnails of other large images are made once, in `thumbnails`.
"""

import hashlib
import json
import os
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

from PIL import Image

from diffsight.errors import InputError
from diffsight.lenses.results.saved_results import files_of_record, read_record
from diffsight.lenses.results.saving import check_writable, save_files
from diffsight.lenses.results.shown_settings import settings_of, subject_of
from diffsight.lenses.results.thumbnail import GRID, THUMBNAIL, write_thumbnail
from diffsight.pipelines.local_paths import find_path, printable, shortened

PAGE, DATA, THUMBNAILS = "index.html", "gallery_data.js", "thumbnails"
_MARK = b"galleryData("  # in both files of a gallery
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

    Warns:
        RuntimeWarning: A record is damaged. Its result is left out.

    Raises:
        InputError: The folder does not exist, has no results, cannot be written, or has another page of that name.
    """
    given, folder = folder, find_path(folder)
    if folder is None or not folder.is_dir():
        raise InputError(f"{shortened(str(given))} is not a folder")
    check_gallery_place(folder)
    found, shown = list(find_results(folder)), []
    with ThreadPoolExecutor() as workers:
        for result, entry in zip(found, workers.map(partial(_entry_or_error, folder), found)):
            if isinstance(entry, Exception):
                message = f"{result.path} is damaged, and the gallery leaves it out: {type(entry).__name__}: {entry}"
                warnings.warn(message, RuntimeWarning, stacklevel=2)
            else:
                shown.append(entry)
    if not shown:
        raise InputError(f"there are no results in {folder}: save some with result.save(folder)")
    data = f"galleryData({json.dumps(shown, ensure_ascii=True)});\n"
    page = _page(printable(folder.resolve().name))
    writes = {DATA: data, PAGE: page}
    save_files(folder, {name: _writer(text) for name, text in writes.items()})
    return folder / PAGE


def check_gallery_place(folder: Path) -> None:
    """Raise InputError if the gallery cannot be written into a folder, or would replace a file that is not its own."""
    check_writable(folder)
    for path in (folder / PAGE, folder / DATA):
        if path.is_file() and _MARK not in path.read_bytes():
            raise InputError(
                f"{path} is not the page of a gallery, which would replace it: move it, or choose another folder"
            )


def find_results(folder: Path) -> Iterator[FoundResult]:
    """Yield the results in a folder and its subfolders, in the order of their paths."""
    for place, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if name != THUMBNAILS and not name.startswith("."))
        for name in sorted(files):
            if name.endswith(".json"):
                record = read_record(Path(place, name))
                if record is not None:
                    yield FoundResult(Path(place, name), record)


def _entry_or_error(folder: Path, found: FoundResult) -> dict[str, Any] | Exception:
    """Return the data that the page shows for a result, or the error that its record causes."""
    try:
        return _entry(folder, found)
    except (AttributeError, LookupError, TypeError, ValueError, RecursionError) as error:  # a value of a wrong type
        return error


def _entry(folder: Path, found: FoundResult) -> dict[str, Any]:
    """Return the data that the page shows for a result."""
    record, place = found.record, found.path.parent
    own = files_of_record(record)
    images = (path.name for path in place.iterdir() if path.suffix.lower() in _IMAGES)
    names = sorted(name for name in images if not own or name in own)  # a record of an older version lists no files
    page = place / "page.html"
    settings = settings_of(record)
    date = record.get("call", {}).get("date") or datetime.fromtimestamp(found.path.stat().st_mtime, UTC).isoformat()
    several = f"{len(record['prompts'])} prompts" if record.get("prompts") else "no prompt"
    return {
        "folder": place.relative_to(folder).as_posix(),
        "lens": record["lens"],
        "model": settings.get("model", ""),
        "prompt": str(subject_of(record) or several),
        "seed": record.get("seed"),
        "date": str(date)[:19],
        "settings": settings,
        "base": _address(place, folder),
        "record": _quoted(found.path.name),
        "page": page.name if page.is_file() else "",
        "images": {Path(name).stem: _quoted(name) for name in names if name not in (GRID, THUMBNAIL)},
        "cover": _cover(folder, place, names),
    }


def _cover(folder: Path, place: Path, names: list[str]) -> str:
    """Return the address of the cover image of a result: the image itself if it is small or damaged, otherwise a
    thumbnail."""
    if not names:
        return ""
    name = next((name for name in (THUMBNAIL, GRID) if name in names), names[0])
    path, itself = place / name, f"{_address(place, folder)}{_quoted(name)}"
    state = path.stat()
    if state.st_size <= _SMALL:
        return itself
    facts = f"{path.relative_to(folder)} {state.st_mtime_ns} {state.st_size}"
    thumbnail = folder / THUMBNAILS / f"{hashlib.sha256(os.fsencode(facts)).hexdigest()[:20]}.jpg"
    if not thumbnail.exists():
        try:
            save_files(thumbnail.parent, {thumbnail.name: partial(write_thumbnail, path)})
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):  # Pillow's, for a damaged image
            return itself
    return f"{THUMBNAILS}/{thumbnail.name}"


def _address(place: Path, folder: Path) -> str:
    relative = place.relative_to(folder).as_posix()
    return "" if relative == "." else f"{_quoted(relative)}/"


def _quoted(name: str) -> str:
    return quote(os.fsencode(name))  # a name need not be UTF-8


def _page(title: str) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    loader = FileSystemLoader(_PARTS)
    pages = Environment(loader=loader, autoescape=True, undefined=StrictUndefined)
    return pages.get_template("gallery.html.jinja").render(title=title, data=DATA)


def _writer(text: str) -> Any:
    return lambda path: path.write_text(text, encoding="utf-8")
