"""Show a denoiser a given image, with the noise of each step, instead of the image that the pipeline draws.

    given = GivenImage(model, image, seed=0, arguments=arguments)
    with model.generate(prompt, seed=0, **given.arguments) as run:
        given.follow(run, "unet")           # from now on the denoiser sees the image, whatever the pipeline draws

At each step, the scheduler mixes the latents of the image with the same noise sample at the noise level of the step, as
an image-to-image pipeline does for its first step.
"""

import copy
from collections.abc import Mapping
from typing import Any

import torch

from diffsight.errors import InputError
from diffsight.lenses.denoising.image_encoding import check_can_encode, check_image, encode_image
from diffsight.pipelines.diffusion.model import DiffusionModel
from diffsight.pipelines.diffusion.run import DiffusionRun


class GivenImage:
    """An image that a denoiser is shown at every step.

    Args:
        model: The pipeline.
        image: A PIL image in mode RGB, or a float tensor (3, height, width) from 0 to 1.
        seed: The seed of the noise.
        arguments: The arguments of the pipeline.

    Raises:
        InputError: The image has a wrong mode, size or range, or the pipeline has no autoencoder for images.
    """

    def __init__(self, model: DiffusionModel, image: Any, seed: int, arguments: Mapping[str, Any]) -> None:
        check_can_encode(model.pipeline)
        self._scheduler = model.pipeline.scheduler
        self.image = check_image(model.pipeline, image)
        self.arguments = dict(arguments)
        for name, side in {"height": self.image.height, "width": self.image.width}.items():
            if arguments.get(name, side) != side:
                raise InputError(f"{name}={arguments[name]} does not match the image, whose {name} is {side}: omit it")
            if name in model.argument_names:
                self.arguments[name] = side
        self._latents, _ = encode_image(model.pipeline, self.image)
        generator = torch.Generator().manual_seed(int(seed))
        self._noise = torch.randn(self._latents.shape, generator=generator).to(self._latents)

    def follow(self, run: DiffusionRun, denoiser: str) -> None:
        """Show the image to the denoiser in every call from now on."""
        step = 0

        def show(value: Any) -> None:
            seen = self._at_step(step)
            if not isinstance(value, torch.Tensor) or value.shape[1:] != seen.shape[1:]:
                shape = tuple(value.shape[1:]) if isinstance(value, torch.Tensor) else type(value).__name__
                raise InputError(
                    f"image: {denoiser} expects {shape}, but the latents of the image have the shape "
                    f"{tuple(seen.shape[1:])}"
                )
            value.copy_(seen)

        def end_step(output: Any) -> None:
            nonlocal step
            step += 1

        run.follow(f"{denoiser}.input", show)
        run.follow("scheduler.step.output", end_step)

    def _at_step(self, step: int) -> torch.Tensor:
        """Return the latents with the noise of a step, as the denoiser takes them, (1, ...)."""
        time = self._scheduler.timesteps[step]
        scheduler = copy.copy(self._scheduler)
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(step)
        if hasattr(scheduler, "scale_noise"):
            noised = scheduler.scale_noise(self._latents, time[None], self._noise)
        else:
            noised = scheduler.add_noise(self._latents, self._noise, time[None])
        return scheduler.scale_model_input(noised, time) if hasattr(scheduler, "scale_model_input") else noised
