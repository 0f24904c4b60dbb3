"""Threads: the thread that a run belongs to, and calls that the model makes in threads of its own.

A run belongs to the thread that opened it. It sees no calls in other threads, but it notes that there
were such calls. Asking for a value that may have passed in one of them raises an error.
"""

import sys
from itertools import count
from threading import get_ident, local, main_thread
from types import CodeType

from torch import nn

from diffsight.errors import WrongThreadError


class _Thread(local):
    """The current thread. Its number is never reused, unlike that of `threading.get_ident`."""

    _numbers = count()

    def __init__(self) -> None:
        self.number = next(self._numbers)
        self.runs: set[RunOfThread] = set()  # while there are any, calls in the thread belong to their bodies
        self.is_main = get_ident() == main_thread().ident


class RunOfThread:
    """A run that begins in this thread."""

    __slots__ = ("_among", "since")

    def __init__(self) -> None:
        self.since = next(_calls)  # earlier calls in other threads do not matter
        self._among = (THIS_THREAD.runs,) if THIS_THREAD.is_main else (THIS_THREAD.runs, runs_beside_main)

    def begin(self) -> None:
        """Note that the run has begun."""
        for runs in self._among:
            runs.add(self)

    def end(self) -> None:
        """Note that the run has ended. May be called in any thread, and again."""
        for runs in self._among:
            runs.discard(self)


THIS_THREAD = _Thread()
runs_beside_main: set[RunOfThread] = set()  # the runs in other threads than the main one
_calls = count()
_CALL_CODES = (nn.Module._call_impl.__code__, nn.Module._wrapped_call_impl.__code__)

# Calls of hooked modules that belong to no run, in threads without runs: the id of a module to, by its id, the
# outermost module that the thread has called, and the number of the last such call. If that is a whole component, or is
# not in the model, the calls are somebody else's.
calls_in_threads: dict[int, dict[int, int]] = {}


def check_runs_thread(number: int, path: object) -> None:
    """Raise WrongThreadError unless this thread, which asks for `path`, has the given number."""
    if THIS_THREAD.number != number:
        raise WrongThreadError(
            f"{path}: a run belongs to the thread that opened it. Open a run in each thread, or pass on values"
        )


def note_call_in_thread(module: nn.Module, code: CodeType) -> None:
    """Note a call of a hooked module outside of runs. `code` is the code that calls of hooked modules run."""
    if THIS_THREAD.runs:
        return
    frame = outermost = sys._getframe(1)  # the call of `module`
    while frame is not None:
        if any(frame.f_code is known for known in (code, *_CALL_CODES)):
            outermost = frame
        frame = frame.f_back
    called = outermost.f_locals["module" if outermost.f_code is code else "self"]
    calls_in_threads.setdefault(id(module), {})[id(called)] = next(_calls)


def outermost_in_threads(module: nn.Module, since: int) -> list[int]:
    """Return the ids of the outermost modules in whose calls other threads have called a hooked module."""
    calls = calls_in_threads.get(id(module))
    return [] if calls is None else [outermost for outermost, number in calls.copy().items() if number > since]
