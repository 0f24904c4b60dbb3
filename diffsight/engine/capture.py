"""Capture the block of a `with` statement as a function that runs later, instead of where it is written.

    with model.edit() as edited:                # runs in every later run, not here
        edited.layers[2].output[:] = 0

This is the only module of the engine that reads source code. Everything built on it also accepts a plain function.

How it works: On entry, the statement is found in the source of the frame that enters it, from the position of the
instruction being executed. Its block is compiled to a function with the same file name and line numbers. Where it is
written, the block is skipped: a trace function on that one frame raises an exception at the first instruction of the
block. `__exit__` suppresses the exception and restores the trace function of the debugger or of coverage.

What names mean in a captured block: A name that is bound where the block is written keeps the value it has there, as if
it were passed as an argument. So a list remains the same list, and a loop variable keeps its current value. Any other
name is looked up among the globals when the block runs. A name assigned in the block is local to it.
"""

import __future__

import ast
import ctypes
import inspect
import linecache
import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from types import CodeType, FrameType, TracebackType
from typing import Any

from diffsight.errors import SourceError

ARGUMENT = "_diffsight_argument"  # the parameter of a compiled block
Span = tuple[tuple[int | None, int | None], tuple[int | None, int | None]]  # (line, column) of the start and of the end

_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
_LOOPS = (ast.For, ast.While)
_FUTURE = sum({getattr(__future__, name).compiler_flag for name in __future__.all_feature_names} - {inspect.CO_NESTED})


class _Skip(BaseException):
    """Raised at the first instruction of a block to skip it."""


class Block:
    """The block of a `with` statement, as a function.

    Args:
        frame: The frame that the statement is written in.
        tree: The parsed source of that frame.
        statement: The statement, for its line number and the functions and classes around it.
        body: The statements of the block.
        target: What the statement binds with `as`.

    Attributes:
        where: The position of the statement, as `file:line`.

    Raises:
        SourceError: The block contains something that works only where it is written, such as `return`.
    """

    def __init__(
        self,
        frame: FrameType,
        tree: ast.Module,
        statement: ast.stmt,
        body: list[ast.stmt],
        target: ast.expr | None = None,
    ) -> None:
        self.where = f"{frame.f_code.co_filename}:{statement.lineno}"
        self._frame, self._statement = frame, statement
        self._head: list[Span] = []
        self._target = None if target is None else span_of(target)
        self._name = target.id if isinstance(target, ast.Name) else None
        _check(body, self.where)
        self._starts_with_try = _starts_with_try(body)
        if self._starts_with_try and self._target and not self._name:
            raise SourceError(
                f"the block at {self.where} starts with `try` and its value is bound to {ast.unparse(target)}: bind it "
                "to a plain name, or write another statement before the `try`"
            )
        self._is_empty = all(isinstance(s, ast.Pass) or _is_constant(s) for s in body)
        variables = _variables(frame)
        body = self._function_body(body, target)
        self._function, self._assigned = _compile(body, tree, statement, frame, variables.keys())
        code = self._function.__code__
        self._names = {name: variables[name] for name in code.co_varnames[1 : code.co_argcount]}

    @property
    def is_bound(self) -> bool:
        """Whether the statement binds its value to a name: `with ... as name:`."""
        return self._target is not None

    @property
    def source(self) -> str:
        """The source of the statement, as Python writes it from its syntax tree."""
        return ast.unparse(self._statement)

    @classmethod
    def of_with(cls, frame: FrameType) -> "Block":
        """Return the block of the `with` statement that a frame is about to enter."""
        tree, statement, item = _find(frame)
        body = statement.body
        inner = statement.items[statement.items.index(item) + 1 :]
        if inner:  # with model.edit() as edited, torch.no_grad():
            body = [ast.copy_location(ast.With(items=inner, body=body), statement)]
        block = cls(frame, tree, statement, body, item.optional_vars)
        block._head = [span_of(statement), span_of(item.context_expr)]
        return block

    def __call__(self, value: Any = None) -> None:
        """Run the block. `value` is bound to the name after `as`."""
        self._function(value, **self._names)

    def _function_body(self, body: list[ast.stmt], target: ast.expr | None) -> list[ast.stmt]:
        """Return the statements of the function. Its argument is named `ARGUMENT`."""
        return [ast.Assign([target], ast.Name(ARGUMENT, ast.Load())), *body] if _is_name(target) else body

    def _bind(self, names: dict[str, Any]) -> None:
        """Assign names in the frame that the block is written in."""
        frame = self._frame
        frame.f_locals.update(names)
        if sys.version_info < (3, 13) and frame.f_code.co_flags & inspect.CO_OPTIMIZED:  # `f_locals` is a copy
            ctypes.pythonapi.PyFrame_LocalsToFast(ctypes.py_object(frame), ctypes.c_int(0))

    # ---- skipping the block where it is written

    def skip(self, value: Any = None) -> None:
        """Skip the block that the frame is about to enter.

        Call it in `__enter__`, which then returns `value`. `__exit__` must call `was_skipped`."""
        frame = self._frame
        self._is_traced, self._value = False, value
        self._before = (sys.gettrace(), frame.f_trace, frame.f_trace_opcodes)
        if not self._is_empty:
            self._positions = list(frame.f_code.co_positions())
            frame.f_trace, frame.f_trace_opcodes = self._trace, True
            sys.settrace(_trace_nothing)

    def was_skipped(self, error: BaseException | None) -> bool:
        """Restore the trace function, and return whether the block was skipped.

        Call it in `__exit__`. The result is False if the statement itself raised an error before its block
        (`with ... as nothing[0]`).

        Raises:
            SourceError: The block has run.
        """
        if self._is_empty:
            return error is None
        self._frame.f_trace, self._frame.f_trace_opcodes = self._before[1:]
        sys.settrace(self._before[0])
        if not self._is_traced:  # within a trace function, for example, where Python calls no other
            raise SourceError(f"the block at {self.where} could not be skipped: Python did not trace it") from error
        if isinstance(error, _Skip) and self._starts_with_try and self._name:
            if self._name in self._assigned:
                self._bind({self._name: self._value})
            else:  # declared global
                self._frame.f_globals[self._name] = self._value
        return isinstance(error, _Skip)

    def release(self) -> None:
        """Drop all references to the frame."""
        self._frame = self._before = self._positions = self._value = None

    def _trace(self, frame: FrameType, event: str, argument: Any) -> Any:
        self._is_traced = True
        if event == "opcode" and self._ends_head(frame.f_lasti // 2):
            raise _Skip
        return self._trace

    def _ends_head(self, index: int) -> bool:
        """Return whether to skip the block at this instruction: the first of the block.

        An exception raised at the first instruction of a `try` would not reach the `with` statement. A block that
        starts with `try` is therefore skipped one instruction earlier, where the name after `as` is bound."""
        if not self._is_head(self._positions[index]):
            return True
        return self._starts_with_try and not self._is_head(self._positions[index + 1])

    def _is_head(self, position: tuple) -> bool:
        """Return whether an instruction belongs to `model.edit() as edited`, and not to the block."""
        line, end_line, column, end_column = position
        start, end = (line, column), (end_line, end_column)
        if line is None or (start, end) in self._head:
            return True
        return self._target is not None and self._target[0] <= start and end <= self._target[1]


class Deferred:
    """A context manager whose block does not run where it is written.

    Subclasses override:

    - `_given()`, which returns the value that `as` binds;
    - `_take(block)`, which receives the block at the end of the statement;
    - `_instead`, the end of the error message where the source is not available: what to write instead of a block;
    - `_block_class`, if the block must be compiled in another way.
    """

    _instead: str
    _block_class: type[Block] = Block
    _block: Block | None = None

    def __enter__(self) -> Any:
        return self._enter(sys._getframe(1))

    def _enter(self, frame: FrameType) -> Any:
        with advising(self._instead):
            self._block = self._block_class.of_with(frame)
        value = self._given()
        self._block.skip(value)
        return value

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> bool:
        block, self._block = self._block, None
        with advising(self._instead):
            if not block.was_skipped(error):
                return False
        try:
            self._take(block)
        finally:
            block.release()
        return True

    def _given(self) -> Any:
        return None

    def _take(self, block: Block) -> None:
        raise NotImplementedError


@contextmanager
def advising(instead: str) -> Iterator[None]:
    """Add to the message of a SourceError what to write instead of a block."""
    try:
        yield
    except SourceError as error:
        raise SourceError(f"{error}. {instead}") from error.__cause__


def _trace_nothing(frame: FrameType, event: str, argument: Any) -> None:
    return None


# ---- finding the statement


def parse_source(frame: FrameType, instruction: int) -> tuple[ast.Module, Span]:
    """Parse the source of a frame.

    Returns:
        The syntax tree, and the span in it of one of the frame's instructions, given by its index.

    Raises:
        SourceError: The source, or the position of the instruction in it, is not available.
    """
    code, place = frame.f_code, f"{frame.f_code.co_filename}:{frame.f_lineno}"
    from_code = getattr(linecache, "_getlines_from_code", lambda code: [])  # python -c, from Python 3.13
    found = [from_code(code), linecache.getlines(code.co_filename, frame.f_globals)]
    if code.co_filename == "<string>":  # of `exec` and `python -c` alike
        found = [lines for lines in found if _is_source(lines, code)]
    lines = next(filter(None, found), None)
    if lines is None:
        raise SourceError(f"the source at {place} cannot be read, so the block there cannot be deferred")
    line, end_line, column, end_column = list(code.co_positions())[instruction]
    if column is None:
        raise SourceError(
            f"the block at {place} cannot be found: its code was compiled without column numbers (-X no_debug_ranges)"
        )
    try:
        flags = ast.PyCF_ONLY_AST | ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
        tree = compile("".join(lines), code.co_filename, "exec", flags, dont_inherit=True)
    except SyntaxError:
        tree = ast.Module([], [])
    return tree, ((line, column), (end_line, end_column))


def span_of(node: ast.AST) -> Span:
    """Return where a node starts and ends in the source."""
    return (node.lineno, node.col_offset), (node.end_lineno, node.end_col_offset)


def _find(frame: FrameType) -> tuple[ast.Module, ast.With, ast.withitem]:
    """Return the `with` statement that a frame is entering, and the item that it is entering."""
    # The instruction before the current one is the last of the item's expression, and has its position.
    tree, span = parse_source(frame, frame.f_lasti // 2 - 1)
    for node in ast.walk(tree):
        for item in node.items if isinstance(node, ast.With) else ():
            if span_of(item.context_expr) == span and _is_what_runs(node, item, frame.f_code):
                return tree, node, item
    raise SourceError(
        f"there is no `with` statement at {frame.f_code.co_filename}:{frame.f_lineno}: either its block is entered in "
        "another way, or the source has changed since it was loaded"
    )


def _is_source(lines: list[str], code: CodeType) -> bool:
    """Return whether code was compiled from these lines."""
    try:
        compiled = [compile("".join(lines), code.co_filename, "exec", dont_inherit=True)]
    except SyntaxError:
        return False
    for outer in compiled:
        compiled += [inner for inner in outer.co_consts if isinstance(inner, CodeType)]
    return code in compiled


def _is_what_runs(statement: ast.With, item: ast.withitem, code: CodeType) -> bool:
    """Return whether the running code has the names in the first line of the block and in the head, from this item
    on. It does not if the file was edited after it was loaded."""
    items = statement.items[statement.items.index(item) :]
    first = [statement.body[0]] if isinstance(statement.body[0], (ast.Expr, ast.Assign, ast.AugAssign)) else []
    known, used = _names_of(code), set()
    for node in (node for part in [*items, *first] for node in ast.walk(part)):
        used |= {node.id} if isinstance(node, ast.Name) else {node.attr} if isinstance(node, ast.Attribute) else set()
    return all(name in known or name.startswith("__") for name in used)


def _names_of(code: CodeType) -> set[str]:
    names = {*code.co_names, *code.co_varnames, *code.co_cellvars, *code.co_freevars}
    return names.union(*(_names_of(inner) for inner in code.co_consts if isinstance(inner, CodeType)))


def _scopes_around(tree: ast.AST, statement: ast.stmt) -> list[ast.AST]:
    """Return the functions and classes around a statement, innermost first."""
    start, end = span_of(statement)
    scopes = [node for node in ast.walk(tree) if isinstance(node, (*_FUNCTIONS, ast.ClassDef))]
    found = [node for node in scopes if span_of(node)[0] <= start and end <= span_of(node)[1]]
    return sorted(found, key=lambda node: span_of(node)[0], reverse=True)


# ---- compiling the block


def _own_nodes(body: Sequence[ast.AST], in_loop: bool = False) -> Iterator[tuple[ast.AST, bool]]:
    """Yield the nodes of a block, and whether each is inside a loop of the block.

    The nodes of functions and classes defined in the block are left out."""
    for node in body:
        yield node, in_loop
        if not isinstance(node, (*_FUNCTIONS, ast.ClassDef)):
            yield from _own_nodes(list(ast.iter_child_nodes(node)), in_loop or isinstance(node, _LOOPS))


def _check(body: list[ast.stmt], where: str) -> None:
    """Raise SourceError for what works only where the block is written."""
    for node, in_loop in _own_nodes(body):
        keyword = type(node).__name__.lower()
        leaves_loop = isinstance(node, (ast.Break, ast.Continue)) and not in_loop
        if isinstance(node, ast.Call) and not node.args and isinstance(node.func, ast.Name) and node.func.id == "super":
            raise SourceError(
                f"the block at {where} is compiled outside its method, so `super()` needs arguments: write "
                "`super(Class, self)`"
            )
        if leaves_loop or isinstance(node, (ast.Return, ast.Yield, ast.YieldFrom, ast.Await, ast.Nonlocal)):
            raise SourceError(
                f"the block at {where} does not run where it is written, so it cannot contain `{keyword}`"
            )


def _compile(
    body: list[ast.stmt], tree: ast.Module, statement: ast.stmt, frame: FrameType, known: Collection[str]
) -> tuple[Any, set[str]]:
    """Compile the function of a block.

    Returns:
        The function, which takes `ARGUMENT` and the `known` names that the block uses; and the names that the
        block assigns.
    """
    around = _scopes_around(tree, statement)
    owner = next((node.name for node in around if isinstance(node, ast.ClassDef)), None)
    is_global = {name for node, _ in _own_nodes(body) if isinstance(node, ast.Global) for name in node.names}
    outer = around[0].body if around and isinstance(around[0], (ast.FunctionDef, ast.AsyncFunctionDef)) else []
    outer_global = {name for node, _ in _own_nodes(outer) if isinstance(node, ast.Global) for name in node.names}
    if outer_global - is_global:
        body = [ast.Global(sorted(outer_global - is_global)), *body]
    # Compiled without parameters, the local variables of the function are the names that the block assigns.
    bare = _function(body, [], statement, owner, frame).__code__
    assigned = {*bare.co_varnames, *bare.co_cellvars} - {ARGUMENT}
    used = {_mangled(node.id, owner) for part in body for node in ast.walk(part) if isinstance(node, ast.Name)}
    parameters = sorted(used.intersection(known) - is_global - outer_global - {ARGUMENT})
    return _function(body, parameters, statement, owner, frame), assigned


def _function(
    body: list[ast.stmt], parameters: list[str], statement: ast.stmt, owner: str | None, frame: FrameType
) -> Any:
    """Return a function with this body. `owner` is the name of the class around the block."""
    code = frame.f_code
    arguments = ast.arguments([], [*map(ast.arg, (ARGUMENT, *parameters))], None, [], [], None, [])
    definition: ast.stmt = ast.FunctionDef("block", arguments, body, [], None, None)
    definition.type_params = []
    if owner is not None:  # Python mangles names that begin with two underscores
        definition = ast.ClassDef(owner, [], [], [definition], [])
        definition.type_params = []
    for node in ast.walk(ast.Module([definition], [])):  # new nodes take the line of the statement
        if "lineno" in node._attributes and not hasattr(node, "lineno"):
            ast.copy_location(node, statement)
    flags = code.co_flags & _FUTURE
    names: dict[str, Any] = {}
    compiled = compile(ast.Module([definition], []), code.co_filename, "exec", flags, dont_inherit=True)
    exec(compiled, frame.f_globals, names)
    return names["block"] if owner is None else names[owner].__dict__["block"]


def _variables(frame: FrameType) -> dict[str, Any]:
    """Return the variables of a frame, including those of the functions around it.

    A class body does not hold the latter: they come from the frames that called it."""
    variables, outer = dict(frame.f_locals), frame
    free = set(frame.f_code.co_freevars) - variables.keys()
    while free and outer is not None and not outer.f_code.co_flags & inspect.CO_OPTIMIZED:
        outer = outer.f_back
        variables.update({name: outer.f_locals[name] for name in free.intersection(outer.f_locals)} if outer else {})
        free -= variables.keys()
    return variables


def _is_name(target: ast.expr | None) -> bool:
    """Return whether `as` binds one or several names. Anything else, such as an attribute, is bound only once, where
    the block is written."""
    return isinstance(target, ast.Name) or (isinstance(target, ast.Tuple) and all(map(_is_name, target.elts)))


def _mangled(name: str, owner: str | None) -> str:
    if owner is None or not name.startswith("__") or name.endswith("__"):
        return name
    return f"_{owner.lstrip('_')}{name}"


def _starts_with_try(body: list[ast.stmt]) -> bool:
    """Return whether the first statement that compiles to an instruction is a `try`."""
    declares = [isinstance(s, ast.Global) or (isinstance(s, ast.AnnAssign) and s.value is None) for s in body]
    first = next((s for s, is_declaration in zip(body, declares) if not is_declaration), None)
    return isinstance(first, (ast.Try, ast.TryStar))


def _is_constant(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
