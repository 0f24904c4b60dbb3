"""Sessions: runs grouped.

    with model.session() as session:
        clean = model.trace(a).layers[5].output
        for item in session.iter(items):                # or `with session.iter(items) as item:`
            with model.trace(item) as run:
                run.layers[5].output = clean

Values pass between runs as they do anywhere; what a session adds is an end. Runs of any model that were opened in its
block and are still open are finished when the block ends, in the order in which they were opened, and closed when an
error ends it.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from diffsight.engine.capture import Block, Deferred

if TYPE_CHECKING:
    from diffsight.run import Run

Item = TypeVar("Item")
_sessions: ContextVar[tuple["Session", ...]] = ContextVar("diffsight_sessions", default=())


class Session:
    """What `model.session()` gives; see the module."""

    def __init__(self) -> None:
        self._opened: list[weakref.ref[Run]] = []

    @property
    def runs(self) -> list["Run"]:
        """The runs that were opened in the block and are still open."""
        runs = [known() for known in self._opened]
        return [run for run in runs if run is not None and run._flow.outcome is None]

    def iter(self, items: Iterable[Item]) -> "Turns[Item]":
        """Each of `items` in turn, for a loop or for a block that is repeated:

            for item in session.iter(items): ...
            with session.iter(items) as item: ...
            results = session.iter(items)(function)

        The `with` statement is a loop over its block, which is captured from source, see `engine.capture`; what it
        assigns is bound when it ends. Only the `for` statement can be left with `break`."""
        return Turns(items)

    def __enter__(self) -> "Session":
        _sessions.set((*_sessions.get(), self))
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        _sessions.set(tuple(session for session in _sessions.get() if session is not self))
        try:
            if error is None:
                for run in self.runs:
                    run.finish()
        finally:
            for run in self.runs:
                run._flow.close("an error ended its session")

    def __repr__(self) -> str:
        return f"<session with {len(self.runs)} open runs>"


class Turns(Deferred, Generic[Item]):
    """Items in turn: what `session.iter(items)` gives."""

    _repeats = True
    _instead = "Write a loop: `for item in session.iter(items):`"

    def __init__(self, items: Iterable[Item]) -> None:
        self._items = items

    def __iter__(self) -> Iterator[Item]:
        return iter(self._items)

    def __call__(self, function: Callable[[Item], Any]) -> list[Any]:
        """Calls `function` with each item; gives what it returns."""
        return [function(item) for item in self]

    def _take(self, block: Block) -> None:
        block.run_here(self._items)


def note(run: "Run") -> None:
    """A run is opened: it belongs to the sessions around it."""
    for session in _sessions.get():
        session._opened = [*map(weakref.ref, session.runs), weakref.ref(run)]
