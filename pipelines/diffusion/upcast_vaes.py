"""VAEs that a pipeline converts to float32 while it decodes or encodes, because they overflow in float16.

diffusers does so if `vae.config.force_upcast` is set, as it is for Stable Diffusion XL, and converts them back
afterwards.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from diffsight.pipelines.diffusion.components import components


def upcast_parts(pipeline: Any) -> dict[str, nn.Module]:
    """Return the components that a pipeline may convert to float32, by name."""
    parts = components(pipeline).items()
    return {name: part for name, part in parts if getattr(getattr(part, "config", None), "force_upcast", False)}


class Conversions:
    """The modules that a call has converted and not converted back."""

    def __init__(self) -> None:
        self._before: dict[nn.Module, torch.dtype] = {}

    def __contains__(self, module: nn.Module) -> bool:
        return module in self._before

    def convert(self, module: nn.Module, to: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        """Convert a module: return `to(*args, **kwargs)`."""
        before = self._before.setdefault(module, module.dtype)
        converted = to(*args, **kwargs)
        if module.dtype == before:
            del self._before[module]
        return converted

    def undo(self) -> None:
        """Convert all modules back."""
        while self._before:
            module, dtype = self._before.popitem()
            module.to(dtype)
