"""The keyword arguments that a call takes, even where it declares `**kwargs` and would accept anything.

    named_arguments(pipeline.__call__)      # {"prompt", "num_inference_steps", …, "callback", "callback_steps"}

The old keywords that a function reads from its `**kwargs` are found in its source code.
"""

import ast
import functools
import inspect
import textwrap
import types
import typing
import weakref
from collections.abc import Callable, Iterable

from diffsight.errors import InputError, suggest


def check_arguments(title: str, given: Iterable[str], known: Iterable[str], near: Iterable[str] = ()) -> None:
    """Raise InputError if an argument is not known.

    Args:
        title: The name of the function or object that takes the arguments, for the message.
        given: The names that were passed.
        known: The names that are allowed.
        near: Other names that may have been meant. The message suggests them as well.
    """
    known = set(known)
    for name in given:
        if name not in known:
            raise InputError(f"{title} has no argument {name!r}{suggest(name, sorted({*known, *near}))}")


_signatures: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # signatures of methods, by function


def signature(function: Callable) -> inspect.Signature:
    """Return `inspect.signature(function)`. It is cached for methods, because every run of a pipeline needs it."""
    if not isinstance(getattr(function, "__func__", None), types.FunctionType):
        return inspect.signature(function)
    if function.__func__ not in _signatures:
        _signatures[function.__func__] = inspect.signature(function)
    return _signatures[function.__func__]


def named_arguments(function: Callable) -> set[str]:
    """Return the names that a function or method takes as keywords, including those that it reads from `**kwargs`.

    If the function passes its `**kwargs` on to another method of its object, the arguments of that method are included.
    If it passes them as a dictionary, the names that the method reads from the dictionary are included."""
    parameters = signature(function).parameters.values()
    named = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    rest = next((p for p in parameters if p.kind is p.VAR_KEYWORD), None)
    if rest is None:
        return named
    keys = getattr(next(iter(typing.get_args(rest.annotation)), None), "__annotations__", {})  # Unpack[SomeKwargs]
    own = inspect.unwrap(function.__func__ if isinstance(function, types.MethodType) else function)
    read, passed_on, handed_over = _keywords_in_source(own, rest.name)
    named |= set(keys) | read
    owner = getattr(function, "__self__", None)
    for called, given in passed_on if owner is not None else ():
        other = _method(owner, own, called)
        if other is not None:
            is_function = isinstance(other, (types.MethodType, types.FunctionType))
            named |= named_arguments(other if is_function else types.MethodType(type(other).__call__, other)) - given
    for called, place in handed_over if owner is not None else ():
        other = _method(owner, own, called)
        if isinstance(other, types.MethodType):
            named |= _keywords_in_source(inspect.unwrap(other.__func__), [*inspect.signature(other).parameters][place])[
                0
            ]
    return named


@functools.cache
def _keywords_in_source(
    function: Callable, rest: str
) -> tuple[frozenset[str], tuple[tuple[ast.Attribute, set[str]], ...], tuple[tuple[ast.Attribute, int], ...]]:
    """Return the names that a function reads from its `**rest`; the methods that it calls with `**rest`, each with the
    names of the other arguments there; and the methods that it passes the dictionary `rest` to, each with the position
    of that argument."""
    try:
        code = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, SyntaxError, TypeError):  # no source code: any string in the code may be a name
        constants = getattr(getattr(function, "__code__", None), "co_consts", ())
        return frozenset(text for text in constants if isinstance(text, str) and text.isidentifier()), (), ()
    nodes = list(ast.walk(code))
    read = frozenset(name for node in nodes for name in _read(node, rest))
    passed_on = tuple(called for node in nodes if (called := _passed_on(node, rest)) is not None)
    calls = [node for node in nodes if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)]
    handed = ((call.func, place) for call in calls for place, arg in enumerate(call.args) if _is_name(arg, rest))
    return read, passed_on, tuple(handed)


def _read(node: ast.AST, rest: str) -> Iterable[str]:
    """Yield the names that a piece of code reads from `**rest`: `rest.pop("a")`, `rest["a"]`, `"a" in rest`, or
    `for name in ["a", "b"]: rest.pop(name)`."""
    key = None
    if isinstance(node, ast.For) and isinstance(node.iter, (ast.List, ast.Tuple)):
        inside = [part for statement in node.body for part in ast.walk(statement) if isinstance(part, ast.Call)]
        if any(_is_name(getattr(call.func, "value", None), rest) for call in inside):
            yield from (part.value for part in node.iter.elts if isinstance(part, ast.Constant))
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and _is_name(node.func.value, rest):
        key = next(iter(node.args), None)
    elif isinstance(node, ast.Subscript) and _is_name(node.value, rest):
        key = node.slice
    elif isinstance(node, ast.Compare) and any(_is_name(other, rest) for other in node.comparators):
        key = node.left
    if isinstance(key, ast.Constant) and isinstance(key.value, str):
        yield key.value


def _passed_on(node: ast.AST, rest: str) -> tuple[ast.Attribute, set[str]] | None:
    """Return the attribute that a piece of code calls with `**rest`, and the names of the other arguments; or None."""
    if not isinstance(node, ast.Call) or not any(k.arg is None and _is_name(k.value, rest) for k in node.keywords):
        return None
    given = {keyword.arg for keyword in node.keywords if keyword.arg is not None}
    return (node.func, given) if isinstance(node.func, ast.Attribute) else None


def _method(owner: object, function: Callable, called: ast.Attribute) -> Callable | None:
    """Return the method that `self.name` or `super().name` refers to in a method of `owner`, or None."""
    if _is_name(called.value, "self"):
        return getattr(owner, called.attr, None)
    if isinstance(called.value, ast.Call) and _is_name(called.value.func, "super"):
        order = type(owner).__mro__
        defining = next(
            (c for c in order if inspect.unwrap(vars(c).get(function.__name__, int)) is function), order[-1]
        )
        return getattr(super(defining, owner), called.attr, None)
    return None


def _is_name(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name
