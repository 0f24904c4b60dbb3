"""A study: one lens over many prompts and seeds, a folder for each result, and a gallery of all.

Its folder has `study.json` with the settings. A study that is started again makes what is missing; one with other
settings is refused, so that a folder never mixes two.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from diffsight.errors import InputError
from diffsight.gallery.gallery_index import find_results, write_gallery
from diffsight.lenses.results.saving import check_writable, names_a_file, save_files

SETTINGS = "study.json"


@dataclass(frozen=True)
class Study:
    """What a study consists of: a result for each prompt and seed.

    Attributes:
        folder: Where the results are.
        prompts: The prompts.
        seeds: The seeds.
        settings: What else the results depend on, as JSON stores it.
    """

    folder: Path
    prompts: Sequence[str]
    seeds: Sequence[int]
    settings: Mapping[str, Any]

    def places(self) -> Iterator[tuple[Path, str, int]]:
        """Yield the folder of each result, its prompt and its seed."""
        width = max(3, len(str(len(self.prompts) - 1)))
        for (number, prompt), seed in product(enumerate(self.prompts), self.seeds):
            words = re.sub(r"[^a-z0-9]+", "_", prompt.lower()).strip("_")[:40]
            name = f"{number:0{width}}_{words}" if words else f"{number:0{width}}"
            yield self.folder / name / f"seed_{seed}", prompt, seed

    def missing(self) -> list[tuple[Path, str, int]]:
        """Return the results that have not been made yet."""
        return [one for one in self.places() if not _is_done(one[0])]

    def __str__(self) -> str:
        count, missing = len(self.prompts) * len(self.seeds), len(self.missing())
        what = f"{len(self.prompts)} prompts x {len(self.seeds)} seeds: {count} results in {self.folder}"
        return f"{what}, {count - missing} done, {missing} to do"

    def run(self, make: Callable[[str, int, Path], Any] | None) -> Path:
        """Make what is missing, and return the page of the gallery.

        Args:
            make: Makes the result of a prompt and a seed, and saves it into a folder. None if nothing is missing.

        Raises:
            InputError: The folder has a study with other settings, or a prompt cannot be used.
        """
        self.check()
        text = json.dumps(self._record(), indent=2, ensure_ascii=False) + "\n"
        save_files(self.folder, {SETTINGS: lambda path: path.write_text(text, encoding="utf-8")})
        for place, prompt, seed in tqdm(self.missing(), desc="results"):
            make(prompt, seed, place)
        return write_gallery(self.folder) if any(find_results(self.folder)) else self.folder

    def check(self) -> None:
        """Raise InputError if the folder cannot be used for this study."""
        if names_a_file(self.folder):
            raise InputError(f"a study is written into a folder, but {self.folder} is the name of a file")
        check_writable(self.folder)
        path = self.folder / SETTINGS
        if not path.is_file():
            return
        try:
            known = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            raise InputError(f"{path} is damaged: remove it, or choose another --out") from None
        mine = json.loads(json.dumps(self._record()))
        other = [name for name in {**known, **mine} if known.get(name) != mine.get(name)]
        if other:
            raise InputError(f"{self.folder} has a study with different {', '.join(other)}: choose another --out")

    def _record(self) -> dict[str, Any]:
        return {**self.settings, "prompts": list(self.prompts)}


def _is_done(place: Path) -> bool:
    return place.is_dir() and (any(find_results(place)) or any(place.glob("*.png")))
