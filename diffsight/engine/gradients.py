"""Enable gradients in methods that disable them, such as a pipeline's `__call__`."""

from collections.abc import Callable
from functools import partial
from typing import Any


def with_gradients(method: Callable[..., Any]) -> Callable[..., Any]:
    """Return a bound method without the `torch.no_grad()` that it is decorated with."""
    wrapped = getattr(method.__func__, "__wrapped__", None)
    return method if wrapped is None else partial(wrapped, method.__self__)
