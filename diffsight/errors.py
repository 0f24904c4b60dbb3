"""The errors that diffsight raises itself. Each says what happened, where, and what to write instead."""

from collections.abc import Iterable
from difflib import get_close_matches


class DiffsightError(Exception):
    """What all of diffsight's own errors are."""


class OutOfOrderError(DiffsightError):
    """A value was asked for, or assigned, after the model had already passed it."""


class NeverReachedError(OutOfOrderError):
    """A value was asked for, or assigned, that the model did not come to before it ended."""


class PointNotFoundError(DiffsightError, AttributeError):
    """A path names no module, method or attribute of the model."""


class NoRunError(DiffsightError):
    """A value was asked for where no run is open."""


class RunClosedError(OutOfOrderError):
    """A run was used after its end."""


class WrongThreadError(DiffsightError):
    """A run was used from another thread than the one that opened it."""


class AssignmentError(DiffsightError, TypeError):
    """A value was assigned that cannot stand where it was put."""


class ScanError(DiffsightError, RuntimeError):
    """A scan came to where values of tensors are needed: shapes alone do not tell how it goes on."""


class SourceError(DiffsightError):
    """The block of a `with` statement shall run at another time, and cannot: its source is not to be had, for one."""


class InputError(DiffsightError, ValueError):
    """What was asked for cannot be run: a prompt, a seed, a layer, a source."""


def suggest(name: str, known: Iterable[str], count: int = 3) -> str:
    """` (did you mean 'mid_block'?)` where near names are known, else an empty string."""
    near = get_close_matches(name, list(known), n=count, cutoff=0.5)
    return f" (did you mean {' or '.join(repr(n) for n in near)}?)" if near else ""


def suggest_packaged(name: str, packaged: Iterable[str]) -> str:
    """The same for a packaged model, such as `diffsight/shapes-clip`, that is meant by its last part."""
    short = {known.split("/")[-1]: known for known in packaged}
    near = get_close_matches(name.split("/")[-1], short, n=1, cutoff=0.6)
    return f" (did you mean {short[near[0]]!r}?)" if near else ""
