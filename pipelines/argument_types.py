"""Check, before anything runs, that arguments have the types that a function declares.

    check_types(attention_maps, words=["circle"], encoder="text_encoder")
    check_types(attention_maps, words=3)        # InputError: attention_maps: words must be Sequence[str] | str | …

Anything usable as a number counts as one, such as a NumPy float or an integer of any kind. A bool does not count as a
number, nor a string as a sequence of strings.
"""

import re
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any

from diffsight.errors import InputError
from diffsight.pipelines.numbers import as_integer, as_number


def check_types(function: Callable, **values: Any) -> None:
    """Raise InputError for the first value that does not have the type that `function` declares for it."""
    declared = _declared(function)
    for name, value in values.items():
        if name in declared and not fits(value, declared[name]):
            title = function.__qualname__.removesuffix(".__init__")
            raise InputError(f"{title}: {name} must be {_in_words(declared[name])}, not {value!r}")


def is_number(declared: Any) -> bool:
    """Return whether a declared type allows only numbers (and None): `int`, `float | None`."""
    is_union = typing.get_origin(declared) in (typing.Union, types.UnionType)
    kinds = {*(typing.get_args(declared) if is_union else [declared])} - {type(None)}
    return bool(kinds) and kinds <= {int, float}


def fits(value: Any, declared: Any) -> bool:
    """Return whether a value has a declared type. Types that are not checked, such as callables, fit all values."""
    if declared is Any:
        return True
    origin, inner = typing.get_origin(declared), typing.get_args(declared)
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, one) for one in inner)
    if origin is typing.Literal:
        return value in inner
    if declared in (None, type(None)):
        return value is None
    if declared in (int, float):
        return (as_integer if declared is int else as_number)(value) is not None
    if origin is tuple and inner[-1:] != (...,):
        return isinstance(value, (tuple, list)) and len(value) == len(inner) and all(map(fits, value, inner))
    if origin in (Sequence, Iterable, list, tuple):
        return _is_sequence_of(value, inner[0])
    if origin in (Mapping, dict):
        return isinstance(value, Mapping) and all(fits(k, inner[0]) and fits(v, inner[1]) for k, v in value.items())
    return not isinstance(declared, type) or isinstance(value, declared)


def _is_sequence_of(value: Any, declared: Any) -> bool:
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable) or getattr(value, "ndim", 1) == 0:
        return False
    return isinstance(value, Iterator) or all(fits(item, declared) for item in value)


@cache
def _declared(function: Callable) -> dict[str, Any]:
    return typing.get_type_hints(function)


def _in_words(declared: Any) -> str:
    text = declared.__name__ if isinstance(declared, type) and not typing.get_args(declared) else str(declared)
    return re.sub(r"\b[a-z_]+\.", "", text)
