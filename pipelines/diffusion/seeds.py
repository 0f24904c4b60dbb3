"""Seeds: whole numbers, of the random stream that a model draws from."""

from typing import Any

from diffsight.errors import InputError


def check_seed(seed: Any) -> None:
    """Raises InputError for what is no seed."""
    if isinstance(seed, bool) or not hasattr(seed, "__index__") or not 0 <= seed < 2**64:
        raise InputError(f"a seed is a whole number from 0 on, below 2**64, not {seed!r}")
