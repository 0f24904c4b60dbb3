"""A study of the command line: one lens over many prompts and seeds, in a `ResumableFolder`."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from diffsight.gallery.resumable_folder import ResumableFolder, place_name
from diffsight.gallery.sweeping import fill


@dataclass(frozen=True)
class Study:
    """A study, which has a result for each prompt and seed.

    Attributes:
        folder: The folder of the results.
        prompts: The prompts.
        seeds: The seeds.
        settings: The other settings that the results depend on, in a form that JSON can store.
    """

    folder: Path
    prompts: Sequence[str]
    seeds: Sequence[int]
    settings: Mapping[str, Any]

    def places(self) -> Iterator[tuple[Path, str, int]]:
        """Yield the folder of each result, its prompt and its seed."""
        for (number, prompt), seed in product(enumerate(self.prompts), self.seeds):
            yield self.folder / place_name(number, len(self.prompts), prompt) / f"seed_{seed}", prompt, seed

    def missing(self) -> list[Path]:
        """Return the folders of the results that have not been made yet."""
        return self._folder_of_results().missing([place for place, _, _ in self.places()])

    def __str__(self) -> str:
        count, missing = len(self.prompts) * len(self.seeds), len(self.missing())
        parts = [(len(self.prompts), "prompt"), (len(self.seeds), "seed"), (count, "result")]
        prompts, seeds, results = (f"{number} {name}{'s' * (number != 1)}" for number, name in parts)
        what = f"{prompts} x {seeds}: {results} in {self.folder}"
        return f"{what}, {count - missing} done, {missing} to do"

    def run(self, make: Callable[[str, int, Path], Any] | None) -> Path:
        """Make the missing results, and return the page of the gallery.

        Args:
            make: Makes the result of a prompt and a seed, and saves it into a folder. None if nothing is missing.

        Raises:
            InputError: The folder has a study with other settings, or a prompt cannot be used.
        """
        inputs = {place: (prompt, seed) for place, prompt, seed in self.places()}
        return fill(self._folder_of_results(), list(inputs), lambda place, folder: make(*inputs[place], folder))

    def check(self) -> None:
        """Raise InputError if the folder cannot be used for this study."""
        self._folder_of_results().check()

    def _folder_of_results(self) -> ResumableFolder:
        return ResumableFolder(self.folder, {**self.settings, "prompts": list(self.prompts)})
