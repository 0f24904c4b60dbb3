"""The hooks that the guider of a modular pipeline puts on the denoiser, as `AutoGuidance` does to skip layers."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from diffusers.guiders import BaseGuidance
from torch import nn

from diffsight.pipelines.diffusion.components import components
from diffsight.pipelines.diffusion.denoising_clock import denoisers


def hooked_parts(pipeline: Any) -> dict[str, nn.Module]:
    """Return the denoisers on which the guider of a pipeline puts hooks, by name."""
    return denoisers(pipeline) if _hooking_guiders(pipeline) else {}


@contextmanager
def guider_hooks_removed(pipeline: Any) -> Iterator[None]:
    """Remove the hooks if the block ends early, with an error or because its run is stopped.

    A pipeline removes them only after the call of the denoiser that they are for."""
    try:
        yield
    except BaseException:
        for guider in _hooking_guiders(pipeline):
            for part in denoisers(pipeline).values():
                guider.cleanup_models(part)
        raise


def _hooking_guiders(pipeline: Any) -> list[BaseGuidance]:
    guiders = (part for part in components(pipeline).values() if isinstance(part, BaseGuidance))
    return [guider for guider in guiders if type(guider).cleanup_models is not BaseGuidance.cleanup_models]
