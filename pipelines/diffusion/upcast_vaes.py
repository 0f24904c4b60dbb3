"""VAEs that a pipeline converts to float32 while it decodes or encodes, because they overflow in float16.

diffusers does so if `vae.config.force_upcast` is set, as it is for Stable Diffusion XL, and converts them back
afterwards. If several calls are in progress, a VAE stays in float32 until the last of them converts it back, and each
call sees the type that it has itself converted the VAE to.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from diffsight.pipelines.diffusion.components import components


def upcast_parts(pipeline: Any) -> dict[str, nn.Module]:
    """Return the components that a pipeline may convert to float32, by name."""
    parts = components(pipeline).items()
    return {name: part for name, part in parts if getattr(getattr(part, "config", None), "force_upcast", False)}


@dataclass
class _Conversion:
    before: torch.dtype
    calls: set[Hashable]  # those that have converted the module, and not converted it back


class Conversions:
    """The modules that calls have converted and not converted back."""

    def __init__(self) -> None:
        self._of: dict[nn.Module, _Conversion] = {}

    def __contains__(self, module: nn.Module) -> bool:
        return module in self._of

    def dtype_before(self, module: nn.Module) -> torch.dtype:
        """Return the type that a module in this collection had before it was converted."""
        return self._of[module].before

    def is_converted_by(self, module: nn.Module, call: Hashable) -> bool:
        """Return whether a module was converted by a call, and not only by others."""
        return module in self._of and call in self._of[module].calls

    def convert(self, module: nn.Module, to: Callable[..., Any], args: tuple, kwargs: dict, call: Hashable) -> Any:
        """Convert a module for a call: return `to(*args, **kwargs)`."""
        now, found = _dtype(module), self._of.get(module)
        asked = next((value for value in (*args, *kwargs.values()) if isinstance(value, torch.dtype)), now)
        if found is None:
            if asked != now:
                self._of[module] = _Conversion(now, {call})
            return to(*args, **kwargs)
        if asked == found.before:
            return module if self._is_held_after(module, call) else to(*args, **kwargs)
        found.calls.add(call)
        return to(*args, **kwargs)

    def end(self, call: Hashable, is_early: bool) -> None:
        """Forget a call that has ended. If it has ended early, convert back what only this call has converted."""
        for module in [module for module, found in [*self._of.items()] if call in found.calls]:
            before = self._of[module].before
            if not self._is_held_after(module, call) and is_early:
                module.to(before)

    def _is_held_after(self, module: nn.Module, call: Hashable) -> bool:
        """Forget that a call has converted a module, and return whether others have."""
        calls = self._of[module].calls
        calls.discard(call)
        if not calls:
            del self._of[module]
        return bool(calls)


def _dtype(module: nn.Module) -> torch.dtype:
    return next(module.parameters()).dtype
