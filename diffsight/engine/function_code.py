"""What the code of functions uses, as far as it can be seen from outside.

function_of(Net.forward)            # the function itself, without decorators that keep it in `__wrapped__`
codes_of(function)                  # its code, and that of the functions inside it
values_used([net.forward])          # the values of variables from outside, and those that these functions use
"""

from collections.abc import Iterable, Iterator
from functools import partial
from types import CodeType, FunctionType, MethodType
from typing import Any

_LIBRARIES = {"torch", "transformers", "diffusers", "accelerate", "numpy"}  # not looked into
_MOST = 1000  # functions


def function_of(member: Any) -> Any:
    """Return the function of a method or property."""
    function = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    return function


def codes_of(function: Any) -> Iterator[CodeType]:
    """Return the code of a function, and of the functions inside it."""
    waiting = [function.__code__] if isinstance(function, FunctionType) else []
    for code in waiting:
        waiting += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    return iter(waiting)


def values_used(values: Iterable[Any]) -> list[Any]:
    """Return the values of variables from outside that the functions among some values use, the functions that these
    use, and so on."""
    waiting, used, seen = [*values], [], set()
    while waiting and len(seen) < _MOST:
        function = _called(waiting.pop())
        if not isinstance(function, FunctionType) or id(function) in seen:
            continue
        seen.add(id(function))
        if (function.__module__ or "").partition(".")[0] not in _LIBRARIES:
            names = {name for code in codes_of(function) for name in code.co_names}
            found = [function.__globals__[name] for name in names if name in function.__globals__]
            found += map(_content_of, function.__closure__ or ())
            used += found
            waiting += found
    return used


def _called(value: Any) -> Any:
    """Return the function that is called by calling a value."""
    if isinstance(value, (FunctionType, MethodType, property, staticmethod, classmethod)):
        return function_of(value)
    if isinstance(value, partial):
        return _called(value.func)
    return None if isinstance(value, type) or not callable(value) else type(value).__call__


def _content_of(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # it has no value yet
        return None
