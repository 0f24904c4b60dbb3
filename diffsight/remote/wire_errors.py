"""The format of errors in remote runs. An error is raised with the same class and text, at the line that caused it.

    raise error_of(described(error))

Errors of diffsight and of Python keep their class. Any other error, such as one of a library that only the server has,
becomes a `RemoteError` that names its class.
"""

import builtins
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from diffsight import errors
from diffsight.engine.users_line import UsersLine, line_of, set_line


class RemoteError(errors.DiffsightError):
    """The server cannot be reached, refuses the run, or has ended it; or it sent an error of an unknown class."""


_PLAIN = (bool, int, float, str, type(None))


def described(error: BaseException) -> dict[str, Any]:
    """Return an error in the form used in messages."""
    args = list(error.args) if all(type(one) in _PLAIN for one in error.args) else [str(error)]
    line, cause = line_of(error), error.__cause__
    return {
        "kind": type(error).__name__,
        "args": args,
        "notes": list(getattr(error, "__notes__", ())),
        "line": line and str(line),
        "cause": cause and described(cause),
    }


def error_of(data: Mapping[str, Any], lines: Mapping[str, UsersLine] = MappingProxyType({})) -> Exception:
    """Return the error that a message describes. `lines` maps texts to the lines that the error may refer to."""
    kind, args = data["kind"], data["args"]
    found = _diffsights_own(kind) or getattr(builtins, kind, None)
    try:
        if not (isinstance(found, type) and issubclass(found, Exception)):
            raise TypeError(kind)
        error = found(*args)
    except TypeError:
        error = RemoteError(f"{kind}: {' '.join(map(str, args))}")
    for note in data["notes"]:
        error.add_note(note)
    error.__cause__ = data["cause"] and error_of(data["cause"])
    if data["line"] in lines:
        set_line(error, lines[data["line"]])
    return error


def _diffsights_own(kind: str) -> type[Exception] | None:
    """Return the class of errors of diffsight with this name. It may be in any module, such as that of a lens."""
    waiting: list[type[Exception]] = [errors.DiffsightError]
    for one in waiting:
        if one.__name__ == kind:
            return one
        waiting += one.__subclasses__()
    return None
