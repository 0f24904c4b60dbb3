"""Blocks that are repeated, such as `with session.iter(items) as item:` and `with tracer.iter[:]:`.

They are loops in the form of a `with` statement. Python runs the block of a `with` statement only once, so the block is
captured from source (see `engine.capture`) and run as the body of a `for` loop. Names that the block assigns are bound
in its enclosing frame, as after a loop. A run has its result only when all steps are done. So in a block repeated for
every step, the first statement that reads `model.generator.output` or `tracer.result`, and all statements after it, run
once, after the loop.
"""

import ast
from collections.abc import Callable, Collection, Iterable, Iterator
from functools import partial
from types import FrameType
from typing import Any

from diffsight.engine.capture import ARGUMENT, Block, Deferred, parse_source, span_of
from diffsight.errors import InputError
from diffsight.run import Run

OWN_STEPS = (
    "each invoke has its own steps: write `with tracer.all():` (or `tracer.iter[...]`) inside "
    "`with tracer.invoke(...):`"
)


class RepeatedBlock(Block):
    """A block as the body of a `for` loop. The name after `as` is bound to the item of each turn."""

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
        """Run the block once for each item, and bind its assigned names in its frame, even after an error."""
        names: dict[str, Any] = {}
        try:
            self((items, names.update, locals))
        finally:
            self._bind({name: names[name] for name in self._assigned if name in names})

    def _function_body(self, body: list[ast.stmt], target: ast.expr | None) -> list[ast.stmt]:
        # the loop over argument[0], and finally argument[1](argument[2]()). The built-in `locals` is passed as an
        # argument, since the block may use its name for something else.
        keep = ast.Call(_argument(1), [ast.Call(_argument(2), [], [])], [])
        return [ast.Try(self._repeated(body), [], [], [ast.Expr(keep)])]

    def _repeated(self, body: list[ast.stmt]) -> list[ast.stmt]:
        return [self._loop(_argument(0), body)]

    def _loop(self, items: ast.expr, body: list[ast.stmt]) -> ast.stmt:
        return ast.For(self._item or ast.Name("_", ast.Store()), items, body or [ast.Pass()], [])


class StepsBlock(RepeatedBlock):
    """A block that is repeated for every step. Statements from the first that reads the run's result on run once, at
    the end."""

    def _repeated(self, body: list[ast.stmt]) -> list[ast.stmt]:
        body, after = _split(body, self._frame)
        return [*super()._repeated(body), *after]


class BlockOfInvokes(StepsBlock):
    """A block around `with tracer.invoke(...):`. The block of each invoke is repeated for the steps of that invoke."""

    def run(self, steps: Callable[[], Iterable[Any]]) -> None:
        """Run the block once. `steps` returns the steps of the invoke that is open."""
        super().run(steps)

    def _repeated(self, body: list[ast.stmt]) -> list[ast.stmt]:
        invokes = [node for part in body for node in ast.walk(part) if _is_invoke(node)]
        if not invokes:
            raise InputError(OWN_STEPS)
        for invoke in invokes:
            inner, after = _split(invoke.body, self._frame, _bound_by(invoke))
            invoke.body = [*([self._loop(ast.Call(_argument(0), [], []), inner)] if inner else []), *after]
        return body


class Loop(Deferred):
    """Items for a `for` loop, or for a `with` statement whose block is repeated. Subclasses define `__iter__`."""

    _block_class = RepeatedBlock

    def __iter__(self) -> Iterator[Any]:
        raise NotImplementedError

    def _take(self, block: RepeatedBlock) -> None:
        block.run(self)


def rest_of_block(frame: FrameType) -> Callable[[], RepeatedBlock] | None:
    """Return the statements after a bare call (`layers.all()`) in the block of a `with` statement, to be repeated.

    Args:
        frame: The frame that makes the call.

    Returns:
        A function that compiles the statements after the call; None if the call is not a statement of such a block, or
        is the last one.
    """
    tree, span = parse_source(frame, frame.f_lasti // 2)
    for node in (node for node in ast.walk(tree) if isinstance(node, ast.With)):
        for index, statement in enumerate(node.body):
            is_call = isinstance(statement, ast.Expr) and span_of(statement.value) == span
            if is_call and statement is not node.body[-1]:
                return partial(RepeatedBlock, frame, tree, statement, _split(node.body[index + 1 :], frame)[0])
    return None


def _is_invoke(node: ast.AST) -> bool:
    """Return whether a node is `with tracer.invoke(...):`."""
    opened = [item.context_expr for item in node.items] if isinstance(node, ast.With) else []
    called = [value.func for value in opened if isinstance(value, ast.Call)]
    return any(isinstance(function, ast.Attribute) and function.attr == "invoke" for function in called)


def _split(body: list[ast.stmt], frame: FrameType, runs: Collection[str] = ()) -> tuple[list[ast.stmt], list[ast.stmt]]:
    """Split a block at the first statement that reads the result of a run. `runs` contains names of runs that are not
    bound in the frame yet."""
    for index, statement in enumerate(body):
        if any(_is_result(node, frame, runs) for node in ast.walk(statement)):
            return body[:index], body[index:]
    return body, []


def _is_result(node: ast.AST, frame: FrameType, runs: Collection[str]) -> bool:
    """Return whether a node is `model.generator.output` or `tracer.result`."""
    outer = node.value if isinstance(node, ast.Attribute) else None
    if isinstance(outer, ast.Attribute):
        return (outer.attr, node.attr) == ("generator", "output")
    if not isinstance(outer, ast.Name) or node.attr != "result":
        return False
    return outer.id in runs or isinstance(frame.f_locals.get(outer.id, frame.f_globals.get(outer.id)), Run)


def _bound_by(statement: ast.With) -> set[str]:
    return {item.optional_vars.id for item in statement.items if isinstance(item.optional_vars, ast.Name)}


def _argument(index: int) -> ast.expr:
    return ast.Subscript(ast.Name(ARGUMENT, ast.Load()), ast.Constant(index), ast.Load())
