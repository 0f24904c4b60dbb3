"""`with nnsight.cond(x > 0):`, which is `if x > 0:`."""

import sys
from types import TracebackType
from typing import Any

from diffsight.engine.capture import Block, Deferred


class Cond(Deferred):
    """A block that runs in place if a condition holds, and is skipped otherwise."""

    _instead = "Write it with `if`"

    def __init__(self, condition: Any) -> None:
        self._holds = bool(condition)

    def __enter__(self) -> "Cond":
        return self if self._holds else self._enter(sys._getframe(1))

    def _given(self) -> "Cond":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> bool:
        return not self._holds and super().__exit__(kind, error, trace)

    def _take(self, block: Block) -> None:
        pass


def cond(condition: Any) -> Cond:
    """Run a block only if a condition holds: `with nnsight.cond(x > 0):`."""
    return Cond(condition)
