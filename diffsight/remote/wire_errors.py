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
from diffsight.remote.wire_values import ProtocolError


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
    known = {"ProtocolError": ProtocolError, "RemoteError": RemoteError}.get(kind)
    found = known or getattr(errors, kind, None) or getattr(builtins, kind, None)
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
