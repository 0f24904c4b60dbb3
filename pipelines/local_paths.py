"""What a name that a user passes stands for on this machine, and how error messages show it."""

from pathlib import Path


def find_path(name: str | Path) -> Path | None:
    """Return what a name stands for on this machine, or None: it may also be no path at all."""
    try:
        path = Path(name).expanduser()
        return path if path.exists() else None
    except (OSError, ValueError, RuntimeError):  # too long, a null byte, a home that is not known
        return None


def shortened(name: str) -> str:
    """Return a name as error messages show it."""
    return name if len(name) <= 200 else f"{name[:200]}…"
