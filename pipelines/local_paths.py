"""Find the local path that a user-supplied name refers to, and show paths and names as text."""

import os
from pathlib import Path

from diffsight.errors import InputError


def find_path(name: str | Path) -> Path | None:
    """Return the existing path that a name refers to, or None. The name need not be a path at all.

    Raises:
        InputError: The path is a broken link, or `name` is neither a string nor a path.
    """
    if not isinstance(name, (str, os.PathLike)):
        raise InputError(f"a file or folder must be a string or a Path, not a {type(name).__name__}")
    try:
        path = Path(name).expanduser()
        if path.exists():
            return path
        is_link = path.is_symlink()
    except (OSError, ValueError, RuntimeError):  # too long, a null byte, or an unknown home directory
        return None
    if is_link:
        raise InputError(f"{shortened(str(name))} is a link to {path.readlink()}, which does not exist")
    return None


def printable(path: str | Path) -> str:
    """Return a path as text, with a replacement character for each byte in it that is not UTF-8."""
    return os.fsencode(path).decode(errors="replace")


def shortened(name: str) -> str:
    """Return a name as error messages show it."""
    return name if len(name) <= 200 else f"{name[:200]}…"
