"""Which values have the batch as their first dimension, in a model that runs with a batch of several inputs.

A first dimension of the same size may be something else, such as tokens, experts or frames. So the first time that a
row is asked for, the running component is called twice more, with batches that are larger by one and by two. The
dimensions that grow with them are the batch. These calls run on a copy of the component's structure, with tensors on
the meta device, or with the real weights if the model is small or needs values. The result is kept with the
modules.
"""

import copy
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from diffsight.engine.coroutine import Coroutine
from diffsight.engine.hooks import FORWARD, has_forward_of_its_own, running_call
from diffsight.engine.structural_copy import structural_copy, without_global_hooks
from diffsight.engine.target import Target
from diffsight.engine.torch_state import TorchState, call_in, kept_random_state

Shapes = list[tuple[int, ...] | None]  # of everything in a value; None for anything but a tensor
Sizes = list[bool | None]  # for everything in a value: whether its first dimension is the batch; None if another is
_SMALL = 10**7  # parameters: such a model runs faster with its weights than on the meta device


class Running(Protocol):
    """The run; see `diffsight.engine.run_to_point.Flow`."""

    coroutine: Coroutine | None


_known: WeakKeyDictionary[nn.Module, dict[tuple[str, int], Sizes]] = WeakKeyDictionary()
_varying: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()  # values with more parts for a larger batch
_tried: WeakKeyDictionary[nn.Module, set[int]] = WeakKeyDictionary()  # component to batch sizes tried in vain


def batch_dimensions(host: Running, target: Target, part: str, value: Any, total: int) -> Sizes | None:
    """Return which of the tensors in a value have the batch as their first dimension.

    Args:
        host: The run.
        target: The module or method that is called.
        part: "inputs", "input" or "output".
        value: The value.
        total: The size of the batch.

    Returns:
        For everything in the value, in order: True if its first dimension is the batch, None if another one is, False
        if none is. None instead of the list if this cannot be determined. If the number of things in the value depends
        on the batch, as in a list with a tensor per input, None stands for each of them."""
    if target.name != FORWARD:
        return None
    leaves = [value] if type(value) is torch.Tensor else tree_leaves(value)
    if target.outer is None and part != "output":  # the inputs of a component define the batch
        return [_length(leaf) == total for leaf in leaves]
    key = part, len(leaves)
    found = _known.get(target.owner, {}).get(key)
    if found is not None:
        return found
    component = target.around()[0] if target.outer else target
    if total not in _tried.setdefault(component.owner, set()) and _find(host, component.owner, total):
        _tried[component.owner].add(total)
    varies = part in _varying.get(target.owner, ())
    return _known.get(target.owner, {}).get(key, [None] * len(leaves) if varies else None)


def _length(leaf: Any) -> int | None:
    return leaf.shape[0] if isinstance(leaf, torch.Tensor) and leaf.ndim else None


def _find(host: Running, component: nn.Module, total: int) -> bool:
    """Call a copy of a component; note which dimensions grow with the batch. Return False if it is not running."""
    frame = sys._getframe() if host.coroutine.is_running else host.coroutine.frame
    call = running_call(frame, component)
    if call is None:
        return False
    if any(map(has_forward_of_its_own, component.modules())):
        return True
    state = TorchState.capture().bare()
    is_small = sum(parameter.numel() for parameter in component.parameters()) < _SMALL
    for with_weights in (True, False) if is_small else (False, True):
        try:
            with kept_random_state():
                larger = [
                    call_in(state, None, partial(_call, component, call, total, total + more, with_weights))
                    for more in (1, 2)
                ]
        except Exception:  # of any kind: then the dimensions cannot be determined
            continue
        for module, calls in larger[0].items():
            _note(module, calls, larger[1].get(module, {}), total)
        if any(map(_has_time_first, larger[0])):
            for module in larger[0]:
                _known[module] = {key: [None] * len(sizes) for key, sizes in _known.get(module, {}).items()}
        return True
    return True


def _has_time_first(module: nn.Module) -> bool:
    """Whether the supposed batch dimension is the time dimension of a recurrent layer or of attention."""
    if getattr(module, "batch_first", True):
        return False
    return any(sizes[:1] == [True] for (part, _), sizes in _known.get(module, {}).items() if part == "input")


def _note(module: nn.Module, calls: dict[str, list[Shapes]], larger: dict[str, list[Shapes]], total: int) -> None:
    for part, shapes in calls.items():
        others = larger.get(part, [])
        if {len(shape) for shape in shapes} != {len(shape) for shape in others}:
            _varying.setdefault(module, set()).add(part)
        found = [_compare(a, b, total) for a, b in zip(shapes, others) if len(a) == len(b)]
        alike = len(found) == len(shapes) == len(others) and all(sizes == found[0] for sizes in found)
        for count in {len(shape) for shape in shapes}:  # if not alike, it may be called for parts of the batch
            _known.setdefault(module, {})[part, count] = found[0] if alike else [None] * count


def _compare(one_more: Shapes, two_more: Shapes, total: int) -> Sizes:
    return [None if a is None or b is None else _is_batch(a, b, total) for a, b in zip(one_more, two_more)]


def _is_batch(one_more: Sequence[int], two_more: Sequence[int], total: int) -> bool | None:
    if one_more == two_more:
        return False
    firsts = one_more[:1], two_more[:1]
    return True if firsts == ((total + 1,), (total + 2,)) else None


def _call(
    component: nn.Module, call: tuple[tuple, dict], total: int, size: int, with_weights: bool
) -> dict[nn.Module, dict[str, list[Shapes]]]:
    """Call a copy of a component with a batch of `size`; return the shapes of the values that passed its modules."""
    copied = structural_copy(component, with_weights)
    seen: dict[nn.Module, dict[str, list[Shapes]]] = {}
    for module, original in zip(copied.modules(), component.modules(), strict=True):
        module.register_forward_hook(partial(_see, seen.setdefault(original, {})), with_kwargs=True)
    with _Larger(total, size, with_weights):
        args, kwargs = copy.deepcopy(call)
    with without_global_hooks():
        copied(*args, **kwargs)
    return seen


def _see(calls: dict[str, list[Shapes]], _: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
    values = {"inputs": (args, kwargs), "input": next(iter((*args, *kwargs.values())), None), "output": output}
    for part, value in values.items():
        shapes = [tuple(leaf.shape) if isinstance(leaf, torch.Tensor) else None for leaf in tree_leaves(value)]
        calls.setdefault(part, []).append(shapes)


class _Larger(TorchFunctionMode):
    """Copies tensors with a batch of `size` in place of `total`, on the meta device unless `with_values`."""

    def __init__(self, total: int, size: int, with_values: bool) -> None:
        super().__init__()
        self._total, self._size, self._has_values = total, size, with_values

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if function is not torch.Tensor.__deepcopy__:
            return function(*args, **(kwargs or {}))
        tensor = args[0].detach()
        if tensor.shape[:1] == (self._total,):
            tensor = torch.cat([tensor, tensor[-1:].expand(self._size - self._total, *tensor.shape[1:])])
        return tensor.clone() if self._has_values else torch.empty_like(tensor, device="meta")
