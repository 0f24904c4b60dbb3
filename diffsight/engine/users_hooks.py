"""The forward hooks that others have put on a module, and which of them may change its output.

The model continues with the return value of the last of these hooks, so this is the module's output. Hooks that only
look at the output, such as the hooks with which transformers captures hidden states, see the run's edits. Whether a
hook only looks must be known before it is called, and is determined from its bytecode: it returns nothing and changes
nothing of the output in place. What it passes the output to, or keeps of it, may still change it; so where a run reads
or assigns the output, `Tap` looks whether it was changed after all.
"""

import functools
from collections.abc import Callable
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks
from torch.utils._pytree import tree_flatten

from diffsight.engine.changes_in_place import UNKNOWN, changed_in_place, is_in_place
from diffsight.engine.function_code import codes_of, functions_used, value_of
from diffsight.engine.returned_values import returns_nothing

_OF_LAYOUTS = {"transpose", "transpose_", "permute", "movedim", "moveaxis", "swapaxes", "swapdims", "t", "T", "mT", "H"}
_OF_LAYOUTS |= {"reshape", "view", "flatten", "unflatten", "unbind", "stack", "einsum", "rearrange", "as_strided"}
_DECORATED = torch.no_grad()(id).__code__  # of every function that a context manager of PyTorch decorates
_PACKAGE = __name__.partition(".")[0]
_LEVELS = 2  # of objects in an output that are looked into


class Contents:
    """What an output holds, some levels deep, and in which version each tensor is."""

    def __init__(self, output: Any) -> None:
        self._output = output
        self._before = _contents(output)

    def is_current(self) -> bool:
        """Whether the output still holds the same things, unchanged. Attributes may have been added to it."""
        now = _contents(self._output)
        return all(path in now and _is_same(now[path], before) for path, before in self._before.items())


def _contents(value: Any, path: tuple = ()) -> dict[tuple, tuple[Any, Any]]:
    """Return everything in a value, by its path, and what tells whether it was changed."""
    leaves, structure = tree_flatten(value)
    found: dict[tuple, tuple[Any, Any]] = {path: (None, structure)}
    for number, leaf in enumerate(leaves):
        inner, version = (*path, number), None
        if isinstance(leaf, torch.Tensor):
            version = leaf.clone() if leaf.is_inference() else leaf._version  # those have no version
        elif len(path) < 2 * _LEVELS and not isinstance(leaf, (type, nn.Module)):
            for name, one in getattr(leaf, "__dict__", {}).items():
                if not isinstance(one, (int, float, str)):  # an object may count how often it is looked at
                    found |= _contents(one, (*inner, name))
        found[inner] = leaf, version
    return found


def _is_same(now: tuple[Any, Any], before: tuple[Any, Any]) -> bool:
    if now[0] is not before[0]:
        return False
    if isinstance(before[1], torch.Tensor):
        return torch.equal(now[1].nan_to_num(), before[1].nan_to_num())
    return now[1] == before[1]


def has_forward_hooks(module: nn.Module) -> bool:
    """Return whether there are any forward hooks that a call of the module runs."""
    return bool(module._forward_hooks or _global_forward_hooks)


def output_hooks(module: nn.Module) -> list[int]:
    """Return the ids of the hooks of a module, from the first on, up to the last one that may change its output.

    A hook for all modules that may change outputs counts as a hook before them: id -1."""
    hooks = [*dict.fromkeys(_global_forward_hooks.values(), -1).items()]
    hooks += [(hook, number) for number, hook in module._forward_hooks.items()]
    while hooks and only_looks(hooks[-1][0]):
        hooks.pop()
    return [number for _, number in hooks]


def may_exchange_dimensions(module: nn.Module) -> bool:
    """Return whether hooks of others may replace the inputs or the output of a module by a value with another layout:
    whether they use a function that changes layouts."""
    hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
    hooks += [*_global_forward_pre_hooks.values(), *_global_forward_hooks.values()]
    others = (hook for hook in hooks if not (getattr(hook, "__module__", None) or "").startswith(f"{_PACKAGE}."))
    return any(map(_uses_layouts, others))


def _uses_layouts(hook: Callable) -> bool:
    function, *_ = _function_of(hook)
    if function is None:
        return True
    codes = [code for used in functions_used(function) for code in codes_of(used)]
    return not returns_nothing(function) and any(not _OF_LAYOUTS.isdisjoint(code.co_names) for code in codes)


def only_looks(hook: Callable) -> bool:
    """Return whether a hook always returns None, and does not itself change the output in place."""
    function, bound, given = _function_of(hook)
    if function is None or not returns_nothing(function, bound + 3):
        return False
    changed = changed_in_place(function.__code__)
    if not changed:
        return True
    code = function.__code__
    arguments, count = code.co_varnames, code.co_argcount - len(function.__defaults__ or ())
    others = {*arguments[: min(bound + 1, count)], *arguments[count : code.co_argcount + code.co_kwonlyargcount]}
    return not any(_may_be_output(name, function) for name in changed - others - given)


def _function_of(hook: Callable) -> tuple[FunctionType | None, int, frozenset[str]]:
    """Return the function that a hook calls, None if it is not written in Python; how many arguments it is given before
    the module; and the names of those given by name."""
    bound, given = 0, frozenset()
    while not isinstance(hook, FunctionType) or hook.__code__ is _DECORATED:
        if isinstance(hook, FunctionType):
            hook = hook.__wrapped__  # of `@torch.no_grad()`
        elif isinstance(hook, functools.partial):
            bound, given, hook = bound + len(hook.args), given | hook.keywords.keys(), hook.func
        elif isinstance(hook, MethodType):
            bound, hook = bound + 1, hook.__func__
        elif isinstance(type(hook).__call__, FunctionType):
            bound, hook = bound + 1, type(hook).__call__
        else:
            return None, 0, given
    return hook, bound, given


def _may_be_output(name: str, function: FunctionType) -> bool:
    """Whether a variable that a hook changes in place may be the output, or a function called to change it."""
    if name == UNKNOWN or name in function.__code__.co_varnames:
        return True
    value = value_of(name, function)
    return isinstance(value, ModuleType) or (is_in_place(name) and callable(value))
