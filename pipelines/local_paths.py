"""What a name that a user passes stands for on this machine, and how error messages show it."""

from pathlib import Path

from diffsight.errors import InputError


def find_path(name: str | Path) -> Path | None:
    """Return what a name stands for on this machine, or None: it may also be no path at all.

    Raises:
        InputError: It is a link that leads nowhere.
    """
    try:
        path = Path(name).expanduser()
        if path.exists():
            return path
        is_link = path.is_symlink()
    except (OSError, ValueError, RuntimeError):  # too long, a null byte, a home that is not known
        return None
    if is_link:
        raise InputError(f"{shortened(str(name))} is a link to {path.readlink()}, which does not exist")
    return None


def shortened(name: str) -> str:
    """Return a name as error messages show it."""
    return name if len(name) <= 200 else f"{name[:200]}…"
