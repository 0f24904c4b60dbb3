"""The modules that code imports from in nnsight, such as `from nnsight.util import WrapperModule`."""

import sys
from types import ModuleType
from typing import Any

from torch import nn
from torch.utils._pytree import tree_map_only

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
)


class WrapperModule(nn.Module):
    """A module that returns its argument, or several arguments as a tuple."""

    def forward(self, *args: Any) -> Any:
        return args[0] if len(args) == 1 else args


class Proxy:
    """The type of a value in annotations. No value has it, since values are real objects here."""


class Place(ModuleType):
    """A module that has the names of `diffsight.compat`."""

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.modules[__package__], name)


def add_places() -> None:
    """Add the modules to `diffsight.compat`, under the paths that they have in nnsight."""
    for path in _PLACES:
        outer, _, name = f"{__package__}.{path}".rpartition(".")
        place = sys.modules[f"{outer}.{name}"] = Place(f"{outer}.{name}")
        setattr(sys.modules[outer], name, place)
    sys.modules[f"{__package__}.util"].apply = lambda data, function, cls: tree_map_only(cls, function, data)
