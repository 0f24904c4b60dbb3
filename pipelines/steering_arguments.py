"""The arguments of steering, for `run.steer` and for the lens `steer`, checked before anything runs.

check_factor(np.float32(2))     # 2.0
check_positions(range(2))       # [0, 1]
check_finite(vector)
"""

import math
from collections.abc import Iterable
from typing import Any

import torch

from diffsight.errors import InputError
from diffsight.pipelines.numbers import as_integer, as_number, unpacked


def check_factor(factor: Any) -> float:
    """Return a factor as a number. Raise InputError if it is not a finite number."""
    number = as_number(factor)
    if number is None or not math.isfinite(number):
        raise InputError(f"factor is a finite number, not {factor!r}")
    return number


def check_positions(positions: Any, others: str = "") -> list[int]:
    """Return the positions that the user passed as a list. `others` says what else may be passed.

    Raises:
        InputError: They are not integers, or there are none.
    """
    places = unpacked(positions)
    places = list(places) if isinstance(places, Iterable) and not isinstance(places, str) else [places]
    found = list(map(as_integer, places))
    if None in found:
        is_mask = any(isinstance(place, bool) for place in places)
        hint = ": for a mask, mask.nonzero() returns its positions" if is_mask else ""
        raise InputError(f"positions are integers{others}, not {positions!r}{hint}")
    if not found:
        raise InputError("no positions are chosen: pass some, or omit positions")
    return found


def check_finite(tensor: torch.Tensor, name: str = "the vector") -> None:
    """Raise InputError if a tensor contains nan or infinity."""
    if not tensor.isfinite().all():
        raise InputError(f"{name} has components that are not finite")


def described(vector: Any) -> str:
    """Return the type of a vector, and its shape if it is a tensor, for an error message."""
    return f"{vector.dtype} {tuple(vector.shape)}" if isinstance(vector, torch.Tensor) else type(vector).__name__
