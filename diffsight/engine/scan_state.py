"""The state of modules at the start of a scan, so that it can be restored at the end.

states = ModuleStates(modules)
states.note()
states.use_copies()         # the modules run, and change copies of what they hold as attributes
states.restore()
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from diffsight.engine.hooks import NAMES_OF_HOOKS
from diffsight.engine.opaque_values import NOT_LOOKED_INTO
from diffsight.engine.structural_copy import TensorsCopiedBy, copied_tensor, deep_copied, is_copied

_TABLES = ("_parameters", "_buffers", "_modules")
_FUNCTIONS = (FunctionType, BuiltinFunctionType, MethodType, partial, type)


class ModuleStates:
    """The states of all modules of a scan."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._modules = modules
        self._states: list[ModuleState] = []

    def note(self) -> None:
        """Take note of the state that is to be restored."""
        self._states = [ModuleState(module) for module in self._modules]

    def use_copies(self) -> None:
        """Until `restore`, let the modules hold copies of what they hold as attributes, except weights and modules."""
        tables = chain.from_iterable((module._parameters, module._buffers) for module in self._modules)
        kept = chain(self._modules, *map(dict.values, tables))
        memo = {id(one): one for one in kept if one is not None}  # as for `copy.deepcopy`
        with TensorsCopiedBy(copied_tensor):
            for state in self._states:
                state.use_copies(memo)

    def restore(self) -> None:
        """Put everything back. May be called again."""
        while self._states:  # each is dropped once it is restored, so an interrupted one is restored again
            self._states[-1].restore()
            del self._states[-1]


class ModuleState:
    """The weights, attributes and hooks of one module at the time this was made.

    Attributes count because models keep things for later calls, such as tables of positions. Functions are left out,
    since runs change them.
    """

    _open: WeakKeyDictionary[nn.Module, list["ModuleState"]] = WeakKeyDictionary()  # those in use, oldest first

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._hooks = ModuleHooks(module)
        self._attributes = self._read()
        self._contents = {name: self._attributes[name].copy() for name in _TABLES}

    def _read(self) -> dict[str, Any]:
        held = vars(self._module).items()
        return {name: value for name, value in held if _is_kept(name) and not isinstance(value, _FUNCTIONS)}

    def use_copies(self, memo: dict[int, Any]) -> None:
        """Let the module hold copies of its attributes. `memo` is as for `copy.deepcopy`."""
        self._open.setdefault(self._module, []).append(self)
        held = vars(self._module)
        for name, value in self._attributes.items():
            if name not in _TABLES and is_copied(name) and not isinstance(value, NOT_LOOKED_INTO):
                held[name] = deep_copied(value, memo)

    def restore(self) -> None:
        """Put everything back, and remove what was added. While a later state of the module is in use, leave that to
        it. May be called again."""
        states = self._open.get(self._module, [])
        if self not in states:
            return
        if self is states[-1]:
            self._put_back()
        else:
            later = states[states.index(self) + 1]
            later._hooks, later._attributes, later._contents = self._hooks, self._attributes, self._contents
        states.remove(self)
        if not states:
            self._open.pop(self._module, None)

    def _put_back(self) -> None:
        self._hooks.restore()
        held = vars(self._module)
        for name in self._read().keys() - self._attributes.keys():
            del held[name]
        held.update({name: value for name, value in self._attributes.items() if held.get(name) is not value})
        for name, content in self._contents.items():
            _refill(held[name], content)


def _is_kept(name: str) -> bool:
    return not name.startswith("_diffsight") and name not in NAMES_OF_HOOKS


def _refill(table: dict, content: dict) -> None:
    """Restore the content of a table. No original entry is missing meanwhile, except when the order is restored."""
    table.update(content)
    for name in table.keys() - content.keys():
        del table[name]
    if list(table) != list(content):  # the order counts too: parameters are listed in it
        table.clear()
        table.update(content)


class ModuleHooks:
    """The forward hooks on one module at the time this was made."""

    def __init__(self, module: nn.Module) -> None:
        self._tables = [(table, set(table)) for table in (module._forward_hooks, module._forward_pre_hooks)]

    def restore(self) -> None:
        """Remove the hooks that were added, except those of runs.

        Models of transformers, for example, register hooks on their layers in their first call, and remember that they
        did."""
        for table, known in self._tables:
            for key in [key for key in table if key not in known and not _belongs_to_a_run(table[key])]:
                del table[key]


def _belongs_to_a_run(hook: Callable) -> bool:
    return (getattr(hook, "__module__", None) or "").split(".")[0] == "diffsight"
