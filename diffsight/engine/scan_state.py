"""The state of what modules hold at the start of a scan, so that it can be restored at the end.

    state = HeldState()
    state.note(modules, arguments)
    ...                                 # the modules run, and change what they hold
    state.restore()

Every object stays in place, since models compare objects by identity, and keep some of them elsewhere too, for example
in the functions of hooks. What is restored is the content of each container, object, tensor and array.
"""

import copyreg
import sys
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain
from operator import is_not
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any, ClassVar, Protocol

import torch
from torch import nn

from diffsight.engine.hooks import NAMES_OF_HOOKS
from diffsight.engine.opaque_values import NOT_LOOKED_INTO

_MOST = 300_000  # objects that are looked at
_LARGE = 2**18  # bytes of a tensor
_FUNCTIONS = (FunctionType, BuiltinFunctionType, MethodType, partial, type)
_TABLES_OF_HOOKS = {name for name in vars(nn.Module()) if "_hooks" in name}
_MAPPINGS, _CONTAINERS = (OrderedDict, dict), (OrderedDict, dict, list, set, deque)
# Objects of these libraries belong to runs, to other threads or to the whole program. Images read their files once.
_SHARED = {"diffsight", "threading", "concurrent", "asyncio", "multiprocessing", "logging", "PIL"}


class HeldState:
    """The state of modules, of some arguments, and of everything that they hold.

    Attributes:
        modules: The modules, including those that other objects hold as attributes.
        large: Large tensors of floating-point numbers that are not weights. They are not copied, so nothing may write
            to them.
    """

    _open: ClassVar[list["HeldState"]] = []  # those that are not restored yet, oldest first

    def __init__(self) -> None:
        self.modules: list[nn.Module] = []
        self.large: list[torch.Tensor] = []
        self._noted: dict[tuple[type, int], Noted] = {}  # by kind, and id of the object

    def note(self, modules: Iterable[nn.Module], arguments: Iterable[Any]) -> None:
        """Take note of the state of modules and of arguments, which is to be restored."""
        self._open.append(self)
        with torch._C.DisableTorchFunction():
            seen: set[int] = set()
            of_modules, of_arguments = self._note_objects(modules, seen), self._note_objects(arguments, seen)
            tables = chain.from_iterable((module._parameters, module._buffers) for module in self.modules)
            weights = {id(weight) for table in tables for weight in table.values()}
            others = [tensor for tensor in of_modules if id(tensor) not in weights and _has_values(tensor)]
            self.large = [tensor for tensor in others if _is_large(tensor)]
            small = [tensor for tensor in others if not _is_large(tensor)]
            for tensor in (*small, *filter(_has_values, of_arguments)):
                self._add(_Memory(tensor))

    def _note_objects(self, objects: Iterable[Any], seen: set[int]) -> list[torch.Tensor]:
        """Take note of objects and of what they hold. Return the tensors among them. `seen` holds the ids of all."""
        waiting, tensors = deque(objects), []
        while waiting and len(seen) < _MOST:
            value = waiting.popleft()
            if id(value) in seen or not _is_looked_into(type(value)):
                continue
            seen.add(id(value))
            if isinstance(value, torch.Tensor):
                tensors.append(value)
                continue
            if isinstance(value, nn.Module):
                self.modules.append(value)
            if isinstance(value, (tuple, frozenset)):
                waiting += value
            for noted in _noted(value):
                self._add(noted)
                waiting += noted.parts
        return tensors

    def _add(self, noted: "Noted") -> None:
        self._noted[type(noted), id(noted.of)] = noted

    def restore(self) -> None:
        """Put everything back. What a later state has noted too is left to that one. May be called again."""
        if self not in self._open:
            return
        later = self._open[self._open.index(self) + 1 :]
        with torch._C.DisableTorchFunction():
            for key, noted in self._noted.items():
                other = next((state for state in later if key in state._noted), None)
                if other is None:
                    noted.restore()
                else:
                    other._noted[key] = noted
        self._open.remove(self)


class Noted(Protocol):
    """The state of one object.

    Attributes:
        of: The object. It stays alive along with its state.
        parts: What it holds.
    """

    of: Any
    parts: Iterable[Any]

    def restore(self) -> None:
        """Put everything back, if it has changed. May be called again."""


class _Attributes:
    """The attributes of a module or another object. Functions are left out, since runs change them."""

    def __init__(self, of: Any) -> None:
        self.of = of
        self._attributes = self._read()
        self.parts = [value for name, value in self._attributes.items() if name not in _TABLES_OF_HOOKS]

    def _read(self) -> dict[str, Any]:
        held = _dict_of(self.of).copy().items()
        return {name: value for name, value in held if _is_kept(name) and not issubclass(type(value), _FUNCTIONS)}

    def restore(self) -> None:
        held = _dict_of(self.of)
        for name in self._read().keys() - self._attributes.keys():
            del held[name]
        held.update({name: value for name, value in self._attributes.items() if held.get(name, held) is not value})


class _Slots:
    """The attributes of an object in its `__slots__`."""

    def __init__(self, of: Any) -> None:
        self.of = of
        self._attributes = self._read()
        self.parts = self._attributes.values()

    def _read(self) -> dict[str, Any]:
        held = {}
        for name in copyreg._slotnames(type(self.of)):
            try:
                held[name] = object.__getattribute__(self.of, name)
            except AttributeError:  # nothing is in it
                continue
        return held

    def restore(self) -> None:
        now = self._read()
        for name in now.keys() - self._attributes.keys():
            object.__delattr__(self.of, name)
        for name, value in self._attributes.items():
            if now.get(name, now) is not value:
                object.__setattr__(self.of, name, value)


class _Content:
    """What a container holds. Classes may have methods of their own, so those of the built-in classes are called."""

    def __init__(self, of: Any) -> None:
        self.of = of
        self._kind = next(kind for kind in _CONTAINERS if isinstance(of, kind))
        self.parts = self._read()

    def _read(self) -> list[Any]:
        """Return the entries. The keys and values of a mapping take turns."""
        if self._kind in _MAPPINGS:
            return [*chain.from_iterable(self._kind.items(self.of))]
        return [*self._kind.__iter__(self.of)]

    def restore(self) -> None:
        now = self._read()
        if len(now) == len(self.parts) and not any(map(is_not, now, self.parts)):
            return
        if self._kind in _MAPPINGS:
            _refill(self.of, dict(zip(self.parts[::2], self.parts[1::2])), self._kind)
        elif self._kind is list:
            list.__setitem__(self.of, slice(None), self.parts)
        else:
            self._kind.clear(self.of)
            (set.update if self._kind is set else deque.extend)(self.of, self.parts)


class _Memory:
    """The numbers in the memory of a tensor. PyTorch does not count their return as a change of the tensor."""

    parts = ()

    def __init__(self, of: torch.Tensor) -> None:
        self.of, self._memory = of, of.untyped_storage()
        self._copied = self._memory.clone()

    def restore(self) -> None:
        if self._memory.nbytes() != self._copied.nbytes():
            self._memory.resize_(self._copied.nbytes())
        self._memory.copy_(self._copied)


class _Array:
    """The entries of a NumPy array."""

    def __init__(self, of: Any) -> None:
        self.of, self._copied = of, of.copy()
        self.parts = of.flat if of.dtype.hasobject else ()

    def restore(self) -> None:
        self.of[...] = self._copied


def _noted(value: Any) -> Iterator[Noted]:
    """Take note of an object: of its attributes, and of its content if it is a container."""
    if isinstance(value, nn.Module):
        yield ModuleHooks(value)
    if _dict_of(value) is not None:
        yield _Attributes(value)
    if isinstance(value, _CONTAINERS):
        yield _Content(value)
    if copyreg._slotnames(type(value)):
        yield _Slots(value)
    numpy = sys.modules.get("numpy")
    if numpy and type(value) is numpy.ndarray and value.flags.writeable:
        yield _Array(value)


def _dict_of(value: Any) -> dict[str, Any] | None:
    """Return the attributes of an object, without calling code of its class."""
    try:
        held = object.__getattribute__(value, "__dict__")
    except AttributeError:
        return None
    return held if type(held) is dict else None


def _is_looked_into(kind: type) -> bool:
    if issubclass(kind, nn.Module):
        return True
    return not issubclass(kind, NOT_LOOKED_INTO) and str(kind.__module__).split(".")[0] not in _SHARED


def _is_kept(name: str) -> bool:
    return not (isinstance(name, str) and name.startswith("_diffsight")) and name not in NAMES_OF_HOOKS


def _has_values(tensor: torch.Tensor) -> bool:
    """Whether a tensor has memory of its own that can be copied."""
    is_plain = type(tensor) in (torch.Tensor, nn.Parameter) and tensor.layout is torch.strided
    return is_plain and not (tensor.is_meta or tensor.is_nested)


def _is_large(tensor: torch.Tensor) -> bool:
    return tensor.dtype.is_floating_point and tensor.untyped_storage().nbytes() > _LARGE


def _refill(table: dict, content: dict, kind: type[dict]) -> None:
    """Restore the content of a mapping. No original entry is missing meanwhile, except when the order is restored."""
    for key in kind.keys(table) - content.keys():
        kind.__delitem__(table, key)
    if list(kind.keys(table)) != list(content):  # the order counts too: parameters are listed in it
        kind.clear(table)
    for key, value in content.items():
        kind.__setitem__(table, key, value)


class ModuleHooks:
    """The forward hooks on one module at the time this was made."""

    parts = ()

    def __init__(self, of: nn.Module) -> None:
        self.of = of
        self._tables = [(table, set(table)) for table in (of._forward_hooks, of._forward_pre_hooks)]

    def restore(self) -> None:
        """Remove the hooks that were added, except those of runs.

        Models of transformers, for example, register hooks on their layers in their first call, and remember that they
        did."""
        for table, known in self._tables:
            for key in [key for key in table if key not in known and not _belongs_to_a_run(table[key])]:
                del table[key]


def _belongs_to_a_run(hook: Callable) -> bool:
    return (getattr(hook, "__module__", None) or "").split(".")[0] == "diffsight"
