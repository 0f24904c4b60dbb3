"""Decode latents like those of a pipeline's last step: the pipeline's own code unpacks, scales and decodes them.

draw(model, latents, {"height": 64})        # what `model.decode(latents, height=64)` returns
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers.modular_pipelines import PipelineState

from diffsight.errors import InputError
from diffsight.extending import Model
from diffsight.pipelines.diffusion.call_arguments import argument_names, call_defaults
from diffsight.pipelines.diffusion.call_errors import CALL_ERRORS, is_of_pipeline
from diffsight.pipelines.diffusion.encoding import PLAIN_PROMPT, required_arguments
from diffsight.pipelines.diffusion.latents import ending_with
from diffsight.pipelines.diffusion.run import progress_bar
from diffsight.remote import is_on_server

_OF_IMAGES = 4  # dimensions of latents that are not packed: batch, channels, rows, columns


def draw(model: Model, latents: torch.Tensor | Sequence[torch.Tensor], arguments: Mapping[str, Any]) -> Sequence[Any]:
    """Return the images, videos or sounds that a pipeline decodes from latents.

    Args:
        model: A `DiffusionModel`. It makes one denoising step, whose result the latents replace.
        latents: A batch, as `scheduler.step` returns it, or a list of batches.
        arguments: Arguments of the pipeline.

    Raises:
        InputError: The latents have a different shape from the pipeline's, or it does not decode them after one step,
            or it needs other arguments.
    """
    batch, pipeline = _joined(latents), model.pipeline
    name, one_step = type(pipeline).__name__, _one_step(pipeline, batch)
    call = one_step | arguments
    if "strength" in one_step:
        call["strength"] = one_step["strength"]
    call |= {} if is_on_server(model) else ending_with(pipeline, batch, step=0)
    try:
        with torch.no_grad(), progress_bar(pipeline, disable=True), model.generate(**call) as run:
            for step in run.steps:
                if step.index:
                    raise InputError(f"{name} makes more than one step: pass the arguments with which it makes one")
                own = step.latents
                if batch.shape[1:] != own.shape[1:]:
                    raise InputError(
                        f"the latents have the shape {tuple(batch.shape)}, but those of {name} have "
                        f"{tuple(own.shape)}: pass the arguments of the call that made them, such as height and width"
                    )
                step.latents = batch
    except CALL_ERRORS as error:
        if not is_of_pipeline(error):
            raise
        raise InputError(
            f"{name} cannot make a single step with these arguments and its defaults ({error}). Pass the arguments of "
            "the call that made the latents, such as its images. If the scheduler always makes several steps, replace "
            "it: model.scheduler = …"
        ) from error
    drawn = run.images if isinstance(run.result, PipelineState) else run.result[0]
    if len(drawn) != len(batch):
        raise InputError(f"{name} drew {len(drawn)} images from {len(batch)} latents: pass them one at a time")
    return drawn


def _one_step(pipeline: Any, latents: torch.Tensor) -> dict[str, Any]:
    """Return the arguments of a call that makes one step."""
    arguments = {"prompt": PLAIN_PROMPT, "num_inference_steps": 1, "strength": 1.0}  # less would leave no step
    known = call_defaults(pipeline)
    found = {name: value for name, value in arguments.items() if name in known} | required_arguments(pipeline)
    is_upscaler = "noise_level" in known  # its latents have the size of the image
    if "image" in found and "height" not in known and latents.ndim == _OF_IMAGES and not is_upscaler:
        height, width = (size * getattr(pipeline, "vae_scale_factor", 1) for size in latents.shape[2:])
        found["image"] = found["image"].resize((width, height))
    return found | ({"seed": 0} if "generator" in argument_names(pipeline) else {})


def _joined(latents: torch.Tensor | Sequence[torch.Tensor]) -> torch.Tensor:
    """Return latents as one batch."""
    listed = [latents] if isinstance(latents, torch.Tensor) else latents if isinstance(latents, Sequence) else []
    shapes = {tuple(one.shape[1:]) if isinstance(one, torch.Tensor) and one.ndim else None for one in listed}
    if len(shapes) != 1 or None in shapes:
        raise InputError(
            "latents must be a tensor of shape (batch, …), as step.latents returns it, or a list of such tensors of "
            "the same shape"
        )
    return torch.cat(list(listed))
