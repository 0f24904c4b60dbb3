"""Blocks that are repeated, such as `with session.iter(items) as item:` and `with tracer.iter[:]:`.

They are loops in the form of a `with` statement. Python runs such a block only once, so it is captured from source, see
`engine.capture`, and run as the body of a `for` loop. What the block assigns is bound in the frame that it is written
in, as after a loop.
"""

import ast
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from types import FrameType
from typing import Any

from diffsight.engine.capture import ARGUMENT, Block, Deferred, parse_source, span_of


class RepeatedBlock(Block):
    """A block as the body of a `for` loop. What it binds with `as` is the item of each turn."""

    def __init__(
        self,
        frame: FrameType,
        tree: ast.Module,
        statement: ast.stmt,
        body: list[ast.stmt],
        target: ast.expr | None = None,
    ) -> None:
        self._item = target
        super().__init__(frame, tree, statement, body)
        self._is_empty = self._is_empty and target is None

    def run(self, items: Iterable[Any]) -> None:
        """Run the block once for each item, and bind what it assigns where it is written, also after an error."""
        names: dict[str, Any] = {}
        try:
            self((items, names.update, locals))
        finally:
            self._bind({name: names[name] for name in self._assigned if name in names})

    def _function_body(self, body: list[ast.stmt], target: ast.expr | None) -> list[ast.stmt]:
        # for item in argument[0]: body, and finally argument[1](argument[2]()). The built-in `locals` is handed over as
        # well, since the block may use its name for something else.
        loop = ast.For(self._item or ast.Name("_", ast.Store()), _argument(0), body, [])
        keep = ast.Call(_argument(1), [ast.Call(_argument(2), [], [])], [])
        return [ast.Try([loop], [], [], [ast.Expr(keep)])]


class Loop(Deferred):
    """Items, for a `for` loop or for a `with` statement whose block is repeated. Subclasses define `__iter__`."""

    _block_class = RepeatedBlock

    def __iter__(self) -> Iterator[Any]:
        raise NotImplementedError

    def _take(self, block: RepeatedBlock) -> None:
        block.run(self)


def rest_of_block(frame: FrameType) -> Callable[[], RepeatedBlock] | None:
    """Return what follows a bare call (`layers.all()`) in the block of a `with` statement, to be repeated.

    Args:
        frame: The frame that makes the call.

    Returns:
        A function that compiles the statements after the call. None where the call is not a statement of such a block,
        or is its last one.
    """
    tree, span = parse_source(frame, frame.f_lasti // 2)
    for node in (node for node in ast.walk(tree) if isinstance(node, ast.With)):
        for index, statement in enumerate(node.body):
            is_call = isinstance(statement, ast.Expr) and span_of(statement.value) == span
            if is_call and statement is not node.body[-1]:
                return partial(RepeatedBlock, frame, tree, statement, node.body[index + 1 :])
    return None


def _argument(index: int) -> ast.expr:
    return ast.Subscript(ast.Name(ARGUMENT, ast.Load()), ast.Constant(index), ast.Load())
