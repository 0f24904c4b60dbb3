"""Which run `model.<path>` means.

Runs in lockstep, several that are open at once, need no code of their own: each has its coroutine.
"""

import weakref
from threading import get_ident
from typing import Any, Protocol

from diffsight.engine.coroutine import current


class OpenRun(Protocol):
    """What is looked at in a run; see `diffsight.engine.flow.Flow`."""

    tree: Any  # of the model that it runs: a copy of a model has its own
    thread: int
    outcome: str | None
    opened_in: Any
    is_entered: bool

    @property
    def has_begun(self) -> bool: ...


class OpenRuns:
    """The runs of a model and of its copies, in the order in which they were opened. They are held weakly."""

    def __init__(self) -> None:
        self._known: list[weakref.ref[Any]] = []

    def add(self, run: OpenRun) -> None:
        """Make `run` the one opened last."""
        if not self._known or self._known[-1]() is not run:
            self._known[:] = [weakref.ref(known) for known in self.open() if known is not run] + [weakref.ref(run)]

    def open(self) -> list[Any]:
        """Return the runs that have not ended."""
        return [run for known in self._known if (run := known()) is not None and run.outcome is None]

    def innermost(self, tree: Any) -> Any:
        """Return the run that `model.<path>` means; None if there is none.

        It is the run opened last in this thread. A run of the model itself (whose tree is `tree`) is preferred to one
        of a copy. Inside an edit, it is the edit's own run, unless the edit has opened another."""
        edit = current_edit()
        runs = [run for run in self.open() if run.thread == get_ident() and run.opened_in is edit]
        if edit is not None and edit.flow.tree.open_runs is self:
            runs.insert(0, edit.flow)
        if len(runs) > 1:
            # leave out runs that nobody has entered or begun
            runs = [run for run in runs if run.is_entered or run.has_begun] or runs
            runs = [run for run in runs if run.tree is tree] or runs
        return runs[-1] if runs else None

    def ended(self) -> Any:
        """Return the run whose block this thread is in, if the run has ended before the block; else None."""
        runs = [known() for known in reversed(self._known)]
        return next((run for run in runs if run and run.is_entered and run.thread == get_ident()), None)

    def is_open_elsewhere(self) -> bool:
        """Whether another thread has a run open."""
        return any(run.thread != get_ident() for run in self.open())

    def __len__(self) -> int:
        return len(self._known)


def current_edit() -> Any:
    """Return the edit that is running now (see `diffsight.engine.bodies.EditBody`); None outside an edit."""
    body = current()
    return body if body is not None and body.is_edit else None
