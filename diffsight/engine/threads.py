"""Threads: the thread that a run belongs to, and calls that the model makes in threads of its own.

A run belongs to the thread that opened it. It sees no calls in other threads, but it notes that there
were such calls. Asking for a value that may have passed in one of them raises an error.
"""

import sys
from collections.abc import Collection
from itertools import count
from threading import local
from types import CodeType

from torch import nn

from diffsight.errors import WrongThreadError


class _Thread(local):
    """The current thread. Its number is never reused, unlike that of `threading.get_ident`."""

    _numbers = count()

    def __init__(self) -> None:
        self.number = next(self._numbers)
        self.has_runs = False  # whether a run is open in it: calls in it belong to a run's body


THIS_THREAD = _Thread()

# Calls of hooked modules that belong to no run, in other threads than the main one: the id of a module to the thread
# and, by its id, the outermost hooked module that the thread has called. If that is a whole
# component, the calls are somebody else's.
calls_in_threads: dict[int, set[tuple[int, int]]] = {}


def check_runs_thread(number: int, path: object) -> None:
    """Raise WrongThreadError unless this thread, which asks for `path`, has the given number."""
    if THIS_THREAD.number != number:
        raise WrongThreadError(
            f"{path}: a run belongs to the thread that opened it. Open a run in each thread, or pass on values"
        )


def note_run_of_thread() -> None:
    """Note that a run is open in this thread, so that calls here are known to belong to its body."""
    THIS_THREAD.has_runs = True


def note_call_in_thread(module: nn.Module, code: CodeType) -> None:
    """Note a call of a hooked module outside the main thread. `code` is the code that calls of hooked modules run."""
    if THIS_THREAD.has_runs:
        return
    frame, outermost = sys._getframe(1), module
    while frame is not None:
        if frame.f_code is code:
            outermost = frame.f_locals["module"]
        frame = frame.f_back
    calls_in_threads.setdefault(id(module), set()).add((THIS_THREAD.number, id(outermost)))


def is_called_in_thread(module: nn.Module, own: int, components: Collection[int]) -> bool:
    """Whether a hooked module was called by a thread that one of the `components`, by id, has started.

    `own` is the thread of the run."""
    calls = calls_in_threads.get(id(module), ())
    return any(thread != own and outermost not in components for thread, outermost in calls)
