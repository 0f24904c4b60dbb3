"""The parts of a diffusers pipeline that can be traced, and their names."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import PreTrainedModel

from diffsight.extending import Clock, Target, children_in, join, part_targets, unwrapped
from diffsight.pipelines.attention.attention_values import AttentionTree
from diffsight.pipelines.diffusion.call_arguments import call_defaults
from diffsight.pipelines.diffusion.components import (
    component_names,
    components,
    text_block_targets,
    traceable_methods,
)
from diffsight.pipelines.diffusion.denoising_clock import DenoisingClock, decodes_last, time_parameter

_GUIDANCE = {"guidance_scale", "true_cfg_scale"}  # arguments of pipelines that may have two branches
_WITHOUT_WEIGHTS = ("set_progress_bar_config", "progress_bar")


_DENOISERS = ("unet", "transformer")  # the names that pipelines use


class DiffusionTree(AttentionTree):
    """The tree of a diffusers pipeline: its components, and the methods that pipelines call directly."""

    opens_with = "generate"

    def __init__(self, root: Target, load: Callable[[], None] | None = None) -> None:
        super().__init__(root, load)
        self._standard_names: WeakKeyDictionary = WeakKeyDictionary()
        self._component_targets: dict[str, Target] = {}
        self._decodes_last = decodes_last(root.owner)

    def attribute(self, owner: Any, name: str) -> Any:
        return getattr(owner, name) if name in _WITHOUT_WEIGHTS else super().attribute(owner, name)

    def children_of(self, target: Target) -> dict[str, Target]:
        if target.owner is not self.root.owner:
            return children_in(target)
        return part_targets(components(self.root.owner), self._component_targets)

    def methods_of(self, owner: Any) -> Mapping[str, str]:
        return traceable_methods(self.root.owner, owner)

    def names_of(self, owner: Any) -> Mapping[str, str]:
        if not isinstance(unwrapped(owner), PreTrainedModel):
            return {}
        if owner not in self._standard_names:
            is_component = any(part is owner for part in components(self.root.owner).values())
            self._standard_names[owner] = component_names(owner) if is_component else {}
        return self._standard_names[owner]

    def meant_by(self, target: Target, name: str) -> str:
        denoiser = next((part for part in _DENOISERS if part in components(self.root.owner)), name)
        return denoiser if target is self.root and name in _DENOISERS else name

    def components(self) -> list[Target]:
        targets = self.method_targets(self.root) + text_block_targets(self.root.owner)
        for target in self.children_of(self.root).values():
            targets += [target] if target.is_called else []
            targets += self.method_targets(target)
        return targets

    def target_named(self, outer: Target, name: str) -> Target | None:
        inner = unwrapped(outer.owner)
        if inner is not outer.owner and name in self.methods_of(inner):  # a VAE's wrapper forwards `decode`
            return Target(inner, name, join(outer.path, name), outer)
        return super().target_named(outer, name)

    def method_targets(self, target: Target) -> list[Target]:
        """Return targets for the traceable methods of a component."""
        owner = unwrapped(target.owner)
        return [Target(owner, name, path) for name, path in self.methods_of(owner).items()]

    def stand_ins(self) -> Mapping[tuple[int, str], Callable]:
        """Let safety checkers accept all images in a scan, because they read values and a scan computes none."""
        checkers = (target for target in self.children_of(self.root).values() if "safety_checker" in target.path)
        return {target.key: partial(pass_safety_check, target.owner) for target in checkers}

    def clock(self) -> Clock:
        parts = list(self.children_of(self.root).values())
        methods = [method for part in parts for method in self.method_targets(part)]
        return DenoisingClock(parts, methods, self._decodes_last)

    def note_on_values(self, path: str) -> str:
        name = path.partition(".")[0]
        part = components(self.root.owner).get(name)
        is_denoiser = isinstance(part, nn.Module) and time_parameter(part) is not None
        if not is_denoiser or _GUIDANCE.isdisjoint(call_defaults(self.root.owner)):
            return ""
        return (
            "Under classifier-free guidance, its values hold both branches, the conditional and the unconditional: "
            f"run.cond.{path} and run.uncond.{path} have one of them each"
        )

    def describe(self, owner: Any) -> str:
        if owner is not self.root.owner:
            return repr(owner)
        lines, besides, names = [], list(self.methods_of(owner)), []
        for path, part in components(owner).items():
            shown = repr(part) if isinstance(part, nn.Module) else f"{type(part).__name__}()"
            lines.append(f"  ({path}): " + shown.replace("\n", "\n  "))
            besides += self.methods_of(part).values()
            besides += [path] if not isinstance(part, nn.Module) and callable(part) else []
            names += [f"{path}.{name} = {path}.{real}" for name, real in self.names_of(part).items() if name != real]
        text = f"{type(owner).__name__}(\n" + "\n".join(lines) + "\n)"
        text += "\ntraceable besides modules: " + ", ".join(f"{path}()" for path in besides)
        return text + ("\nstandard names: " + ", ".join(names) if names else "") + self.describe_weights()


def pass_safety_check(checker: nn.Module, clip_input: torch.Tensor, images: Any) -> tuple:
    """Return what a safety checker returns if it finds nothing: the images, `(batch, …)`, and a flag for each.

    The checker of DeepFloyd IF also returns flags for watermarks."""
    nothing = [False] * len(images)
    return (images, nothing, nothing) if type(checker).__name__.startswith("IF") else (images, nothing)
