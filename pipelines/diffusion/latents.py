"""Read and replace the latents in the output of `scheduler.step`, a tuple or an object of a scheduler-specific class.

sample_of(output)                           # (batch, …)
with_sample(output, latents)                # the same output with other latents
pipe(**ending_with(pipe, latents, step=9))  # goes on with other latents after step 9
"""

from collections.abc import Mapping
from typing import Any

import torch

from diffsight.pipelines.diffusion.call_arguments import call_defaults


def sample_of(output: Any) -> torch.Tensor:
    """Return the latents in the output of `scheduler.step`."""
    return next(iter(output.values() if isinstance(output, Mapping) else output))


def with_sample(output: Any, sample: torch.Tensor) -> Any:
    """Return the output of `scheduler.step` with each sample in it replaced by other latents, of any batch size."""
    before = sample_of(output)
    sample = sample.to(before)

    def replaced(value: Any) -> Any:
        return sample if isinstance(value, torch.Tensor) and value.shape == before.shape else value

    if isinstance(output, Mapping):
        return type(output)(**{name: replaced(value) for name, value in output.items()})
    return tuple(map(replaced, output))


def ending_with(pipeline: Any, latents: torch.Tensor, step: int) -> dict[str, Any]:
    """Return arguments with which a pipeline has other latents at the end of a step, whatever it pastes into those of
    the scheduler, such as a given image.

    There are none if the pipeline has no callback that may replace latents. The callback replaces nothing if the
    pipeline has made latents of another shape out of those of the scheduler."""
    name, known = "callback_on_step_end", call_defaults(pipeline)
    if name not in known or "latents" not in getattr(pipeline, "_callback_tensor_inputs", ()):
        return {}

    def replaced(pipeline: Any, index: int, timestep: Any, tensors: Mapping[str, Any]) -> Mapping[str, Any]:
        own = tensors["latents"]
        return {"latents": latents.to(own)} if index == step and latents.shape[1:] == own.shape[1:] else {}

    return {name: replaced, f"{name}_tensor_inputs": ["latents"]}
