"""Count the products that an attention module makes in a call, by trying the call on a copy of the module."""

import copy
from types import FrameType, SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from diffsight.extending import structural_copy, without_global_hooks
from diffsight.pipelines.attention.eager_attention import EagerAttention
from diffsight.pipelines.attention.product_dispatch import call_watched


def count_products(module: nn.Module, frame: FrameType | None) -> int | None:
    """Return how many products a module makes in its current call, or None if the call cannot be tried.

    Args:
        module: The module.
        frame: The innermost frame of the model.
    """
    while frame is not None:
        if frame.f_code is nn.Module._call_impl.__code__ and frame.f_locals["self"] is module:
            break
        frame = frame.f_back
    else:
        return None
    copied, counting = structural_copy(module, with_weights=True), _Counting(module)
    try:
        args, kwargs = tree_map(_copied, (frame.f_locals["args"], frame.f_locals["kwargs"]))
        with torch.no_grad(), torch.random.fork_rng(), without_global_hooks(), counting:
            copied(*args, **kwargs)
    except Exception:  # an argument may be used up, such as a cache that already contains the keys of this call
        return None
    return counting.count


def _copied(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, torch.Tensor) else copy.deepcopy(value)


class _Counting(TorchFunctionMode):
    """Counts the products of a module. It stands in for the watched modules of a run, see `watched_modules.Watched`."""

    def __init__(self, owner: nn.Module) -> None:
        super().__init__()
        self.calls = SimpleNamespace(target=SimpleNamespace(owner=owner, path=""))
        self.count = 0
        self._eager = EagerAttention()

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return call_watched(self, [self], self._eager, func, args, kwargs or {})

    def has_taps(self, value: str) -> bool:
        return False

    def wants(self, *values: str) -> bool:
        return False

    def through(self, value: str, current: Any) -> Any:
        return current

    def end_product(self) -> None:
        self.count += 1

    pass_by = end_product
