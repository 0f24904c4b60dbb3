"""What the code of functions uses, as far as it can be seen from outside.

function_of(Net.forward)            # the function itself, without decorators that keep it in `__wrapped__`
codes_of(function)                  # its code, and that of the functions inside it
values_used([net.forward])          # the values of variables from outside, and those that these functions use
"""

import builtins
import sys
from collections.abc import Iterable, Iterator
from functools import partial
from types import CodeType, FunctionType, MethodType, ModuleType, NoneType, SimpleNamespace
from typing import Any

import torch
from torch import nn

_LIBRARIES = {"torch", "transformers", "diffusers", "accelerate", "numpy"}  # not looked into
_PLAIN = {int, float, bool, str, bytes, NoneType, ModuleType}
_MOST = 1000  # values
UNSET: Any = object()  # stands for a value that is not known


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
    """Return what some values refer to, as far as it is not part of a library: the variables from outside and the
    defaults of functions, the attributes of objects and of their classes, and what these refer to in turn."""
    waiting, used, seen = [*values], [], set()
    while waiting and len(seen) < _MOST:
        value = waiting.pop()
        if id(value) not in seen:
            seen.add(id(value))
            found = [*_referred_to(value)]
            used += found
            waiting += found
    return used


def functions_used(function: Any) -> list[FunctionType]:
    """Return a function and the functions that it uses."""
    return [value for value in (function, *values_used([function])) if isinstance(value, FunctionType)]


def value_of(name: str, function: FunctionType) -> Any:
    """Return the value of a variable from outside a function; UNSET if it has none yet, or is the function's own."""
    if name in function.__code__.co_freevars:
        cell = (function.__closure__ or ())[function.__code__.co_freevars.index(name)]
        try:
            return cell.cell_contents
        except ValueError:
            return UNSET
    return function.__globals__.get(name, getattr(builtins, name, UNSET))


def _referred_to(value: Any) -> Iterable[Any]:
    if isinstance(value, (MethodType, staticmethod, classmethod)):
        return (value.__func__, getattr(value, "__self__", None))
    if isinstance(value, property):
        return (value.fget,)
    if isinstance(value, partial):
        return (value.func, *value.args, *value.keywords.values())
    if isinstance(value, FunctionType):
        return () if _is_of_library(value.__module__) else _of_function(value)
    if isinstance(value, (list, tuple, set, dict, SimpleNamespace)):
        inside = vars(value) if isinstance(value, SimpleNamespace) else value
        inside = inside.values() if isinstance(inside, dict) else inside
        return () if len(inside) > _MOST else inside
    kind = type(value)
    if isinstance(value, (type, nn.Module, torch.Tensor)) or kind in _PLAIN or _is_of_library(kind.__module__):
        return ()
    return (*getattr(value, "__dict__", {}).values(), *vars(kind).values())


def _of_function(function: FunctionType) -> Iterable[Any]:
    names = {name for code in codes_of(function) for name in code.co_names}
    used = [function.__globals__[name] for name in names if name in function.__globals__]
    for module in [value for value in used if isinstance(value, ModuleType)]:
        used += [] if _is_of_library(module.__name__) else [vars(module)[name] for name in names & vars(module).keys()]
    used += [value for value in map(_content_of, function.__closure__ or ()) if value is not None]
    used += [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    return [*used, getattr(function, "__wrapped__", None)]


def _is_of_library(name: Any) -> bool:
    root = str(name).partition(".")[0]
    return root in _LIBRARIES or root in sys.stdlib_module_names


def _content_of(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # it has no value yet
        return None
