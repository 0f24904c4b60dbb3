"""The forward hooks that others have put on a module, and which of them may change its output.

The model continues with the return value of the last of these hooks, so this is the module's output. Hooks that only
look at the output, such as the hooks with which transformers captures hidden states, see the run's edits. Whether a
hook only looks must be known before it is called, and is determined from its bytecode.
"""

import dis
import functools
from collections import deque
from collections.abc import Callable
from inspect import CO_ASYNC_GENERATOR, CO_COROUTINE, CO_GENERATOR
from types import CodeType, FunctionType, MethodType
from typing import Any

from torch import nn
from torch.nn.modules import module as torch_module

_RETURN_NOTHING = {  # methods of Python's containers that return None
    list: {"append", "extend", "insert", "clear", "__setitem__"},
    deque: {"append", "appendleft", "extend", "insert", "clear", "__setitem__"},
    set: {"add", "update", "clear"},
    dict: {"update", "clear", "__setitem__"},
}
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


def only_looks(hook: Callable) -> bool:
    """Return whether a hook is certain to return None, whatever it is called with."""
    if isinstance(hook, functools.partial):
        return only_looks(hook.func)
    if isinstance(hook, MethodType):
        return only_looks(hook.__func__)
    if isinstance(hook, FunctionType):
        return _returns_nothing(hook.__code__) or _adds_to_container(hook)
    call = type(hook).__call__
    return isinstance(call, FunctionType) and only_looks(call)


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
    cells = dict(zip(hook.__code__.co_freevars, hook.__closure__ or ()))
    try:
        container: Any = cells[name].cell_contents if name in cells else hook.__globals__[name]
    except (KeyError, ValueError):  # an argument, or a variable that has no value yet
        return False
    return method in _RETURN_NOTHING.get(type(container), ())
