"""`with model.session() as session:`: groups of runs.

    with model.session() as session:
        clean = model.trace(a).layers[5].output
        for item in session.iter(items):                # or `with session.iter(items) as item:`
            with model.trace(item) as run:
                run.layers[5].output = clean

Values can be passed between runs without a session. A session finishes its runs: when its block ends, all runs still
open that were opened in it, of any model of `diffsight.compat`, are finished in the order in which they were opened. If
an error ends the block, they are closed instead.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from contextvars import ContextVar
from types import TracebackType
from typing import Any

from diffsight.compat.block_stopped import BlockStopped
from diffsight.compat.error_notes import add_hint
from diffsight.compat.functions import TracerFunctions
from diffsight.compat.repeated_blocks import Loop, RepeatedBlock
from diffsight.extending import Run, flow_of


class Session(TracerFunctions):
    """A group of runs; see the module docstring."""

    def __init__(self) -> None:
        self._opened: list[weakref.ref[Run]] = []

    @property
    def runs(self) -> list[Run]:
        """The runs that were opened in the block and are still open."""
        runs = [reference() for reference in self._opened]
        return [run for run in runs if run is not None and flow_of(run).outcome is None]

    def iter(self, items: Iterable[Any], return_context: bool = False) -> "SessionItems":
        """Repeat a block for each of `items`.

            for item in session.iter(items): ...
            with session.iter(items) as item: ...
            results = session.iter(items)(function)

        The block of the `with` statement is captured from source; see `engine.capture`. Names that it assigns are bound
        when the statement ends. Only the `for` loop can be left with `break`.

        Args:
            items: The items, one for each turn.
            return_context: Whether each item comes with an object that has `.cond`, `.log` and `.exit`.
        """
        return SessionItems([(item, Session()) for item in items] if return_context else items)

    def stop(self) -> None:
        """Leave the block."""
        raise BlockStopped

    exit = stop

    def __enter__(self) -> "Session":
        _sessions.set((*_sessions.get(), self))
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> bool:
        _sessions.set(tuple(session for session in _sessions.get() if session is not self))
        is_stopped = isinstance(error, BlockStopped)
        add_hint(error, trace)
        try:
            if error is None or is_stopped:
                for run in self.runs:
                    run.finish()
        finally:
            for run in self.runs:
                flow_of(run).close("an error ended its session")
        return is_stopped

    def __repr__(self) -> str:
        return f"<session with {len(self.runs)} open runs>"


class SessionItems(Loop):
    """The items of `session.iter(items)`, one for each turn."""

    _instead = "Write a loop: `for item in session.iter(items):`"

    def __init__(self, items: Iterable[Any]) -> None:
        self._items = items

    def __iter__(self) -> Iterator[Any]:
        return iter(self._items)

    def __call__(self, function: Callable[[Any], Any]) -> list[Any]:
        """Call `function` with each item, and return the results."""
        return [function(item) for item in self]

    def _take(self, block: RepeatedBlock) -> None:
        with suppress(BlockStopped):
            super()._take(block)


_sessions: ContextVar[tuple[Session, ...]] = ContextVar("diffsight_sessions", default=())  # outermost first


def join_sessions(run: Run) -> None:
    """Add a run that was just opened to the sessions around it."""
    for session in _sessions.get():
        session._opened = [*map(weakref.ref, session.runs), weakref.ref(run)]
