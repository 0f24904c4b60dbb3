"""`with model.edit() as (tracer, edited):`. Both names are bound to the run in which the block is replayed."""

import ast
from typing import Any

from diffsight.edits import Editing
from diffsight.engine.capture import Block


class EditBlock(Block):
    """The block of an edit. `is_pair` says whether `as` binds two names."""

    def __init__(self, frame: Any, tree: Any, statement: Any, body: Any, target: ast.expr | None = None) -> None:
        super().__init__(frame, tree, statement, body, target)
        self.is_pair = isinstance(target, ast.Tuple) and len(target.elts) == 2

    def __call__(self, value: Any = None) -> None:
        super().__call__((value, value) if self.is_pair else value)


class PairEditing(Editing):
    """The edit that `model.edit()` returns."""

    _block_class = EditBlock

    def _given(self) -> Any:
        model = super()._given()
        return (model, model) if self._block.is_pair else model


def with_pair(editing: Editing) -> Editing:
    """Let the `as` of an edit bind two names."""
    editing.__class__ = PairEditing
    return editing
