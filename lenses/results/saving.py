"""Writes the files of a result into a folder, all or none."""

import json
import os
import platform
import tempfile
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from diffsight.errors import InputError

_VERSIONS = ("diffsight", "torch", "diffusers", "transformers")


def write_record(record: Mapping[str, Any], path: Path) -> None:
    """Writes what a result is, and the versions it was made with, as JSON."""
    versions = {"python": platform.python_version()} | {name: version(name) for name in _VERSIONS}
    text = json.dumps({**record, "versions": versions}, indent=2, default=repr, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")


def check_writable(folder: str | Path) -> Path:
    """The folder as a path. Raises InputError, and leaves nothing behind, where it cannot be made or written."""
    folder = Path(folder).expanduser()
    existing = folder
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    try:
        tempfile.TemporaryDirectory(dir=existing).cleanup()
    except OSError as error:
        raise InputError(f"the folder {folder} cannot be written: {error.strerror or error}") from None
    return folder


def save_files(folder: str | Path, files: Mapping[str, Callable[[Path], None]]) -> list[Path]:
    """Writes `files` (name to a function that writes it to a path) into `folder`; gives their paths.

    They are written beside it first and then renamed, so that a failure leaves no half-written file."""
    folder = check_writable(folder)
    for name in files:
        if (folder / name).is_dir():
            raise InputError(f"{folder / name} is a folder, in the way of the file")
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    with tempfile.TemporaryDirectory(dir=existing) as beside:
        for name, write in files.items():
            write(Path(beside) / name)
        folder.mkdir(parents=True, exist_ok=True)
        for name in files:
            os.replace(Path(beside) / name, folder / name)
    return [folder / name for name in files]
