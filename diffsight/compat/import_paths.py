"""nnsight's import paths, as in `from nnsight.util import WrapperModule`."""

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from torch import nn

_PLACES = (
    "util",
    "envoy",
    "logger",
    "tracing",
    "tracing.graph",
    "intervention",
    "intervention.envoy",
    "models",
    "models.LanguageModel",
    "models.DiffusionModel",
    "modeling",
    "modeling.language",
    "modeling.diffusion",
    "modeling.base",
    "modeling.transformers",
    "modeling.vlm",
    "intervention.interleaver",
    "intervention.tracer",
    "intervention.iterator",
)


class WrapperModule(nn.Module):
    """A module that returns its argument, or several arguments as a tuple."""

    def forward(self, *args: Any) -> Any:
        return args[0] if len(args) == 1 else args


class Proxy:
    """nnsight's type of values, for annotations. No value has this type, since values are real objects here."""


class Place(ModuleType):
    """A Python module with the names of `diffsight.compat`."""

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.modules[__package__], name)


def add_places() -> None:
    """Add Python modules to `diffsight.compat`, under their paths in nnsight."""
    for path in _PLACES:
        outer, _, name = f"{__package__}.{path}".rpartition(".")
        place = sys.modules[f"{outer}.{name}"] = Place(f"{outer}.{name}")
        setattr(sys.modules[outer], name, place)
    sys.modules[f"{__package__}.util"].apply = apply_to_each


def apply_to_each(data: Any, fn: Callable[[Any], Any], cls: type, n: int = 0) -> Any:
    """Return `data` with `fn` applied to each value of a type, in tuples, lists, dicts, sets and slices.

    Args:
        data: The values.
        fn: The function.
        cls: The type.
        n: How many levels deep to replace the attributes of other objects.
    """

    def inside(value: Any) -> Any:
        return apply_to_each(value, fn, cls, n)

    if isinstance(data, cls):
        return fn(data)
    if isinstance(data, tuple) and hasattr(data, "_fields"):
        return type(data)(*map(inside, data))
    if isinstance(data, (list, tuple, set, frozenset)):
        return type(data)(map(inside, data))
    if isinstance(data, dict):
        copied = data.copy()
        copied.update({key: inside(value) for key, value in data.items()})
        return copied
    if isinstance(data, slice):
        return slice(inside(data.start), inside(data.stop), inside(data.step))
    if n > 0 and hasattr(data, "__dict__"):
        for name, value in vars(data).items():
            setattr(data, name, apply_to_each(value, fn, cls, n - 1))
    return data
