"""Inversion: the noise from which a pipeline draws a given image.

    inverted = invert(model, Image.open("scene.png"), "a red circle below a blue square", num_inference_steps=50)
    inverted.psnr                                           # of the reconstruction, in dB
    trajectory_lens(model, inverted=inverted)               # every lens, now on the given image

The pipeline's own loop runs with the inverse of its scheduler (`denoising/inverse_schedulers.py`): DDIM inversion (Song
et al., "Denoising Diffusion Implicit Models", ICLR 2021), diffusers' inverse of DPM-Solver++, or rectified-flow
inversion (Rout et al., "Semantic Image Inversion and Editing using Rectified Stochastic Differential Equations", 2024).
"""

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from matplotlib.figure import Figure
from PIL import Image
from safetensors.torch import save_file

from diffsight.errors import InputError
from diffsight.lenses.denoising.call_checks import check_one_image
from diffsight.lenses.denoising.clean_prediction import prediction_type
from diffsight.lenses.denoising.image_encoding import check_can_encode, check_image, encode_image
from diffsight.lenses.denoising.inverse_schedulers import inverse_of
from diffsight.lenses.results.calls import repeatable
from diffsight.lenses.results.denoising_plots import difference_image, step_curves
from diffsight.lenses.results.figure import write_figure
from diffsight.lenses.results.image_grid import image_grid
from diffsight.lenses.results.result import LensResult
from diffsight.lenses.results.sections import CurveSection, ImageSection, Section
from diffsight.lenses.where_models_are import where_the_model_is
from diffsight.pipelines.argument_types import check_types
from diffsight.pipelines.diffusion.model import DiffusionModel
from diffsight.pipelines.diffusion.run import DiffusionRun, progress_bar
from diffsight.pipelines.numbers import as_integer, as_number


@dataclass(frozen=True, eq=False)
class Inversion(LensResult):
    """The noise of an image, and what the pipeline draws from it.

    `save(folder)` writes `grid.png`, `image.png`, `reconstruction.png`, `norms.png`, `inversion.safetensors` (the
    latents) and `inversion.json`.

    Attributes:
        image: The given image.
        reconstruction: The image that the pipeline draws from the noise.
        decoded: The image encoded and decoded by the autoencoder: the best possible reconstruction.
        latents: The latents of the image, and those after each step, (steps + 1, ...). The last are the noise.
        arguments: The arguments of `generate`, and of lenses, that draw the reconstruction, including `latents`.
        model: The name of the model.
        scheduler: The class of the inverse scheduler.
        fixed_point: As in `invert`.
        gamma: As in `invert`.
        eta: As in `invert`. With an `eta`, `arguments` alone do not reproduce the reconstruction.
    """

    image: Image.Image = field(repr=False)
    reconstruction: Image.Image = field(repr=False)
    decoded: Image.Image = field(repr=False)
    latents: torch.Tensor = field(repr=False)
    arguments: Mapping[str, Any] = field(repr=False)
    model: str
    scheduler: str
    fixed_point: int = 0
    gamma: float = 0.0
    eta: float = 0.0
    record_file: ClassVar[str] = "inversion.json"

    @property
    def noise(self) -> torch.Tensor:
        """The noise, (1, ...), as `generate(latents=…)` takes it."""
        return self.latents[-1:]

    @property
    def psnr(self) -> float:
        """The peak signal-to-noise ratio of the reconstruction in dB: 20 log10(255 / root mean square error)."""
        return _psnr(_errors(self.image, self.reconstruction).mean())

    @property
    def decoded_psnr(self) -> float:
        """The peak signal-to-noise ratio of `decoded` in dB."""
        return _psnr(_errors(self.image, self.decoded).mean())

    def psnr_by_region(self, rows: int = 2, columns: int = 2) -> list[list[float]]:
        """Return the peak signal-to-noise ratio of each part of the image in dB, divided into rows and columns."""
        errors = _errors(self.image, self.reconstruction)
        counts = [as_integer(rows) or 0, as_integer(columns) or 0]
        if any(not 1 <= count <= side for count, side in zip(counts, errors.shape)):
            raise InputError(f"an image cannot be divided into {rows} x {columns} regions")
        bands = np.array_split(errors, counts[0])
        return [[_psnr(part.mean()) for part in np.array_split(band, counts[1], axis=1)] for band in bands]

    def draw_to_image(self, run: DiffusionRun) -> None:
        """Pull the path of a run towards the image, with the strength `eta`. An edit for `model.edit`."""
        _pull_towards(run, self.latents[:1], self.eta)

    def grid(self) -> Image.Image:
        """Return, in one image, the image, the image after the autoencoder, the reconstruction, and the difference
        between reconstruction and image, centred on medium gray."""
        difference = difference_image(self.reconstruction, self.image)
        images = [self.image, self.decoded, self.reconstruction, difference]
        decibels = [f"autoencoder\n{self.decoded_psnr:.1f} dB", f"reconstruction\n{self.psnr:.1f} dB"]
        return image_grid(images, columns=4, titles=["image", *decibels, "difference"])

    def plot(self) -> Figure:
        """Plot the root mean square of the latents by step. At the last step it is that of noise."""
        norms = self._norms()
        return step_curves({"latents": norms}, range(len(norms)), "root mean square of the latents", self.scheduler)

    def _norms(self) -> list[float]:
        return self.latents.double().square().flatten(1).mean(1).sqrt().tolist()

    def preview(self) -> Image.Image:
        return self.grid()

    def sections(self) -> list[Section]:
        images = {
            "image": self.image,
            f"autoencoder, {self.decoded_psnr:.1f} dB": self.decoded,
            f"reconstruction, {self.psnr:.1f} dB": self.reconstruction,
            "difference": difference_image(self.reconstruction, self.image),
        }
        norms, label = self._norms(), "root mean square of the latents"
        places = [str(i) for i in range(len(norms))]
        return [ImageSection("", {"": images}), CurveSection("Norms", "step", places, {"latents": norms}, label)]

    def files(self) -> dict[str, Callable[[Path], None]]:
        return {
            "grid.png": self.grid().save,
            "image.png": self.image.save,
            "reconstruction.png": self.reconstruction.save,
            "norms.png": partial(write_figure, self.plot),
            "inversion.safetensors": partial(save_file, {"latents": self.latents.contiguous()}),
        }

    def record(self) -> dict[str, Any]:
        return {
            "lens": "invert",
            "model": self.model,
            "scheduler": self.scheduler,
            "fixed_point": self.fixed_point,
            "gamma": self.gamma,
            "eta": self.eta,
            "psnr": self.psnr,
            "decoded_psnr": self.decoded_psnr,
            "arguments": {name: value for name, value in self.arguments.items() if name != "latents"},
        }


@repeatable
@where_the_model_is
def invert(
    model: DiffusionModel,
    image: Any,
    prompt: str = "",
    *,
    guidance_scale: float = 1.0,
    fixed_point: int = 0,
    gamma: float = 0.0,
    eta: float = 0.0,
    seed: int = 0,
    progress: bool = True,
    **arguments: Any,
) -> Inversion:
    """Find the noise from which a pipeline draws an image, and draw the image from it.

        invert(model, image, "a red circle", num_inference_steps=50, fixed_point=3)
        invert(flux, image, "a red circle", gamma=0.5, eta=0.9)

    Args:
        model: A pipeline with an autoencoder for images, and a DDIM, DPM-Solver++ multistep, or Euler flow-matching
            scheduler.
        image: A PIL image in mode RGB, or a float tensor (3, height, width) from 0 to 1.
        prompt: What the image shows. An empty prompt inverts without a description.
        guidance_scale: The guidance, in both directions. Inversion is most accurate without guidance, that is, at 1.
        fixed_point: The number of fixed-point iterations in each step. More of them make the reconstruction more
            accurate; each costs a call of the denoiser. Not for DPM-Solver++.
        gamma: For a rectified flow: how strongly the path is pulled towards noise of `seed`, from 0 to 1 (Rout et al.,
            equation 8). The noise is then more typical, and the reconstruction less accurate.
        eta: For a rectified flow: how strongly the reconstruction is pulled towards the image, from 0 to 1 (equation
            15).
        seed: The seed of the pipeline and of the noise.
        progress: Whether to show a progress bar.
        arguments: Further arguments of the pipeline, such as `num_inference_steps`.

    Returns:
        The noise, the latents by step, and the reconstruction.

    Raises:
        InputError: Before anything runs, if the image has the wrong mode, size or range, the scheduler has no inverse,
            the pipeline cannot draw from latents, or the model has edits.
    """
    if isinstance(model, DiffusionModel):
        own = {"prompt": prompt, "guidance_scale": guidance_scale}
        arguments |= {name: value for name, value in own.items() if name in model.argument_names}
    check_one_image(invert, model, prompt, seed, None, arguments)
    check_types(invert, prompt=prompt, guidance_scale=guidance_scale)
    pipeline = model.pipeline
    fixed_point, gamma, eta = _checked(model, arguments, fixed_point, gamma, eta)
    image = check_image(pipeline, image)
    inverse = copy.copy(pipeline)  # shares all components but the scheduler
    inverse.scheduler = inverse_of(pipeline.scheduler, fixed_point)
    if {"height", "width"} <= model.argument_names:
        arguments |= {"height": image.height, "width": image.width}
    model.check(**arguments, seed=seed)
    start, decoded = encode_image(pipeline, image)
    call = {**arguments, "seed": int(seed)}
    with progress_bar(pipeline, desc="inversion", disable=not progress):
        with progress_bar(inverse, desc="inversion", disable=not progress):
            latents = _invert(DiffusionModel(inverse), start, call, fixed_point + 1, gamma)
        call["latents"] = latents[-1:]
        drawing = model if not eta else model.edit(partial(_pull_towards, image=start, eta=eta))
        reconstruction = drawing.generate(**call).images[0]
    return Inversion(
        image=image,
        reconstruction=reconstruction,
        decoded=decoded,
        latents=latents,
        arguments=call,
        model=model.source,
        scheduler=type(inverse.scheduler).__name__,
        fixed_point=fixed_point,
        gamma=gamma,
        eta=eta,
    )


def _invert(
    model: DiffusionModel, start: torch.Tensor, call: Mapping[str, Any], repeats: int, gamma: float
) -> torch.Tensor:
    """Return the latents of an image and those after each step, (steps + 1, ...)."""
    found = [start]
    noise = torch.randn(start.shape, generator=torch.Generator().manual_seed(call["seed"])).to(start)
    with torch.no_grad(), model.generate(**call, latents=start, output_type="latent") as run:
        for step in run.steps:
            if gamma:
                output, time, sample = _given(run)
                to_noise = (noise - sample) / (1 - time)
                run.scheduler.step.input = output + gamma * (to_noise - output)
            latents = run.scheduler.step.output[0]
            if (step.index + 1) % repeats == 0:
                found.append(latents)
    return torch.cat([latents.float() for latents in found])


def _pull_towards(run: DiffusionRun, image: torch.Tensor, eta: float) -> None:
    """Pull the path of a rectified flow towards the latents of an image."""
    for _ in run.steps:
        output, time, sample = _given(run)
        from_image = (sample - image.to(sample)) / time
        run.scheduler.step.input = output + eta * (from_image - output)


def _given(run: DiffusionRun) -> tuple[torch.Tensor, float, torch.Tensor]:
    """Return the flow, the time (0 for the image, 1 for noise) and the sample that the scheduler is given."""
    args, kwargs = run.scheduler.step.inputs
    output, timestep, sample = (*args, *kwargs.values())[:3]
    return output, float(timestep) / run.scheduler.config.num_train_timesteps, sample


def _checked(
    model: DiffusionModel, arguments: Mapping[str, Any], fixed_point: Any, gamma: Any, eta: Any
) -> tuple[int, float, float]:
    """Return `fixed_point`, `gamma` and `eta` as numbers of Python."""
    pipeline, name = model.pipeline, type(model.pipeline).__name__
    if model.edits:
        raise InputError("an image cannot be inverted by a model with edits: use the model without them")
    if "latents" in arguments or "latents" not in model.argument_names:
        raise InputError(
            "omit latents: invert computes them"
            if "latents" in arguments
            else f"{name} cannot be used, because it does not have the argument latents"
        )
    prediction_type(pipeline.scheduler)
    check_can_encode(pipeline)
    iterations = as_integer(fixed_point)
    if iterations is None or iterations < 0:
        raise InputError(f"fixed_point is a number of iterations, 0 or more, not {fixed_point!r}")
    pulls = {"gamma": as_number(gamma), "eta": as_number(eta)}
    for (option, number), value in zip(pulls.items(), (gamma, eta)):
        if number is None or not 0 <= number <= 1:
            raise InputError(f"{option} must be from 0 to 1, not {value!r}")
        if number and not isinstance(pipeline.scheduler, FlowMatchEulerDiscreteScheduler):
            raise InputError(f"{option} is for rectified flows: omit it with {type(pipeline.scheduler).__name__}")
    if gamma and fixed_point:
        raise InputError("gamma and fixed_point cannot be combined: choose one of them")
    return iterations, *pulls.values()


def _errors(image: Image.Image, other: Image.Image) -> np.ndarray:
    """Return the mean square error at each pixel, (height, width)."""
    pixels, others = (np.asarray(one, dtype=float) for one in (image, other))
    return ((pixels - others) ** 2).mean(-1)


def _psnr(error: float) -> float:
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)
