"""The innermost of several open runs: the one that `model.<path>` means.

Runs in lockstep, which one body moves in turns, need no code beyond `coroutine`.
"""

import asyncio
import weakref
from contextvars import ContextVar
from threading import Lock
from typing import Any, Protocol

from diffsight.engine.coroutine import current
from diffsight.engine.threads import THIS_THREAD


class OpenRun(Protocol):
    """The attributes of a run that this module reads; see `diffsight.engine.run_to_point.Flow`."""

    tree: Any  # the tree of its model: a copy of a model has its own
    thread: int
    outcome: str | None
    opened_in: Any
    is_entered: bool
    task: Any  # a weak reference to the task of asyncio that opened it; None outside tasks

    @property
    def has_begun(self) -> bool: ...


# The runs that were opened in this context: in this task of asyncio, or in the one that started it.
_here: ContextVar[tuple] = ContextVar("diffsight_runs", default=())


class OpenRuns:
    """The runs of a model and of its copies, in the order in which they were opened. They are held weakly."""

    def __init__(self) -> None:
        self._known: list[weakref.ref[Any]] = []
        self._lock = Lock()

    def add(self, run: OpenRun) -> None:
        """Make `run` the one opened last."""
        known = self._known
        if known and known[-1]() is run:
            return
        new = weakref.ref(run)
        with self._lock:  # threads share it; it is never changed, only replaced
            self._known = [
                known
                for known in self._known
                if (found := known()) is not None and found is not run and found.outcome is None
            ] + [new]
        task = _current_task()
        if task is not None:
            here = [known for known in _here.get() if (found := known()) is not None and found.outcome is None]
            _here.set((*here, new))
            run.task = weakref.ref(task)

    def open(self) -> list[Any]:
        """Return the runs that have not ended."""
        return [run for known in self._known if (run := known()) is not None and run.outcome is None]

    def innermost(self, tree: Any) -> Any:
        """Return the run that `model.<path>` means; None if there is none.

        It is the run opened last in this thread. A run of the model itself (whose tree is `tree`) is preferred to one
        of a copy. Inside an edit, it is the edit's own run, unless the edit has opened another."""
        edit = current_edit()
        runs = [run for run in self.open() if run.thread == THIS_THREAD.number and run.opened_in is edit]
        if any(run.task is not None for run in runs):  # leave out those that another task has opened
            here = [known() for known in _here.get()]
            now = _current_task()
            runs = [run for run in runs if run in here or _is_task_of(run, now)]
        if edit is not None and edit.flow.tree.open_runs is self:
            runs.insert(0, edit.flow)
        if len(runs) > 1:
            # leave out runs that nobody has entered or begun
            runs = [run for run in runs if run.is_entered or run.has_begun] or runs
            runs = [run for run in runs if run.tree is tree] or runs
        return runs[-1] if runs else None

    def ended(self) -> Any:
        """Return the run whose block this thread is in, if the run has ended before the block; else None."""
        runs = [run for known in reversed(self._known) if (run := known()) is not None and run.outcome is not None]
        return next((run for run in runs if run.is_entered and run.thread == THIS_THREAD.number), None)

    def is_open_elsewhere(self) -> bool:
        """Whether another thread has a run open."""
        return any(run.thread != THIS_THREAD.number for run in self.open())

    def __len__(self) -> int:
        return len(self._known)


def _is_task_of(run: OpenRun, now: Any) -> bool:
    task = run.task and run.task()
    return task is None or task is now or task.done()


def _current_task() -> Any:
    """Return the task of asyncio that is running in this thread, if there is one."""
    return None if asyncio._get_running_loop() is None else asyncio.current_task()


def current_edit() -> Any:
    """Return the edit that is running now (see `diffsight.edits.EditBody`); None outside an edit."""
    body = current()
    return body if body is not None and body.is_edit else None
