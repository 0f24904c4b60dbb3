"""The forward hooks that others have put on a module, and which of them may change its output.

The model continues with the return value of the last of these hooks, so this is the module's output. Hooks that only
look at the output, such as the hooks with which transformers captures hidden states, see the run's edits. Whether a
hook only looks must be known before it is called, and is determined from its bytecode: it returns nothing and changes
nothing of the output in place. What the functions that it calls do is not known; `is_unsure` finds such hooks.
"""

import dis
import functools
from collections import deque
from collections.abc import Callable, Iterator
from inspect import CO_ASYNC_GENERATOR, CO_COROUTINE, CO_GENERATOR
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn
from torch.nn.modules import module as torch_module

from diffsight.engine.changes_in_place import UNKNOWN, changed_in_place, is_in_place

_RETURN_NOTHING = {  # methods of Python's containers that return None
    list: {"append", "extend", "insert", "clear", "__setitem__"},
    deque: {"append", "appendleft", "extend", "insert", "clear", "__setitem__"},
    set: {"add", "update", "clear"},
    dict: {"update", "clear", "__setitem__"},
}
_passing_on: WeakKeyDictionary[FunctionType, bool] = WeakKeyDictionary()  # what `_may_pass_on` has found
_NO_STEPS = {"RESUME", "COPY_FREE_VARS", "CACHE", "PUSH_NULL", "PRECALL", "NOP", "EXTENDED_ARG"}


def has_forward_hooks(module: nn.Module) -> bool:
    """Return whether there are any forward hooks that a call of the module runs."""
    return bool(module._forward_hooks or torch_module._global_forward_hooks)


def output_hooks(module: nn.Module) -> list[int]:
    """Return the ids of the hooks of a module, from the first on, up to the last one that may change its output.

    A hook for all modules that may change outputs counts as a hook before them: id -1."""
    hooks = [*dict.fromkeys(torch_module._global_forward_hooks.values(), -1).items()]
    hooks += [(hook, number) for number, hook in module._forward_hooks.items()]
    while hooks and only_looks(hooks[-1][0]):
        hooks.pop()
    return [number for _, number in hooks]


def is_unsure(module: nn.Module, before: list[int]) -> bool:
    """Return whether a hook, other than those with the ids `before`, calls functions that might change the output in
    place."""
    hooks = [hook for number, hook in module._forward_hooks.items() if number not in before]
    if not before:
        hooks += torch_module._global_forward_hooks.values()
    return any(map(_may_pass_on, hooks))


def only_looks(hook: Callable) -> bool:
    """Return whether a hook always returns None, and does not itself change the output in place."""
    function, bound, given, _ = _function_of(hook)
    if function is None or not (_returns_nothing(function.__code__) or _adds_to_container(function)):
        return False
    changed = changed_in_place(function.__code__)
    if not changed:
        return True
    code = function.__code__
    arguments, count = code.co_varnames, code.co_argcount - len(function.__defaults__ or ())
    others = {*arguments[: min(bound + 1, count)], *arguments[count : code.co_argcount + code.co_kwonlyargcount]}
    return not any(_may_be_output(name, function) for name in changed - others - given)


def _may_pass_on(hook: Callable) -> bool:
    """Whether a hook may call a function that is written in Python, and is not known to change nothing in place."""
    function, _, _, owner = _function_of(hook)
    if function is None:
        return False
    if owner is not None:
        return any(map(_may_change, _called_by(function, owner)))
    if function not in _passing_on:
        _passing_on[function] = any(map(_may_change, _called_by(function)))
    return _passing_on[function]


def _may_change(function: FunctionType) -> bool:
    changed = changed_in_place(function.__code__)
    return any(_may_be_output(name, function) for name in changed) or next(_called_by(function), None) is not None


def _called_by(function: FunctionType, owner: Any = None) -> Iterator[FunctionType]:
    """Return the functions in Python that a function uses by name; of methods, only those of `owner`."""
    values = [function.__globals__.get(name) for name in function.__code__.co_names]
    values += [_value_of(name, function) for name in function.__code__.co_freevars]
    if owner is not None:
        values += [getattr(type(owner), name, None) for name in function.__code__.co_names]
    for value in values:
        while isinstance(value, functools.partial):
            value = value.func
        value = value.__func__ if isinstance(value, MethodType) else value
        if isinstance(value, FunctionType):
            yield value


def _function_of(hook: Callable) -> tuple[FunctionType | None, int, frozenset[str], Any]:
    """Return the function that a hook calls, None if it is not written in Python; how many arguments it is given before
    the module, and the names of those given by name; and the object whose method it is."""
    bound, given, owner = 0, frozenset(), None
    while not isinstance(hook, FunctionType):
        if isinstance(hook, functools.partial):
            bound, given, hook = bound + len(hook.args), given | hook.keywords.keys(), hook.func
        elif isinstance(hook, MethodType):
            bound, owner, hook = bound + 1, hook.__self__, hook.__func__
        elif isinstance(type(hook).__call__, FunctionType):
            bound, owner, hook = bound + 1, hook, type(hook).__call__
        else:
            return None, 0, given, None
    return hook, bound, given, owner


def _may_be_output(name: str, function: FunctionType) -> bool:
    """Whether a variable that a hook changes in place may be the output, or a function called to change it."""
    if name == UNKNOWN or name in function.__code__.co_varnames:
        return True
    value = _value_of(name, function)
    return isinstance(value, ModuleType) or (is_in_place(name) and callable(value))


def _value_of(name: str, function: FunctionType) -> Any:
    """Return the value of a variable from outside a function; None if it has none yet, or is the function's own."""
    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or ()))
    try:
        return cells[name].cell_contents if name in cells else function.__globals__.get(name)
    except ValueError:
        return None


@functools.cache
def _returns_nothing(code: CodeType) -> bool:
    """Whether every `return` of a function returns None."""
    if code.co_flags & (CO_GENERATOR | CO_COROUTINE | CO_ASYNC_GENERATOR):
        return False
    before = None
    for instruction in dis.get_instructions(code):
        if instruction.opname == "RETURN_CONST" and instruction.argval is not None:
            return False
        if instruction.opname == "RETURN_VALUE" and not (
            before.opname == "LOAD_CONST" and before.argval is None and not instruction.is_jump_target
        ):
            return False
        before = instruction
    return True


def _adds_to_container(hook: FunctionType) -> bool:
    """Whether a hook is a single call such as `seen.append(output)`, which returns None."""
    steps = [step for step in dis.get_instructions(hook) if step.opname not in _NO_STEPS]
    if len(steps) < 4 or steps[-1].opname != "RETURN_VALUE" or not steps[-2].opname.startswith("CALL"):
        return False
    if any(step.opname == "RETURN_VALUE" or "JUMP" in step.opname for step in steps[:-1]):
        return False
    name, method = steps[0].argval, steps[1].argval
    return method in _RETURN_NOTHING.get(type(_value_of(name, hook)), ())
