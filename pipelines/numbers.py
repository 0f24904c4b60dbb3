"""The numbers that users pass: those of Python and NumPy, and tensors without dimensions.

as_integer(np.int64(3))         # 3
as_integer(True)                # None, as for anything that is not an integer
as_number(torch.tensor(0.5))    # 0.5
unpacked(torch.arange(2))       # [0, 1]
"""

from operator import index
from typing import Any

import numpy as np
import torch


def as_integer(value: Any) -> int | None:
    """Return an integer of any kind as an `int`, and None for anything else, such as a bool."""
    if _is_bool(value) or getattr(value, "ndim", 0):
        return None
    try:
        return index(value)
    except (TypeError, RuntimeError):  # a tensor without a value, on the meta device
        return None


def as_number(value: Any) -> float | None:
    """Return a real number of any kind as an `int` or a `float`, and None for anything else, such as a bool."""
    whole = as_integer(value)
    if whole is not None or _is_bool(value) or getattr(value, "ndim", 0) or not hasattr(value, "__float__"):
        return whole
    try:
        return None if isinstance(value, (np.complexfloating, np.character)) else float(value)
    except (TypeError, ValueError, RuntimeError):  # a complex tensor, or an array of text
        return None


def as_slice(value: slice) -> slice | None:
    """Return a slice between integers of any kind, and None if its bounds are not integers or its step is 0."""
    parts = [value.start, value.stop, value.step]
    numbers = [as_integer(part) for part in parts]
    is_whole = all(part is None or number is not None for part, number in zip(parts, numbers))
    return slice(*numbers) if is_whole and numbers[2] != 0 else None


def unpacked(value: Any) -> Any:
    """Return an array or tensor as a list of numbers, or as one number. Anything else stays as it is."""
    return value.tolist() if isinstance(value, (np.ndarray, np.generic, torch.Tensor)) else value


def _is_bool(value: Any) -> bool:
    return isinstance(value, (bool, np.bool_)) or str(getattr(value, "dtype", "")) in ("bool", "torch.bool")
