"""Copy the structure of a model: modules of the same classes, without the weights and without anyone's hooks.

    empty = structural_copy(model)                      # its weights are on the meta device
    same = structural_copy(model, with_weights=True)    # its weights are those of the model
    own = structural_copy(model, with_weights=True, owns_weights=True)  # its weights are copies of them

Running the copy leaves the model unchanged (unless it trains weights that it shares), even if the model has a layer in
two places, sharded or quantized weights, or hooks and replaced forward methods of the user.
"""

import copy
import copyreg
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Condition, Lock, RLock, get_ident
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from diffsight.engine.wrapped_modules import unwrapped, wrapped_path

_LOCKS = {type(make()): make for make in (Lock, RLock)}  # a copy of a lock is open
# Attributes that libraries put on a module to be called, and those that a run puts there for copies.
_CALLED = ("forward", "_old_forward", "_compiled_call_impl", "_hf_hook", "__reduce_ex__", "__deepcopy__")


def structural_copy(model: nn.Module, with_weights: bool = False, owns_weights: bool = False) -> nn.Module:
    """Return a copy of a model's structure.

    Args:
        model: The model.
        with_weights: Whether the copy shares the parameters of the model and has copies of its buffers. Otherwise both
            are on the meta device.
        owns_weights: Whether a copy with weights has copies of the parameters as well, so that it may train them. It
            still shares those of special types, such as sharded or quantized ones.
    """
    memo: dict[Any, Any] = {}  # as for `copy.deepcopy`: id of an original to its copy
    modules = list(model.modules())
    for module in modules:
        memo[id(module)] = object.__new__(_plain_class(module))
        for tensor in (*module._parameters.values(), *module._buffers.values(), *_tensors_in(vars(module))):
            if id(tensor) not in memo:
                memo[id(tensor)] = _copied(tensor, with_weights, owns_weights)
    for module in modules:
        _fill(memo[id(module)], module, memo)
        if owns_weights and isinstance(module, nn.RNNBase):
            memo[id(module)].flatten_parameters()  # or else cuDNN warns that they are not next to each other
    return memo[id(model)]


class _CopiedCondition(Condition):
    """A copy of what the threads of a queue, an event or a semaphore wait for. Other threads do not know the copy, so
    nobody would end a wait without a timeout."""

    def wait(self, timeout: float | None = None) -> bool:
        if timeout is None:
            raise RuntimeError("a copy of the model would wait for another thread, which does not know the copy")
        return super().wait(timeout)


@contextmanager
def without_global_hooks() -> Iterator[None]:
    """Within the block, keep this thread's calls of modules from the hooks that are registered for all modules."""
    thread, silenced = get_ident(), []

    def silent(hook: Callable) -> Callable:
        return lambda *args, **kwargs: None if get_ident() == thread else hook(*args, **kwargs)

    try:
        for hooks in (_global_forward_pre_hooks, _global_forward_hooks):
            for key, hook in list(hooks.items()):
                silenced.append((hooks, key, hook))
                hooks[key] = silent(hook)
        yield
    finally:
        for hooks, key, hook in silenced:
            if key in hooks:
                hooks[key] = hook


class ComputedTensorsCopied(TorchFunctionMode):
    """Within the block, `copy.deepcopy` also copies tensors computed with gradients, without their history."""

    def __torch_function__(self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if function is torch.Tensor.__deepcopy__:
            return args[0].detach().requires_grad_(args[0].requires_grad).clone()  # no leaf: may be changed in place
        return function(*args, **(kwargs or {}))


def _fill(copied: nn.Module, module: nn.Module, memo: dict[Any, Any]) -> None:
    """Fill a copied module with copies of what the original holds."""
    held = {}
    for name, value in vars(module).items():
        if name in ("_parameters", "_buffers", "_modules"):
            held[name] = {key: memo.get(id(one)) for key, one in value.items()}
        elif name.endswith("_hooks") or "_hooks_" in name:
            held[name] = OrderedDict() if isinstance(value, dict) else copy.copy(value)
        elif name not in _CALLED:
            held[name] = deep_copied(value, memo)
    vars(copied).update(held)
    if type(copied) is not type(module):
        vars(copied)["forward"] = memo[id(unwrapped(module))].__call__
        vars(copied)["_compiled_call_impl"] = None


def _plain_class(module: nn.Module) -> type:
    """Return the class of a copy. A copied wrapper, as for compiling or distributing, only passes calls on."""
    return nn.Module if wrapped_path(module) else type(module)


def _copied(tensor: torch.Tensor | None, with_weights: bool, owns_weights: bool) -> torch.Tensor | None:
    if tensor is None:
        return None
    if with_weights and isinstance(tensor, nn.Parameter):
        return _copied_parameter(tensor) if owns_weights and type(tensor) is nn.Parameter else tensor
    if with_weights:
        return tensor.detach().clone()
    empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    return nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty


def _copied_parameter(parameter: nn.Parameter) -> nn.Parameter:
    with torch.inference_mode(False):  # a copy made in inference mode could not be trained
        copied = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
    vars(copied).update(vars(parameter))
    return copied


def _tensors_in(held: dict[str, Any]) -> list[torch.Tensor]:
    """Return the tensors that a module holds as plain attributes, except single numbers."""
    found = (leaf for name, value in held.items() if name[0] != "_" for leaf in tree_leaves(value))
    return [leaf for leaf in found if isinstance(leaf, torch.Tensor) and leaf.ndim]


def deep_copied(value: Any, memo: dict[Any, Any]) -> Any:
    """Return a deep copy. What cannot be copied, such as a process group, is shared instead, even inside containers and
    objects.

    So is what does something when it is freed: a copy would do it too."""
    if hasattr(type(value), "__del__"):
        return value
    if type(value) in _LOCKS:  # unknown to `copy.deepcopy`, which leaves a Condition methods of the original lock
        return memo.setdefault(("lock", id(value)), _LOCKS[type(value)]())
    if type(value) is Condition:
        return memo.setdefault(id(value), _CopiedCondition(deep_copied(vars(value)["_lock"], memo)))
    count = len(memo)
    try:
        return copy.deepcopy(value, memo)
    except Exception:
        for number in [*memo][count:]:  # copies that are not finished
            del memo[number]
    if isinstance(value, tuple):
        items = [deep_copied(one, memo) for one in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    try:
        copied = value if isinstance(value, (type, ModuleType)) else copy.copy(value)
    except Exception:
        return value
    if isinstance(value, (dict, list, deque)):
        memo[id(value)] = copied
        for place in [*value] if isinstance(value, dict) else range(len(value)):
            copied[place] = deep_copied(value[place], memo)
    elif copied is not value:
        memo[id(value)] = copied
        for name, one in _attributes_of(copied):
            object.__setattr__(copied, name, deep_copied(one, memo))
    return copied


def _attributes_of(value: Any) -> list[tuple[str, Any]]:
    """Return the names and values of an object's attributes, including those in slots."""
    slots = copyreg._slotnames(type(value))
    in_slots = [(name, getattr(value, name)) for name in slots if hasattr(value, name)]
    return [*getattr(value, "__dict__", {}).items(), *in_slots]
