"""Saved results, as their records describe them, and the folders that hold them.

check_place("lens", "diffusion_lens")       # an error if the folder holds a result of another lens
read_record(Path("lens/lens.json"))
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffsight.errors import InputError
from diffsight.lenses.results.saving import check_file, check_writable, expanded, names_a_file


def check_place(path: str | Path, lens: str) -> None:
    """Raise InputError if a result of a lens cannot be saved to a path, a folder or a file."""
    path = expanded(path)
    if names_a_file(path):
        check_file(path)
    else:
        check_holds_no_other(check_writable(path), lens)


def check_holds_no_other(folder: Path, lens: str) -> None:
    """Raise InputError if a folder holds a result of another lens, whose page and images would be overwritten."""
    for path in sorted(folder.glob("*.json")) if folder.is_dir() else ():
        record = read_record(path)
        if record is not None and record["lens"] != lens and files_of_record(record):
            raise InputError(
                f"the folder {folder} holds a result of {record['lens']} ({path.name}): save the result of {lens} into "
                "another folder"
            )


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
