"""Captures the block of a `with` statement: code that runs later, or more often, than where it is written.

    with model.edit() as edited:                # runs in every later run, not here
        edited.layers[2].output[:] = 0

This is the only place that reads source, and everything that uses it takes a plain function as well. On entry the
statement is found in the source of the frame that enters it, by the position of the instruction that runs; its block is
compiled to a function, under the same file name and line numbers; and the block is passed over where it stands, by a
trace function of this one frame that raises at its first instruction. `__exit__` takes that exception back and puts the
trace function of a debugger or of coverage back in its place.

What names mean in a captured block: a name that is bound where the block is written has the value it has there and
then, as if it were handed over (a list that is appended to stays the same list; a loop variable keeps its turn). Any
other name is looked up among the globals when the block runs. A name assigned in the block is the block's own.
"""

import __future__

import ast
import ctypes
import inspect
import linecache
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import CodeType, FrameType, TracebackType
from typing import Any

from diffsight.errors import SourceError

_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
_LOOPS = (ast.For, ast.While)
_FUTURE = sum({getattr(__future__, name).compiler_flag for name in __future__.all_feature_names} - {inspect.CO_NESTED})
# The parameters of a compiled block: what the `with` statement hands over, and a dictionary for its names at its end.
_GIVEN, _KNOWN = "_diffsight_given", "_diffsight_known"


class _PassedOver(BaseException):
    """Raised at the first instruction of a block to leave it out."""


class Block:
    """Statements of a frame as a function. `where` is their place, as `file:line`.

    With `repeats` they are the body of a loop: `target` is each item in turn of what the block is called with."""

    def __init__(
        self,
        frame: FrameType,
        tree: ast.Module,
        statement: ast.stmt,
        body: list[ast.stmt],
        target: ast.expr | None,
        repeats: bool,
    ) -> None:
        self.where = f"{frame.f_code.co_filename}:{statement.lineno}"
        self._frame = frame
        self._head: list[tuple] = []
        # What stands behind `as` is set where it stands, unless the block repeats.
        self._target = None if target is None or repeats else _range(target)
        self._name = target.id if isinstance(target, ast.Name) and not repeats else None
        _check(body, self.where)
        self._tries = _begins_with_try(body)
        if self._tries and self._target and not self._name:
            raise SourceError(
                f"the block at {self.where} begins with `try`, and is set to {ast.unparse(target)}: write `as` and a "
                f"name, or another line before the `try`"
            )
        self._is_empty = all(isinstance(s, ast.Pass) or _is_constant(s) for s in body) and not (repeats and target)
        if repeats:
            body = [ast.For(target or ast.Name("_", ast.Store()), ast.Name(_GIVEN, ast.Load()), body, [])]
        elif _is_name(target):
            body = [ast.Assign([target], ast.Name(_GIVEN, ast.Load())), *body]
        variables = _variables(frame)
        self._function, self._assigned = _compile(body, tree, statement, frame, variables.keys())
        code = self._function.__code__
        self._names = {name: variables[name] for name in code.co_varnames[2 : code.co_argcount]}

    @classmethod
    def of_with(cls, frame: FrameType, repeats: bool = False) -> "Block":
        """The block of the `with` statement that a frame is about to enter."""
        tree, statement, item = _find(frame)
        body = statement.body
        inner = statement.items[statement.items.index(item) + 1 :]
        if inner:  # with model.edit() as edited, torch.no_grad():
            body = [ast.copy_location(ast.With(items=inner, body=body), statement)]
        block = cls(frame, tree, statement, body, item.optional_vars, repeats)
        block._head = [_range(statement), _range(item.context_expr)]
        return block

    def __call__(self, given: Any = None) -> None:
        """Runs the block, with `given` for what stands behind `as`."""
        self._function(given, {}, **self._names)

    def run_here(self, given: Any) -> None:
        """Runs the block, and binds what it assigned in the frame it was written in, as if it had run there; also where
        it is left by an error."""
        known: dict[str, Any] = {}
        try:
            self._function(given, known, **self._names)
        finally:
            self._bind(known)

    def _bind(self, names: dict[str, Any]) -> None:
        frame, names = self._frame, {name: names[name] for name in self._assigned if name in names}
        variables = frame.f_locals
        variables.update(names)
        if sys.version_info < (3, 13) and frame.f_code.co_flags & inspect.CO_OPTIMIZED:  # a copy of its variables
            ctypes.pythonapi.PyFrame_LocalsToFast(ctypes.py_object(frame), ctypes.c_int(0))

    # ---- leaving the block out where it stands

    def pass_over(self, given: Any = None) -> None:
        """From `__enter__`, which returns `given`: the block will not run. The frame's own `__exit__` has to call
        `passed_over`."""
        frame = self._frame
        self._traced, self._given = False, given
        self._before = (sys.gettrace(), frame.f_trace, frame.f_trace_opcodes)
        if not self._is_empty:
            self._positions = list(frame.f_code.co_positions())
            frame.f_trace, frame.f_trace_opcodes = self._trace, True
            sys.settrace(_trace_nothing)

    def passed_over(self, error: BaseException | None) -> bool:
        """From `__exit__`: whether the block was left out, and no error of the statement itself (`as nothing[0]`) came
        before it; puts the trace function back. Raises SourceError where the block has run."""
        if self._is_empty:
            return error is None
        self._frame.f_trace, self._frame.f_trace_opcodes = self._before[1:]
        sys.settrace(self._before[0])
        if not self._traced:  # as within a trace function, where Python calls no other
            raise SourceError(f"the block at {self.where} could not be passed over") from error
        if isinstance(error, _PassedOver) and self._tries and self._name:
            if self._name in self._assigned:
                self._bind({self._name: self._given})
            else:  # declared global
                self._frame.f_globals[self._name] = self._given
        return isinstance(error, _PassedOver)

    def done(self) -> None:
        """Lets go of the frame."""
        self._frame = self._before = self._positions = self._given = None

    def _trace(self, frame: FrameType, event: str, argument: Any) -> Any:
        self._traced = True
        if event == "opcode" and self._is_end_of_head(frame.f_lasti // 2):
            raise _PassedOver
        return self._trace

    def _is_end_of_head(self, index: int) -> bool:
        """Whether the block is left at an instruction: its first. A `try` is no place for that, since what is raised
        there passes by the `with`: before one it is the last of the head, which sets what stands behind `as`."""
        if not self._is_head(self._positions[index]):
            return True
        return self._tries and not self._is_head(self._positions[index + 1])

    def _is_head(self, position: tuple) -> bool:
        """Whether an instruction belongs to `model.edit() as edited`, not to the block."""
        line, end_line, column, end_column = position
        start, end = (line, column), (end_line, end_column)
        if line is None or (start, end) in self._head:
            return True
        return self._target is not None and self._target[0] <= start and end <= self._target[1]


class Deferred:
    """A context manager whose block does not run where it is written: `_given()` is what stands behind `as`, and
    `_take(block)` gets the block when the statement ends. `_repeats` makes it the body of a loop; `_instead` says what
    to write where its source is not to be had."""

    _block: Block | None = None
    _repeats = False
    _instead: str

    def __enter__(self) -> Any:
        return self._enter(sys._getframe(1))

    def _enter(self, frame: FrameType) -> Any:
        with advising(self._instead):
            self._block = Block.of_with(frame, self._repeats)
        given = self._given()
        self._block.pass_over(given)
        return given

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> bool:
        block, self._block = self._block, None
        with advising(self._instead):
            if not block.passed_over(error):
                return False
        try:
            self._take(block)
        finally:
            block.done()
        return True

    def _given(self) -> Any:
        return None

    def _take(self, block: Block) -> None:
        raise NotImplementedError


@contextmanager
def advising(instead: str) -> Iterator[None]:
    """Has a SourceError say what to write in the place of a block."""
    try:
        yield
    except SourceError as error:
        raise SourceError(f"{error}. {instead}") from error.__cause__


def following(frame: FrameType) -> Callable[[], Block] | None:
    """What follows a bare call (`layers.all()`) in the block of a `with` statement, as the body of a loop; compiled
    when called for. None where the call that a frame makes is not a statement in such a block, or the last."""
    tree, position = _parse(frame, frame.f_lasti // 2)
    for node in (node for node in ast.walk(tree) if isinstance(node, ast.With)):
        for index, statement in enumerate(node.body):
            is_call = isinstance(statement, ast.Expr) and _range(statement.value) == position
            if is_call and statement is not node.body[-1]:
                return partial(Block, frame, tree, statement, node.body[index + 1 :], None, True)
    return None


def _trace_nothing(frame: FrameType, event: str, argument: Any) -> None:
    return None


# ---- finding the statement


def _find(frame: FrameType) -> tuple[ast.Module, ast.With, ast.withitem]:
    """The `with` statement that a frame is entering, and which of its items."""
    # The instruction before the one that enters is the last of the item's expression, and has its position.
    tree, position = _parse(frame, frame.f_lasti // 2 - 1)
    for node in ast.walk(tree):
        for item in node.items if isinstance(node, ast.With) else ():
            if _range(item.context_expr) == position and _is_what_runs(node, item, frame.f_code):
                return tree, node, item
    raise SourceError(
        f"no `with` statement is found at {frame.f_code.co_filename}:{frame.f_lineno}: its block is entered in another "
        "way, or the source has changed since it was loaded"
    )


def _parse(frame: FrameType, instruction: int) -> tuple[ast.Module, tuple]:
    """The source of a frame, and the range in it of one of its instructions."""
    code, place = frame.f_code, f"{frame.f_code.co_filename}:{frame.f_lineno}"
    from_code = getattr(linecache, "_getlines_from_code", lambda code: [])  # python -c, from Python 3.13
    lines = from_code(code) or linecache.getlines(code.co_filename, frame.f_globals)
    if not lines or (code.co_filename == "<string>" and not _is_source(lines, code)):
        raise SourceError(f"the source at {place} cannot be read, so the block there cannot run later")
    line, end_line, column, end_column = list(code.co_positions())[instruction]
    if column is None:
        raise SourceError(f"Python was told to leave out positions, so the block at {place} cannot be found")
    try:
        flags = ast.PyCF_ONLY_AST | ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
        tree = compile("".join(lines), code.co_filename, "exec", flags, dont_inherit=True)
    except SyntaxError:
        tree = ast.Module([], [])
    return tree, ((line, column), (end_line, end_column))


def _is_source(lines: list[str], code: CodeType) -> bool:
    """Whether code was made of these lines: what `exec` runs has the same file name as what `python -c` does."""
    try:
        made = [compile("".join(lines), code.co_filename, "exec", dont_inherit=True)]
    except SyntaxError:
        return False
    for known in made:
        made += [inner for inner in known.co_consts if isinstance(inner, CodeType)]
    return code in made


def _range(node: ast.AST) -> tuple[tuple[int, int], tuple[int, int]]:
    return (node.lineno, node.col_offset), (node.end_lineno, node.end_col_offset)


def _is_what_runs(statement: ast.With, item: ast.withitem, code: CodeType) -> bool:
    """Whether the names in the head, from one of its items on, and in the first line of a block are those of the code
    that runs: a file may have been edited since."""
    items = statement.items[statement.items.index(item) :]
    first = [statement.body[0]] if isinstance(statement.body[0], (ast.Expr, ast.Assign, ast.AugAssign)) else []
    known, used = _names_of(code), set()
    for node in (node for part in [*items, *first] for node in ast.walk(part)):
        used |= {node.id} if isinstance(node, ast.Name) else {node.attr} if isinstance(node, ast.Attribute) else set()
    return all(name in known or name.startswith("__") for name in used)


def _names_of(code: CodeType) -> set[str]:
    names = {*code.co_names, *code.co_varnames, *code.co_cellvars, *code.co_freevars}
    return names.union(*(_names_of(inner) for inner in code.co_consts if isinstance(inner, CodeType)))


def _around(tree: ast.AST, statement: ast.stmt) -> list[ast.AST]:
    """The functions and classes around a statement, innermost first."""
    start, end = _range(statement)
    scopes = [node for node in ast.walk(tree) if isinstance(node, (*_FUNCTIONS, ast.ClassDef))]
    found = [node for node in scopes if _range(node)[0] <= start and end <= _range(node)[1]]
    return sorted(found, key=lambda node: _range(node)[0], reverse=True)


# ---- compiling its block


def _own_nodes(body: Sequence[ast.AST], in_loop: bool = False) -> Iterator[tuple[ast.AST, bool]]:
    """The nodes of a block without those of functions and classes defined in it, and whether each is in a loop."""
    for node in body:
        yield node, in_loop
        if not isinstance(node, (*_FUNCTIONS, ast.ClassDef)):
            yield from _own_nodes(list(ast.iter_child_nodes(node)), in_loop or isinstance(node, _LOOPS))


def _check(body: list[ast.stmt], where: str) -> None:
    """Raises SourceError for what has a meaning only where it stands."""
    for node, in_loop in _own_nodes(body):
        word = type(node).__name__.lower()
        leaves_loop = isinstance(node, (ast.Break, ast.Continue)) and not in_loop
        if isinstance(node, ast.Call) and not node.args and isinstance(node.func, ast.Name) and node.func.id == "super":
            raise SourceError(f"the block at {where} is no method: there `super()` is written `super(Class, self)`")
        if leaves_loop or isinstance(node, (ast.Return, ast.Yield, ast.YieldFrom, ast.Await, ast.Nonlocal)):
            raise SourceError(f"the block at {where} runs at another time, so `{word}` has no meaning in it")


def _compile(
    body: list[ast.stmt], tree: ast.Module, statement: ast.stmt, frame: FrameType, known: Collection[str]
) -> tuple[Any, set[str]]:
    """The function of a block, whose parameters are what `with` hands over and the `known` names it uses; and the names
    that are assigned in it."""
    around = _around(tree, statement)
    owner = next((node.name for node in around if isinstance(node, ast.ClassDef)), None)
    is_global = {name for node, _ in _own_nodes(body) if isinstance(node, ast.Global) for name in node.names}
    inner = around[0].body if around and isinstance(around[0], (ast.FunctionDef, ast.AsyncFunctionDef)) else []
    around_global = {name for node, _ in _own_nodes(inner) if isinstance(node, ast.Global) for name in node.names}
    says_global = [ast.Global(sorted(around_global - is_global))] if around_global - is_global else []
    knows = ast.parse(f"{_KNOWN}.update(locals())").body
    # What the block assigns is what Python takes for its local variables where it has no parameters.
    bare = _function([*says_global, *body], [], statement, owner, frame).__code__
    assigned = {*bare.co_varnames, *bare.co_cellvars} - {_GIVEN, _KNOWN}
    used = {_mangled(node.id, owner) for part in body for node in ast.walk(part) if isinstance(node, ast.Name)}
    parameters = sorted(used.intersection(known) - is_global - around_global - {_GIVEN, _KNOWN})
    return _function([*says_global, ast.Try(body, [], [], knows)], parameters, statement, owner, frame), assigned


def _function(
    body: list[ast.stmt], parameters: list[str], statement: ast.With, owner: str | None, frame: FrameType
) -> Any:
    code = frame.f_code
    arguments = ast.arguments([], [*map(ast.arg, (_GIVEN, _KNOWN, *parameters))], None, [], [], None, [])
    made: ast.stmt = ast.FunctionDef("block", arguments, body, [], None, None)
    made.type_params = []
    if owner is not None:  # names that begin with two underscores are the class's own
        made = ast.ClassDef(owner, [], [], [made], [])
        made.type_params = []
    for node in ast.walk(ast.Module([made], [])):  # what is new stands at the `with`
        if "lineno" in node._attributes and not hasattr(node, "lineno"):
            ast.copy_location(node, statement)
    flags = code.co_flags & _FUTURE
    names: dict[str, Any] = {}
    exec(compile(ast.Module([made], []), code.co_filename, "exec", flags, dont_inherit=True), frame.f_globals, names)
    return names["block"] if owner is None else names[owner].__dict__["block"]


def _variables(frame: FrameType) -> dict[str, Any]:
    """The variables of a frame. Those of the functions around it are among them; the body of a class gets them by way
    of the frames that called it."""
    variables, outer = dict(frame.f_locals), frame
    free = set(frame.f_code.co_freevars) - variables.keys()
    while free and outer is not None and not outer.f_code.co_flags & inspect.CO_OPTIMIZED:
        outer = outer.f_back
        variables.update({name: outer.f_locals[name] for name in free.intersection(outer.f_locals)} if outer else {})
        free -= variables.keys()
    return variables


def _is_name(target: ast.expr | None) -> bool:
    """Whether what stands behind `as` is a name, or several: an attribute is set once, where it is written."""
    return isinstance(target, ast.Name) or (isinstance(target, ast.Tuple) and all(map(_is_name, target.elts)))


def _mangled(name: str, owner: str | None) -> str:
    if owner is None or not name.startswith("__") or name.endswith("__"):
        return name
    return f"_{owner.lstrip('_')}{name}"


def _begins_with_try(body: list[ast.stmt]) -> bool:
    """Whether the first statement that does anything is a `try`."""
    declares = [isinstance(s, ast.Global) or (isinstance(s, ast.AnnAssign) and s.value is None) for s in body]
    first = next((s for s, does_nothing in zip(body, declares) if not does_nothing), None)
    return isinstance(first, (ast.Try, ast.TryStar))


def _is_constant(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
