"""The line of the user's code that an error or a warning is about, and tracebacks that end there.

A line that asks for a value is on the stack when the error is raised. But a value may be assigned long before the model
reaches its point, so the line is kept with the assignment and noted on the error.
"""

import sys
from dataclasses import dataclass
from types import CodeType, FrameType, TracebackType
from typing import Any

from diffsight.errors import DiffsightError, is_own_code, users_frame

_LINE = "_diffsight_line"  # set on an error: the line of the user's code that is its cause
_FROM_EDIT = "_diffsight_edit"  # set on an error that was raised in an edit


@dataclass(frozen=True, slots=True)
class UsersLine:
    """A line of the user's code. Its text is `file:line`."""

    code: CodeType
    number: int
    instruction: int

    @classmethod
    def of_instruction(cls, code: CodeType, instruction: int, names: dict[str, Any]) -> "UsersLine | None":
        """Return the line of an instruction in code with these global names; None if the code is diffsight's own."""
        if is_own_code(names):
            return None
        number = next((line for start, end, line in code.co_lines() if start <= instruction < end), None)
        return cls(code, number or code.co_firstlineno, instruction)

    def __str__(self) -> str:
        return f"{self.code.co_filename}:{self.number}"

    def traceback(self) -> TracebackType | None:
        """Return a traceback of the line alone, or None if its function has returned."""
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and frame.f_code is not self.code:
            frame = frame.f_back
        return frame and TracebackType(None, frame, self.instruction, self.number)


def users_line() -> UsersLine:
    """Return the line of the user's code that called into diffsight."""
    frame, _ = users_frame()
    return UsersLine(frame.f_code, frame.f_lineno, frame.f_lasti)


def set_line(error: BaseException, line: UsersLine) -> None:
    """Note which line of the user's code is the cause of an error that is raised later."""
    setattr(error, _LINE, line)


def line_of(error: BaseException) -> UsersLine | None:
    """Return the line that `set_line` has noted; None if it has noted none."""
    return getattr(error, _LINE, None)


def from_the_asking_line(error: DiffsightError) -> DiffsightError:
    """Return the error without diffsight's own frames: its traceback ends at the line that asked for the value, or at
    the line that assigned the wrong value. An error that was raised in an edit keeps the edit's line."""
    if is_from_edit(error):
        return error
    line = line_of(error)
    return error.with_traceback(line and line.traceback())


def end_at_users_line(trace: TracebackType | None, body: CodeType) -> None:
    """Remove diffsight's own frames from a traceback that begins in the user's code. It then ends at the user's
    innermost line that asked for the value, or at the line that assigned the wrong value.

    `body` is the code from which the functions of `run.each` are called."""
    asked, assigned, is_users = trace, None, True
    while trace is not None:
        frame = trace.tb_frame
        is_engines = is_own_code(frame.f_globals)
        is_users = frame.f_code is body or (is_users and not is_engines)
        asked = trace if is_users and not is_engines else asked
        assigned = None if is_users or is_engines else trace
        trace = trace.tb_next
    asked.tb_next = assigned


def set_from_edit(error: BaseException) -> None:
    """Note that an error was raised in an edit."""
    setattr(error, _FROM_EDIT, True)


def is_from_edit(error: BaseException) -> bool:
    """Whether an error was raised in an edit."""
    return hasattr(error, _FROM_EDIT)
