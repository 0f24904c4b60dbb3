"""Writes the files of a result into a folder: all of them, or none."""

import filecmp
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from diffsight.errors import InputError

HTML = ".html"  # a path with this ending is a page
IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".pdf", ".svg")  # a path with one of these endings is an image
_OTHERS = (".csv", ".gif", ".json", ".md", ".mp4", ".npz", ".pkl", ".pt", ".safetensors", ".txt", ".zip")


def names_a_file(path: Path) -> bool:
    """Return whether a path means a file and not a folder: it ends like an image or a page, and is not an existing
    folder.

    Raises:
        InputError: The path ends like another kind of file, and is not an existing folder.
    """
    if path.suffix.lower() in _OTHERS and not os.path.isdir(path):
        raise InputError(
            f"{path}: a result is written to a folder, or to one file that ends with {', '.join((*IMAGES, HTML))}. A "
            "folder gets all images and numbers"
        )
    return path.suffix.lower() in (*IMAGES, HTML) and not os.path.isdir(path)


def expanded(path: str | Path) -> Path:
    """Return a path to write to, with `~` expanded. Raise InputError if it is not a path or the home is unknown."""
    if not isinstance(path, (str, os.PathLike)):
        raise InputError(f"a path to write to is a string or a Path, not {type(path).__name__}")
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise InputError(f"the folder {path} cannot be written to: {error}") from None


def check_file(path: str | Path) -> None:
    """Raise InputError if a file cannot be written."""
    path = expanded(path)
    if os.path.isdir(path):
        raise InputError(f"{path} is a folder, so the file cannot be written")
    check_writable(path.parent if os.path.lexists(path) else path)  # a new file is checked like a new folder


def check_writable(folder: str | Path) -> Path:
    """Return `folder` as a path, with `~` expanded, if it can be written to. The check leaves nothing behind.

    Raises:
        InputError: The folder cannot be created or written to.
    """
    folder = existing = expanded(folder)
    try:
        while not os.path.lexists(existing) and existing != existing.parent:
            existing = existing.parent
        with tempfile.TemporaryDirectory(dir=existing) as trial:  # try the same names in a temporary folder
            (Path(trial) / folder.relative_to(existing)).mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:  # ValueError: a null byte
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"the folder {folder} cannot be written to: {reason}") from None
    return folder


def save_files(folder: str | Path, files: Mapping[str, Callable[[Path], None]], kept: Iterable[str] = ()) -> list[Path]:
    """Write files into `folder` and return their paths.

    The files are written to a temporary folder and then renamed, so a failure leaves no half-written file and no new
    one.

    Args:
        folder: Created if it does not exist. Other files in it stay.
        files: Names to functions that write a file to a path.
        kept: Names of files in the folder that may only be replaced by files with the same contents.

    Raises:
        InputError: The folder cannot be written to, a folder in it has the name of a file, or a file is to be kept.
    """
    folder = check_writable(folder)
    for name in files:
        if (folder / name).is_dir():
            raise InputError(f"{folder / name} is a folder, so the file cannot be written")
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    with tempfile.TemporaryDirectory(dir=existing) as temporary:
        try:
            for name, write in files.items():
                write(Path(temporary) / name)
        except OSError as error:  # such as a full disk, which writing reports without a name
            error.filename = error.filename or str(folder)
            raise
        for name in kept:
            known = folder / name
            if not (known.is_file() and filecmp.cmp(known, Path(temporary) / name, shallow=False)):
                raise is_not_own(folder, name)
        folder.mkdir(parents=True, exist_ok=True)
        new = [name for name in files if not os.path.lexists(folder / name)]
        try:
            for name in reversed(files):  # the record is first in `files` and comes last: once it exists, all files do
                os.replace(Path(temporary) / name, folder / name)
        except BaseException:  # no record lists the new files yet
            for name in new:
                (folder / name).unlink(missing_ok=True)
            raise
    return [folder / name for name in files]


def is_not_own(folder: Path, name: str) -> InputError:
    """Return the error for a file that is not of a saved result and would be replaced."""
    return InputError(
        f"the folder {folder} holds a file {name} that is not of a saved result, but the result has a file of that "
        "name: save the result into another folder"
    )
