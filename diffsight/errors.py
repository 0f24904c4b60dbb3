"""The errors that diffsight raises. Each says what happened, where, and what to write instead.

    DiffsightError
    ├── OutOfOrderError             asked for, or assigned, after the model had passed it
    │   ├── NeverReachedError       the model ended without reaching it
    │   └── RunClosedError          the run had already ended
    ├── PointNotFoundError          no such module, method or attribute (also an AttributeError)
    ├── NoRunError                  no run is open
    ├── WrongThreadError            the run belongs to another thread
    ├── AssignmentError             the point cannot take the value (also a TypeError)
    ├── ScanError                   a scan needed the values of a tensor (also a RuntimeError)
    ├── SourceError                 the block of a `with` statement cannot be deferred
    └── InputError                  a wrong argument: a prompt, a seed, a layer, a source (also a ValueError)
        └── UnknownKeyError         a result or a table has nothing under a name (also a KeyError)

Errors of the model itself, and errors in your own code inside a run, are raised unchanged.
"""

import sys
import warnings
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from types import FrameType
from typing import Any


class DiffsightError(Exception):
    """Base class of all errors that diffsight raises."""


class OutOfOrderError(DiffsightError):
    """A value was asked for, or assigned, after the model had already passed it."""


class NeverReachedError(OutOfOrderError):
    """A value was asked for, or assigned, but the model ended without reaching it."""


class PointNotFoundError(DiffsightError, AttributeError):
    """A path names no module, method or attribute of the model."""


class NoRunError(DiffsightError):
    """A value was asked for while no run was open."""


class RunClosedError(OutOfOrderError):
    """A run was used after it had ended."""


class WrongThreadError(DiffsightError):
    """A run was used in a thread other than the one that opened it."""


class AssignmentError(DiffsightError, TypeError):
    """A value was assigned to a point that cannot take it."""


class ScanError(DiffsightError, RuntimeError):
    """A scan reached code that needs the values of a tensor, while only its shape is known."""


class SourceError(DiffsightError):
    """The block of a `with` statement cannot be deferred, for example because its source code is not available."""


class InputError(DiffsightError, ValueError):
    """An argument cannot be used: a prompt, a seed, a layer, a source."""


class UnknownKeyError(InputError, KeyError):
    """A result or a table has nothing under a name."""

    __str__ = Exception.__str__  # KeyError.__str__ would quote the message


def suggest(name: str, known: Iterable[str], count: int = 3) -> str:
    """Return ` (did you mean 'mid_block'?)` if there are similar names, else an empty string."""
    known = list(known)
    with_word = [one for one in known if name in one.split("_")]  # "num_inference_steps" for "steps"
    near = list(dict.fromkeys([*with_word, *get_close_matches(name, known, n=count, cutoff=0.5)]))[:count]
    return f" (did you mean {' or '.join(repr(n) for n in near)}?)" if near else ""


def suggest_packaged(name: str, packaged: Iterable[str]) -> str:
    """Return the same hint for packaged models such as `diffsight/shapes-clip`, comparing the last parts of names."""
    short = {known.split("/")[-1]: known for known in packaged}
    near = get_close_matches(name.split("/")[-1], short, n=1, cutoff=0.6)
    return f" (did you mean {short[near[0]]!r}?)" if near else ""


def warn_user(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn at the line of the user's code that called into diffsight."""
    _, depth = users_frame()
    warnings.warn(message, category, stacklevel=depth + 1)


def is_own_code(names: Mapping[str, Any]) -> bool:
    """Whether code with these global names is diffsight's own."""
    return (names.get("__package__") or "").split(".")[0] == "diffsight"


def users_frame() -> tuple[FrameType, int]:
    """Return the innermost frame outside diffsight, and its distance from the calling function."""
    frame, depth = sys._getframe(1), 0
    while frame.f_back is not None and is_own_code(frame.f_globals):
        frame, depth = frame.f_back, depth + 1
    return frame, depth
