"""The components of a diffusers pipeline: which there are, and what of them a run can follow.

components(pipeline)                        # {"text_encoder": CLIPTextModel, "unet": …, "scheduler": …}
traceable_methods(pipeline, pipeline.vae)   # {"encode": "vae.encode", "decode": "vae.decode"}
component_names(pipeline.text_encoder)      # {"layers": "encoder.layers", "ln_final": "final_layer_norm"}
text_encoder_names(pipeline)                # ["text_encoder"]
"""

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from types import FunctionType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from torch import nn
from transformers import PreTrainedModel

from diffsight.extending import FORWARD, Clock, Target, Tree, join
from diffsight.pipelines.standard_names import standard_names, word_embeddings
from diffsight.pipelines.targets import component_targets
from diffsight.pipelines.wrapped_modules import children_in, unwrapped

_WITHOUT_WEIGHTS = ("set_progress_bar_config", "progress_bar")
_PLAIN = (bool, int, float, str, list, tuple, dict)


class DiffusionTree(Tree):
    """What can be traced in a diffusers pipeline: its components, and the methods that pipelines call directly."""

    opens_with = "generate"

    def __init__(self, root: Target, load: Callable[[], None] | None = None) -> None:
        super().__init__(root, load)
        self._standard_names: WeakKeyDictionary = WeakKeyDictionary()
        self._component_targets: dict[str, Target] = {}

    def attribute(self, owner: Any, name: str) -> Any:
        return getattr(owner, name) if name in _WITHOUT_WEIGHTS else super().attribute(owner, name)

    def children_of(self, target: Target) -> dict[str, Target]:
        if target.owner is not self.root.owner:
            return children_in(target)
        return component_targets(components(self.root.owner), self._component_targets)

    def methods_of(self, owner: Any) -> Mapping[str, str]:
        return traceable_methods(self.root.owner, owner)

    def names_of(self, owner: Any) -> Mapping[str, str]:
        if not isinstance(unwrapped(owner), PreTrainedModel):
            return {}
        if owner not in self._standard_names:
            is_component = any(part is owner for part in components(self.root.owner).values())
            self._standard_names[owner] = component_names(owner) if is_component else {}
        return self._standard_names[owner]

    def components(self) -> list[Target]:
        targets = self.method_targets(self.root)
        for target in self.children_of(self.root).values():
            targets += [target] if target.is_called else []
            targets += self.method_targets(target)
        return targets

    def target_named(self, outer: Target, name: str) -> Target | None:
        inner = unwrapped(outer.owner)
        if inner is not outer.owner and name in self.methods_of(inner):  # what wraps a VAE passes `decode` on to it
            return Target(inner, name, join(outer.path, name), outer)
        return super().target_named(outer, name)

    def method_targets(self, target: Target) -> list[Target]:
        """Return targets for the traceable methods of a component."""
        owner = unwrapped(target.owner)
        return [Target(owner, name, path) for name, path in self.methods_of(owner).items()]

    def stand_ins(self) -> Mapping[tuple[int, str], Callable]:
        """Let a scan accept all images, since a safety checker reads their values."""
        checkers = (target for target in self.children_of(self.root).values() if "safety_checker" in target.path)
        return {target.key: partial(pass_safety_check, target.owner) for target in checkers}

    def clock(self) -> Clock:
        """A step begins when a component is passed the timestep, once the scheduler has stepped since the last."""
        parts = self.children_of(self.root).values()
        denoisers = [target for target in parts if target.name == FORWARD and time_parameter(target.owner)]
        steps = [target for part in parts for target in self.method_targets(part) if target.name == "step"]
        return Clock(denoisers, steps, lambda target, *call: time_argument(target.owner, *call))

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


def components(pipeline: DiffusionPipeline) -> dict[str, Any]:
    """Return the components of a pipeline by name, without those that are unset or plain values."""
    held = vars(pipeline)
    found = ((name, held.get(name)) for name in pipeline.config if not name.startswith("_"))
    return {name: part for name, part in found if part is not None and not isinstance(part, _PLAIN)}


def traceable_methods(pipeline: DiffusionPipeline, owner: Any) -> Mapping[str, str]:
    """Return the methods of the pipeline or of a component that pipelines call directly, name to path.

    These are `encode_prompt` of the pipeline, `encode` and `decode` of a VAE, and `step` of a scheduler."""
    if owner is pipeline:
        return {name: name for name in ("encode_prompt",) if _has_method(owner, name)}
    for path, component in components(pipeline).items():
        component = unwrapped(component)
        if component is owner:
            return {name: join(path, name) for name in _direct_methods(component) if _has_method(component, name)}
    return {}


def component_names(component: Any) -> dict[str, str]:
    """Return the standard names of a component, name to real path. Only models of transformers have any."""
    return standard_names(component) if isinstance(unwrapped(component), PreTrainedModel) else {}


def text_encoder_names(pipeline: DiffusionPipeline) -> list[str]:
    """Return the names of the components that may encode text: those with layers and a word embedding."""
    modules = {name: part for name, part in components(pipeline).items() if isinstance(part, nn.Module)}
    return [name for name, m in modules.items() if "layers" in component_names(m) and word_embeddings(m)]


def _direct_methods(component: Any) -> tuple[str, ...]:
    if isinstance(component, nn.Module):
        return "encode", "decode"
    return ("step",) if isinstance(component, SchedulerMixin) else ()


def _has_method(component: Any, name: str) -> bool:
    return isinstance(inspect.getattr_static(type(component), name, None), FunctionType)


# ---- the denoiser and its timestep


def time_parameter(module: nn.Module) -> str | None:
    """Return the parameter through which a denoiser receives the timestep. Other components have none."""
    names = list(inspect.signature(unwrapped(module).forward).parameters)
    return next((n for n in names if "timestep" in n), next((n for n in names[:3] if n in ("t", "r")), None))


def time_argument(module: nn.Module, args: tuple, kwargs: dict) -> tuple[float, float] | None:
    """Return the time that a call passes to a denoiser, and the rounding error of its type.

    Where each token has a time of its own, this is the latest: tokens that are given rather than drawn get 0."""
    name = time_parameter(module)
    given = dict(zip(inspect.signature(unwrapped(module).forward).parameters, args)) | kwargs
    if given.get(name) is None:
        return None
    time = torch.as_tensor(given[name])
    rounding = 4 * torch.finfo(time.dtype).eps if time.is_floating_point() else 0
    return float(time.max()), rounding


def scheduler_timestep(pipeline: DiffusionPipeline, denoiser: nn.Module, args: tuple, kwargs: dict) -> float | None:
    """Return the timestep of a denoiser call in the scheduler's own units.

    Some pipelines divide the timestep by 1000 before they pass it to the denoiser, or pass 1 minus that."""
    found = time_argument(denoiser, args, kwargs)
    if found is None:
        return None
    time, rounding = found
    near = []
    for scheduler in (part for part in components(pipeline).values() if isinstance(part, SchedulerMixin)):
        known = torch.as_tensor(getattr(scheduler, "timesteps", [])).flatten()
        span = scheduler.config.get("num_train_timesteps", 1000)
        for order, value in enumerate((time, time * span, (1 - time) * span) if known.numel() else ()):
            nearest = known[(known.double() - value).abs().argmin()].item()
            if abs(nearest - value) <= rounding * span:
                near.append((abs(nearest - value), order, nearest))
    return min(near)[2] if near else time


# ---- stand-ins for a scan


def pass_safety_check(checker: nn.Module, clip_input: torch.Tensor, images: Any) -> tuple:
    """Return what a safety checker returns where it finds nothing: the images, `(batch, …)`, and a flag for each.

    The checker of DeepFloyd IF also returns flags for watermarks."""
    nothing = [False] * len(images)
    return (images, nothing, nothing) if type(checker).__name__.startswith("IF") else (images, nothing)
