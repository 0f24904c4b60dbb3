"""The modules that a pipeline changes during its call and restores at its end: no other call can use them meanwhile."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from torch import nn

from diffsight.pipelines.diffusion.attention_processors import parts_with_own_processors
from diffsight.pipelines.diffusion.denoiser_caches import cached_parts
from diffsight.pipelines.diffusion.guider_hooks import hooked_parts
from diffsight.pipelines.diffusion.lora_scales import scaled_parts


class ChangedModule(NamedTuple):
    """A module that a call changes.

    Attributes:
        module: The module.
        change: What the call does with it, in words that follow "a call".
        advice: How to call the pipeline without that, in words that follow "Make one call after the other".
    """

    module: nn.Module
    change: str
    advice: str = ""


def changed_modules(pipeline: Any, arguments: Mapping[str, Any]) -> Iterator[ChangedModule]:
    """Yield the modules that a call of a pipeline with these arguments changes."""
    for name, part in cached_parts(pipeline).items():
        is_enabled = getattr(part, "is_cache_enabled", False)  # not if `apply_...` of diffusers has put it on
        advice = f", or turn the cache off with {name}.disable_cache()" if is_enabled else ""
        yield ChangedModule(part, f"keeps values in the cache of the {name}", advice)
    for name, part in scaled_parts(pipeline, arguments).items():
        advice = ", or leave out the scale and set it before, with pipeline.set_adapters(name, scale)"
        yield ChangedModule(part, f"changes the scale of the LoRA in the {name}", advice)
    for name, part in parts_with_own_processors(pipeline, arguments).items():
        yield ChangedModule(part, f"sets the attention processors of the {name}")
    for name, part in hooked_parts(pipeline).items():
        yield ChangedModule(part, f"has a guider that puts hooks on the {name}")
