"""Patching by hand, with ordinary hooks: the oracle of the lenses on patching.

parts = Parts("transformer.h", "attn", "mlp", "attn.c_proj", heads=4)
patched_values(net, parts, "mlps", clean, corrupted, metric)        # (layers, tokens)
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from helpers import first, module_at, with_first
from models import diffusion


@dataclass(frozen=True)
class Parts:
    """Where the parts of a network are: the list of layers, and paths in a layer."""

    layers: str
    attention: str = ""
    mlp: str = ""
    projection: str = ""
    heads: int = 0

    def modules(self, net: nn.Module, sites: str) -> list[nn.Module]:
        path = {"layers": "", "attentions": self.attention, "mlps": self.mlp, "heads": self.projection}[sites]
        return [layer.get_submodule(path) for layer in net.get_submodule(self.layers)]


@torch.no_grad()
def run(net: nn.Module, inputs: dict[str, Any], module: nn.Module, change: Any, of_input: bool) -> torch.Tensor:
    """Return the logits of a run in which `change(tensor)` takes the place of a module's output or first input."""

    def hook(_: nn.Module, args: tuple, output: Any) -> Any:
        changed = change(first(output))
        return None if changed is None else with_first(output, changed)

    def pre_hook(_: nn.Module, args: tuple) -> Any:
        changed = change(args[0])
        return None if changed is None else (changed, *args[1:])

    handle = module.register_forward_pre_hook(pre_hook) if of_input else module.register_forward_hook(hook)
    try:
        return net(**inputs).logits
    finally:
        handle.remove()


def kept(net: nn.Module, inputs: dict[str, Any], module: nn.Module, of_input: bool) -> torch.Tensor:
    """Return a module's output, or its first input."""
    found: list[torch.Tensor] = []
    run(net, inputs, module, lambda value: found.append(value.clone()), of_input)
    return found[0]


def patched_values(
    net: nn.Module, parts: Parts, sites: str, source: dict[str, Any], target: dict[str, Any], metric: Any
) -> torch.Tensor:
    """Return the metric of the target's run with one value of the source's: (layers, tokens), or (layers, heads)."""
    found = []
    for module in parts.modules(net, sites):
        value, row = kept(net, source, module, sites == "heads"), []
        for i in range(parts.heads if sites == "heads" else value.shape[1]):

            def change(given: torch.Tensor, value=value, i=i) -> torch.Tensor:
                changed = given.clone()
                if sites == "heads":
                    changed.unflatten(-1, (parts.heads, -1))[:, :, i] = value.unflatten(-1, (parts.heads, -1))[:, :, i]
                else:
                    changed[:, i] = value[:, i]
                return changed

            row.append(float(metric(run(net, target, module, change, sites == "heads"))))
        found.append(row)
    return torch.tensor(found)


# ---- blocks of denoisers

_JOINT = ("stable_diffusion_3", "flux", "two_call_guidance")  # their blocks return the text and the image


@dataclass(frozen=True)
class Block:
    """A block of a small pipeline's denoiser, and which tensor of its output is the image."""

    module: nn.Module
    path: str
    item: int | None

    @classmethod
    def of(cls, pipe: Any, kind: str) -> "Block":
        path = diffusion.ALL_PIPELINES[kind].denoiser_block
        return cls(module_at(pipe, path), path, 1 if kind in _JOINT else None)

    @property
    def site(self) -> str:
        """The point as lenses name it."""
        return self.path if self.item is None else f"{self.path}.output[{self.item}]"

    def image(self, output: Any) -> torch.Tensor:
        """Return the image in the block's output."""
        return first(output) if self.item is None else output[self.item]

    def with_image(self, output: Any, image: torch.Tensor) -> Any:
        """Return the block's output with another image."""
        if self.item is None:
            return with_first(output, image)
        return (*output[: self.item], image, *output[self.item + 1 :])
