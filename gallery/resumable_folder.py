"""The folder of a sweep or a study that can be resumed: its settings, a folder for each result, and a gallery.

The settings are in `study.json`. A study that is started again makes only the missing results. A study with other
settings is refused, so that a folder never mixes two studies. A result is written to a temporary folder, which is then
renamed, so a result is complete once its folder exists.
"""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffsight.errors import InputError
from diffsight.gallery.gallery_index import check_gallery_place, find_results, write_gallery
from diffsight.lenses.results.saving import expanded, names_a_file, save_files

SETTINGS = "study.json"
_UNFINISHED = ".unfinished"  # results in progress; any found there at the start were interrupted


@dataclass(frozen=True)
class ResumableFolder:
    """The folder of a study.

    Attributes:
        folder: The path of the folder.
        settings: The settings that all results depend on, in a form that JSON can store.
    """

    folder: Path
    settings: Mapping[str, Any]

    def check(self) -> None:
        """Raise InputError if the folder cannot be used for this study."""
        if names_a_file(self.folder):
            raise InputError(f"a study is written into a folder, but {self.folder} is the name of a file")
        check_gallery_place(expanded(self.folder))
        path = self.folder / SETTINGS
        if not path.is_file():
            return
        try:
            known = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError):
            known = None
        if not isinstance(known, dict):
            raise InputError(f"{path} is damaged: remove it, or choose another folder")
        mine = json.loads(json.dumps(self.settings))
        other = [name for name in {**known, **mine} if known.get(name) != mine.get(name)]
        if other:
            raise InputError(f"{self.folder} holds a study that differs in {', '.join(other)}: choose another folder")

    def missing(self, places: Sequence[Path]) -> list[Path]:
        """Return the places whose result has not been made yet."""
        return [place for place in places if not (place.is_dir() and any(place.iterdir()))]

    def begin(self) -> None:
        """Write the settings, and remove the remains of an interruption.

        Raises:
            InputError: The folder cannot be used for this study.
        """
        self.check()
        shutil.rmtree(self.folder / _UNFINISHED, ignore_errors=True)
        text = json.dumps(self.settings, indent=2, ensure_ascii=False) + "\n"
        save_files(self.folder, {SETTINGS: lambda path: path.write_text(text, encoding="utf-8")})

    def make(self, place: Path, make: Callable[[Path, Path], Any]) -> None:
        """Make one result. `make` writes it to a temporary folder, which is then renamed to `place`."""
        unfinished = self.folder / _UNFINISHED
        unfinished.mkdir(exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=unfinished)) / "result"
        make(place, temporary)
        place.parent.mkdir(parents=True, exist_ok=True)
        os.replace(temporary, place)

    def end(self) -> None:
        """Write the gallery of all results."""
        shutil.rmtree(self.folder / _UNFINISHED, ignore_errors=True)
        if any(find_results(self.folder)):
            write_gallery(self.folder)


def place_name(number: int, count: int, text: str) -> str:
    """Return the name of the folder of a result: its number, and words that describe it."""
    width = max(3, len(str(count - 1)))
    words = re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_")[:40]
    return f"{number:0{width}}_{words}" if words else f"{number:0{width}}"
