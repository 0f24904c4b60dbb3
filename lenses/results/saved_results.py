"""Saved results, as their records describe them, and the folders that hold them.

check_place("lens", "diffusion_lens")       # an error if it holds a result of another lens, or other files
read_record(Path("lens/lens.json"))
"""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from diffsight.errors import InputError
from diffsight.lenses.results.saving import check_file, check_writable, expanded, is_not_own, names_a_file

RECORD, PAGE, ARGUMENTS = "lens.json", "page.html", "arguments.safetensors"


def check_place(path: str | Path, lens: str) -> None:
    """Raise InputError if a result of a lens cannot be saved to a path, a folder or a file."""
    path = expanded(path)
    if names_a_file(path):
        check_file(path)
    else:
        check_replaces_own(check_writable(path), lens, (PAGE,))  # which every result has


def check_replaces_own(folder: Path, lens: str, names: Iterable[str]) -> None:
    """Raise InputError if a folder holds a result of another lens, or files with these names that are not of a saved
    result."""
    for name in not_of_results(folder, lens, names):
        raise is_not_own(folder, name)


def not_of_results(folder: Path, lens: str, names: Iterable[str]) -> list[str]:
    """Return those of the names that files in a folder have which are not of a saved result.

    Raises InputError if the folder holds a result of another lens, whose page and images would be overwritten."""
    own = set()
    for path in sorted(folder.glob("*.json")) if os.path.isdir(folder) else ():
        record = read_record(path)
        if record is None:
            continue
        files = files_of_record(record)
        if record["lens"] != lens and files:
            raise InputError(
                f"the folder {folder} holds a result of {record['lens']} ({path.name}): save the result of {lens} into "
                "another folder"
            )
        own |= {path.name, *files}
    others = [name for name in names if name not in own]
    return [name for name in others if os.path.lexists(folder / name) and not os.path.isdir(folder / name)]


def read_record(path: Path) -> dict[str, Any] | None:
    """Return the record in a file, or None if the file contains no record."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):  # no JSON, or nested too deeply
        return None
    return record if isinstance(record, dict) and isinstance(record.get("lens"), str) else None


def files_of_record(record: Mapping[str, Any]) -> set[str]:
    """Return the names of the files of a saved result, which its record lists. Empty if there is no such list."""
    files = record.get("files")
    named = [name for name in files if isinstance(name, str)] if isinstance(files, list) else []
    return {name for name in named if Path(name).name == name}
