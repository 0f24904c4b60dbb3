"""Whether a function always returns None, as its bytecode shows.

    returns_nothing(hook)     # True for `def hook(...): self.seen = output` and `lambda *_: self.seen.append(output)`

The functions that it calls are looked up but not called: `list.append`, for example, returns None. The bytecode is
followed from top to bottom with a stack that holds the values known so far.
"""

import dis
import functools
from collections import defaultdict, deque
from inspect import CO_ASYNC_GENERATOR, CO_COROUTINE, CO_GENERATOR, getattr_static
from types import CodeType, FunctionType, MethodDescriptorType, MethodType, ModuleType, WrapperDescriptorType
from typing import Any

from diffsight.engine.function_code import UNSET, value_of

_METHODS = {  # methods of Python's containers that return None
    list: {"append", "extend", "insert", "clear", "__setitem__"},
    deque: {"append", "appendleft", "extend", "insert", "clear", "__setitem__"},
    set: {"add", "update", "clear"},
    dict: {"update", "clear", "__setitem__"},
}
_NEW = {"BUILD_LIST": list, "BUILD_MAP": dict, "BUILD_SET": set}
_LEVELS = 3  # of functions that call each other
_NO_STEPS = {"RESUME", "COPY_FREE_VARS", "CACHE", "PRECALL", "NOP", "EXTENDED_ARG", "KW_NAMES", "MAKE_CELL"}
_POPS_ONLY = ("STORE_", "POP_", "DELETE_", "RETURN_", "JUMP_")


def returns_nothing(function: FunctionType, given: int = 3, levels: int = _LEVELS) -> bool:
    """Return whether every `return` of a function returns None. `given` is the number of arguments that it is called
    with by position: it has defaults for the others."""
    if function.__code__.co_flags & (CO_GENERATOR | CO_COROUTINE | CO_ASYNC_GENERATOR):
        return False
    if _returns_none(function.__code__):
        return True
    try:
        return levels > 0 and all(value is None for value in _returned(function, given, levels))
    except (IndexError, KeyError, TypeError):  # bytecode of another kind
        return False


@functools.cache
def _steps(code: CodeType) -> list[dis.Instruction]:
    return [step for step in dis.get_instructions(code) if step.opname not in _NO_STEPS]


@functools.cache
def _returns_none(code: CodeType) -> bool:
    """Whether every `return` of a function is written without a value, or with None."""
    before = None
    for step in _steps(code):
        if step.opname == "RETURN_CONST" and step.argval is not None:
            return False
        if step.opname == "RETURN_VALUE" and not (
            before.opname == "LOAD_CONST" and before.argval is None and not step.is_jump_target
        ):
            return False
        before = step
    return True


def _returned(function: FunctionType, given: int, levels: int) -> list[Any]:
    """Return the values that a function may return, UNSET for those that are not known."""
    code, stack, returned = function.__code__, [], []
    jumps: dict[int, list] = {}  # where a jump leads to, and the stack there
    goes_on = True
    names, defaults = code.co_varnames[: code.co_argcount], function.__defaults__ or ()
    variables = dict(zip(names[::-1], defaults[::-1])) | (function.__kwdefaults__ or {})
    variables = {name: value for name, value in variables.items() if name not in names[:given]}
    for step in _steps(code):
        name, effect = step.opname, dis.stack_effect(step.opcode, step.arg)
        if (other := jumps.pop(step.offset, None)) is not None:
            stack = [a if a is b else UNSET for a, b in zip(stack[::-1], other[::-1])][::-1] if goes_on else other
        if name == "LOAD_CONST":
            stack.append(step.argval)
        elif name in ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_DEREF"):
            stack += [UNSET] * (effect - 1) + [value_of(step.argval, function)]
        elif name in ("LOAD_FAST", "LOAD_FAST_BORROW", "LOAD_FAST_CHECK"):
            stack.append(variables.get(step.argval, UNSET))
        elif name.startswith("STORE_FAST"):
            return [UNSET]  # with variables of its own it is more than an expression
        elif name in ("LOAD_ATTR", "LOAD_METHOD"):
            stack += [UNSET] * effect + [_attribute(stack.pop(), step.argval)]
        elif name == "BINARY_SUBSCR" or (name == "BINARY_OP" and step.argrepr == "[]"):
            key, holder = stack.pop(), stack.pop()
            stack.append(_item(holder, key))
        elif name == "CALL":
            first = len(stack) - step.arg
            called = next((one for one in stack[first - 2 : first] if one is not UNSET), UNSET)
            result = _result(called, stack[first:], levels)
            del stack[first - 2 :]
            stack.append(result)
        elif name in _NEW:
            del stack[len(stack) + effect - 1 :]
            stack.append(_NEW[name]())
        elif name == "RETURN_CONST":
            returned.append(step.argval)
        elif name == "RETURN_VALUE":
            returned.append(stack[-1])
        elif name.startswith(_POPS_ONLY):
            del stack[len(stack) + min(effect, 0) :]
        elif effect > 0:
            stack += [UNSET] * effect
        else:
            stack[effect - 1 :] = [UNSET]
        if step.opcode in dis.hasjrel:
            if "BACKWARD" in name or name == "FOR_ITER":
                return [UNSET]
            jumps[step.argval] = [*stack]
            if name.endswith("_OR_POP"):
                stack.pop()
        goes_on = not name.startswith(("JUMP_FORWARD", "RETURN", "RAISE", "RERAISE"))
    return returned


def _attribute(value: Any, name: str) -> Any:
    """Return an attribute of a value, or the function behind a method of it, without running any code of its class."""
    if value is UNSET:
        return UNSET
    if isinstance(value, ModuleType):
        return vars(value).get(name, UNSET)
    found = getattr_static(value, name, UNSET)
    found = found.__func__ if isinstance(found, (staticmethod, classmethod)) else found
    is_function = isinstance(found, (FunctionType, MethodDescriptorType, WrapperDescriptorType))
    return found if is_function or not hasattr(type(found), "__get__") else UNSET


def _item(holder: Any, key: Any) -> Any:
    """Return an item of a container; of a `defaultdict` whose items are containers, perhaps a new one."""
    if type(holder) is defaultdict and holder.default_factory in _METHODS:
        return holder.default_factory()
    if type(holder) in (dict, list, tuple) and type(key) in (str, int):
        return dict(enumerate(holder) if type(holder) is not dict else holder).get(key, UNSET)
    return UNSET


def _result(called: Any, arguments: list[Any], levels: int) -> Any:
    """Return what a call returns: None, or a container that `setdefault` was given, or UNSET."""
    if called is print or ((called is setattr or called is delattr) and arguments[0] is not UNSET):
        return None
    called = called.func if isinstance(called, functools.partial) else called
    called = called.__func__ if isinstance(called, MethodType) else called
    kind, name = getattr(called, "__objclass__", None), getattr(called, "__name__", None)
    owner = getattr(called, "__self__", None)
    if kind is None and owner is not None:  # `add = seen.append`
        called = getattr_static(type(owner), name, None)
        kind = getattr(called, "__objclass__", None)
    if kind is not None:
        if kind is dict and name == "setdefault" and len(arguments) == 2:
            return arguments[1] if type(arguments[1]) in _METHODS else UNSET
        is_known = any(issubclass(kind, container) and name in names for container, names in _METHODS.items())
        return None if is_known else UNSET
    given = len(arguments) + 1  # the object of a method counts
    return None if isinstance(called, FunctionType) and returns_nothing(called, given, levels - 1) else UNSET
