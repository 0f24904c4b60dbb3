"""Schedulers that go from an image to noise, along the noise levels of the scheduler that draws it.

    inverse_of(pipeline.scheduler)                      # diffusers' DDIMInverseScheduler, for a DDIMScheduler
    inverse_of(pipeline.scheduler, fixed_point=3)

An inverse step from x to the noisier y needs the denoiser's output for y, which is not known yet. The plain inverse
uses the output for x instead. With fixed-point iterations, the denoiser is called again on the current estimate of y
(Pan et al., "Effective Real Image Editing with Accelerated Iterative Diffusion Inversion", ICCV 2023): each timestep
then occurs several times, and each time the step starts from x again.
"""

from functools import wraps
from typing import Any

import torch
from diffusers import (
    DDIMInverseScheduler,
    DDIMScheduler,
    DPMSolverMultistepInverseScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
)

from diffsight.errors import InputError

_KNOWN = (DDIMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler)


def inverse_of(scheduler: Any, fixed_point: int = 0) -> Any:
    """Return the inverse of a scheduler.

    Args:
        scheduler: The scheduler, which is not changed.
        fixed_point: The number of fixed-point iterations in each step.

    Raises:
        InputError: The scheduler has no inverse, or none with fixed-point iterations.
    """
    kind = type(scheduler)
    if kind is DPMSolverMultistepScheduler and not fixed_point:
        return DPMSolverMultistepInverseScheduler.from_config(scheduler.config)
    if kind is DDIMScheduler and not fixed_point:
        return DDIMInverseScheduler.from_config(scheduler.config)
    if kind not in _KNOWN:
        raise InputError(
            f"{kind.__name__} has no inverse: choose one of {', '.join(one.__name__ for one in _KNOWN)}, such as "
            "model.scheduler = DDIMScheduler.from_config(model.scheduler.config)"
        )
    if kind is DPMSolverMultistepScheduler:
        raise InputError("there are no fixed-point iterations for DPMSolverMultistepScheduler: choose DDIMScheduler")
    if kind is DDIMScheduler and scheduler.config.prediction_type == "sample":
        raise InputError(
            "there are no fixed-point iterations for a denoiser that predicts the sample: omit fixed_point"
        )
    chosen = FlowInverseScheduler if kind is FlowMatchEulerDiscreteScheduler else FixedPointInverseScheduler
    inverse = chosen.from_config(scheduler.config)
    inverse.repeats = fixed_point + 1
    return inverse


class FlowInverseScheduler(FlowMatchEulerDiscreteScheduler):
    """Euler's method for a rectified flow, from the image to the noise.

    `repeats` is how often each timestep occurs. If it is 1, a step uses the timestep at which it begins; otherwise, the
    one at which it ends."""

    repeats = 1

    @wraps(FlowMatchEulerDiscreteScheduler.set_timesteps)  # pipelines look at its signature
    def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
        super().set_timesteps(*args, **kwargs)
        self.sigmas = self.sigmas.flip(0)
        levels = self.sigmas[:-1] if self.repeats == 1 else self.sigmas[1:].repeat_interleave(self.repeats)
        self.timesteps = levels * self.config.num_train_timesteps
        self._calls, self._begun_at = 0, None

    def step(self, model_output: torch.Tensor, timestep: Any, sample: torch.Tensor, **options: Any) -> tuple:
        """Return the next sample, as a tuple."""
        index, repeat = divmod(self._calls, self.repeats)
        self._begun_at = sample if repeat == 0 else self._begun_at
        self._calls += 1
        change = (self.sigmas[index + 1] - self.sigmas[index]) * model_output.float()
        return ((self._begun_at.float() + change).to(model_output.dtype),)


class FixedPointInverseScheduler(DDIMInverseScheduler):
    """The exact inverse of DDIM's step, by fixed-point iterations.

    With a² = alpha and b² = 1 - alpha at the noise level of x, and A, B at the noise level of y, DDIM draws x from y as

        epsilon         x = a / A (y - B o) + b o
        v_prediction    x = (a A + b B) y + (b A - a B) o

    This is solved for y, where o is the denoiser's output for the last estimate of y."""

    repeats = 1

    @wraps(DDIMInverseScheduler.set_timesteps)
    def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
        super().set_timesteps(*args, **kwargs)
        self.timesteps = self.timesteps.repeat_interleave(self.repeats)
        self._calls, self._begun_at = 0, None

    def step(self, model_output: torch.Tensor, timestep: Any, sample: torch.Tensor, **options: Any) -> tuple:
        """Return the next sample, as a tuple."""
        self._begun_at = sample if self._calls % self.repeats == 0 else self._begun_at
        self._calls += 1
        before = int(timestep) - self.config.num_train_timesteps // self.num_inference_steps
        below = self.alphas_cumprod[before] if before >= 0 else self.initial_alpha_cumprod
        above, x, o = self.alphas_cumprod[int(timestep)], self._begun_at.float(), model_output.float()
        a, b, A, B = (value.item() for value in (below**0.5, (1 - below) ** 0.5, above**0.5, (1 - above) ** 0.5))
        if self.config.prediction_type == "epsilon":
            found = A / a * (x - b * o) + B * o
        else:
            found = (x - (b * A - a * B) * o) / (a * A + b * B)
        return (found.to(sample.dtype),)
