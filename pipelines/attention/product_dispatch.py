"""Recognize the functions that make attention products, and handle their calls in watched modules."""

from collections.abc import Callable, Sequence
from typing import Any

from torch.overrides import TorchFunctionMode

from diffsight.pipelines.attention.eager_attention import EagerAttention
from diffsight.pipelines.attention.matrix_factors import MATRIX_PRODUCTS
from diffsight.pipelines.attention.sdpa_attention import (
    MULTI_HEAD_ATTENTION,
    SCALED_DOT_PRODUCT,
    FusedCall,
    without_dispatch,
)

WATCHED = {SCALED_DOT_PRODUCT, "softmax", MULTI_HEAD_ATTENTION, *MATRIX_PRODUCTS}


def call_watched(
    mode: TorchFunctionMode, running: Sequence[Any], written: EagerAttention, func: Callable, args: tuple, kwargs: dict
) -> Any:
    """Call a function inside the modules that are `running`, so that they see the products that it makes.

    Args:
        mode: The function mode that has seen the call.
        running: The watched modules, see `watched_modules.Watched`.
        written: The written-out attention that has been seen so far.
        func: The function.
        args: The arguments of the function.
        kwargs: The keyword arguments of the function.
    """
    name = getattr(func, "__name__", "")
    if name == SCALED_DOT_PRODUCT:
        return FusedCall.of(running, args, kwargs).run(func)
    if name == MULTI_HEAD_ATTENTION:
        with mode:
            return without_dispatch(func)(*args, **kwargs)
    return written.run(running, name, func, args, kwargs)
