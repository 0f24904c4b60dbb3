"""The arguments of a scheduler at a step, and the clean sample that follows from them.

A noisy sample is x = a x0 + b e, where x0 is the clean sample and e the noise. Both factors come from the scheduler's
own `add_noise` (`scale_noise` for flow matching), so they are right for every noise schedule. From the denoiser's
output o, with c = sqrt(a² + b²), the predicted clean sample is

    epsilon             x0 = (x - b o) / a
    v_prediction        x0 = (a x / c - b o) / c
    sample              x0 = o
    flow                x0 = (x - b o) / (a + b)

and for EDM schedulers the result of their `precondition_outputs`. Some schedulers clip or threshold this sample
afterwards, which is not done here.
"""

import copy
import inspect
import math
from typing import Any

import torch

from diffsight.errors import InputError

_FLOW = "flow_prediction"
_TYPES = ("epsilon", "v_prediction", "sample", _FLOW)


class SchedulerCall:
    """A call of `scheduler.step` that has not happened yet.

    Args:
        scheduler: The scheduler, which is not changed.
        args: The positional arguments of the call.
        kwargs: The keyword arguments of the call.

    Raises:
        InputError: The scheduler's prediction type is unknown, or the call was made on another scheduler, for example
            because the pipeline steps a copy of it.
    """

    def __init__(self, scheduler: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        given = inspect.signature(type(scheduler).step).bind_partial(scheduler, *args, **kwargs).arguments
        self.sample, self.timestep = given["sample"], given["timestep"]
        self._scheduler = self._at_this_step(scheduler)
        self._type = prediction_type(scheduler)
        self.output = self.shaped(given["model_output"])

    @property
    def scaled_sample(self) -> torch.Tensor:
        """The noisy sample as the scheduler scales it for the denoiser."""
        scale = getattr(self._scheduler, "scale_model_input", None)
        return self.sample if scale is None else scale(self.sample, self.timestep)

    @property
    def steps_left(self) -> int:
        """The number of calls left, including this one."""
        index = getattr(self._scheduler, "step_index", None)
        if index is None:
            index = int((self._scheduler.timesteps.cpu() == _time(self.timestep)).nonzero()[0])
        return len(self._scheduler.timesteps) - index

    def factors(self) -> tuple[float, float]:
        """Return the factors of the clean sample and of the noise in the noisy sample."""
        zero, one = torch.zeros(1), torch.ones(1)
        time = _time(self.timestep)[None]
        mix = getattr(self._scheduler, "scale_noise", None)
        if mix is not None:
            return mix(one, time, zero).item(), mix(zero, time, one).item()
        mix = self._scheduler.add_noise
        return mix(one, zero, time).item(), mix(zero, one, time).item()

    def predict(self, output: torch.Tensor | None = None) -> torch.Tensor:
        """Return the clean sample that the denoiser predicts, in float32 or more.

        Args:
            output: The output of the denoiser. Default: the output that the scheduler was given, after guidance.
        """
        output = self.output if output is None else self.shaped(output)
        if output.shape != self.sample.shape:
            raise InputError(
                f"the clean sample cannot be predicted: the denoiser's output has the shape {tuple(output.shape)}, and "
                f"the noisy sample {tuple(self.sample.shape)}"
            )
        x, o = (value if value.dtype == torch.float64 else value.float() for value in (self.sample, output))
        a, b = self.factors()
        if hasattr(self._scheduler, "precondition_outputs"):
            return self._scheduler.precondition_outputs(x, o, torch.tensor(b))
        if self._type == "sample":
            return o
        if self._type == "epsilon":
            return (x - b * o) / a
        if self._type == _FLOW:
            return (x - b * o) / (a + b)
        c = math.hypot(a, b)
        return (a / c * x - b * o) / c

    def shaped(self, output: torch.Tensor) -> torch.Tensor:
        """Return an output of the denoiser without the channels of a learned variance, if it has any."""
        channels = self.sample.shape[1]
        return output[:, :channels] if output.shape[1] == 2 * channels else output

    def _at_this_step(self, scheduler: Any) -> Any:
        """Return a copy whose `add_noise` uses the noise level of this step."""
        known = scheduler.timesteps.cpu()
        time, index = _time(self.timestep), getattr(scheduler, "step_index", None)
        if not (known == time).any() if index is None else not (index < len(known) and known[index] == time):
            raise InputError(
                f"the noise level is unknown: {type(scheduler).__name__} is not at the step of the call with "
                f"timestep {time.item():g}. Either the pipeline uses a copy of its scheduler, or another run of the "
                "pipeline is open"
            )
        copied = copy.copy(scheduler)
        if index is not None:
            copied.set_begin_index(index)
        return copied


def _time(timestep: Any) -> torch.Tensor:
    """Return the timestep of a call as a tensor without dimensions. If each token has a timestep, all are equal."""
    return torch.as_tensor(timestep).flatten()[0].cpu()


def prediction_type(scheduler: Any) -> str:
    """Return what a denoiser predicts: "epsilon", "v_prediction", "sample" or "flow_prediction".

    Raises:
        InputError: The type is none of these, or the scheduler does not state it.
    """
    found = scheduler.config.get("prediction_type", _FLOW if hasattr(scheduler, "scale_noise") else None)
    if found not in _TYPES or not (hasattr(scheduler, "scale_noise") or hasattr(scheduler, "add_noise")):
        raise InputError(
            f"{type(scheduler).__name__} has the prediction type {found!r}, which gives no clean sample: choose "
            f"a scheduler with one of {', '.join(_TYPES)}"
        )
    return found
