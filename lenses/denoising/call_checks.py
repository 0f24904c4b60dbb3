"""The checks that denoising lenses make before anything runs. Every function raises InputError."""

import copy
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from diffusers import SchedulerMixin

from diffsight.errors import InputError
from diffsight.lenses.options import check_kind, check_options
from diffsight.pipelines.diffusion.call_arguments import call_defaults
from diffsight.pipelines.diffusion.components import components
from diffsight.pipelines.diffusion.model import DiffusionModel
from diffsight.pipelines.numbers import as_integer, as_slice, unpacked

_SEVERAL = ("num_images_per_prompt", "num_videos_per_prompt", "num_waveforms_per_prompt")

# Arguments that change the steps that `num_inference_steps` alone would give.
_OTHER_STEPS = ("timesteps", "sigmas", "strength", "denoising_start", "denoising_end", "original_inference_steps")

Steps = int | slice | Iterable[int | slice] | None


def check_one_image(
    lens: Callable, model: Any, prompt: Any, seed: Any, batch_size: Any, arguments: Mapping[str, Any]
) -> None:
    """Check that a lens draws one image, from at most one prompt, with a pipeline that has one scheduler."""
    name = lens.__name__
    check_kind(name, model, DiffusionModel)
    check_options(lens, model, arguments)
    if prompt is not None and not isinstance(prompt, str):
        raise InputError(f"{name} takes one prompt, a string, not {type(prompt).__name__}")
    if as_integer(seed) is None:
        raise InputError(f"{name} takes one seed, an integer, not {seed!r}")
    if batch_size is not None and (as_integer(batch_size) or 0) < 1:
        raise InputError(f"batch_size must be 1 or more, or None for all in one call, not {batch_size!r}")
    if arguments.get("output_type", "pil") != "pil":
        raise InputError(f"{name} needs PIL images: omit output_type")
    for several in _SEVERAL:
        if arguments.get(several, 1) != 1:
            raise InputError(f"{name} draws one image: omit {several}")
    found = [part for part, value in components(model.pipeline).items() if isinstance(value, SchedulerMixin)]
    if found != ["scheduler"]:
        raise InputError(
            f"{name} needs a pipeline with one scheduler, but {type(model.pipeline).__name__} has "
            f"{', '.join(found) or 'none'}"
        )


def check_steps(steps: Steps) -> list[int | slice]:
    """Return the items that the user passed as steps, before the number of steps is known."""
    items = slice(None) if steps is None else unpacked(steps)
    if isinstance(items, str) or not isinstance(items, Iterable):
        items = [items]
    found = [_checked(item) for item in items]
    if not found:
        raise InputError("no steps are chosen: pass some, or omit steps")
    return found


def check_steps_ahead(steps: Steps, model: DiffusionModel, arguments: Mapping[str, Any]) -> list[int | slice]:
    """Return the items that the user passed as steps, and check that the run has them if its arguments determine how
    many it has."""
    items, count = check_steps(steps), count_steps(model, arguments)
    if count is not None:
        choose_steps(items, count)
    return items


def count_steps(model: DiffusionModel, arguments: Mapping[str, Any]) -> int | None:
    """Return the number of scheduler steps in a run with these arguments, or None if they do not determine it."""
    pipeline = model.pipeline
    given = {**call_defaults(pipeline), **arguments}
    asked, scheduler = as_integer(given.get("num_inference_steps")), getattr(pipeline, "scheduler", None)
    if asked is None or scheduler is None or any(given.get(name) is not None for name in _OTHER_STEPS):
        return None
    scheduler = copy.deepcopy(scheduler)
    shift = {"mu": 0.0} if "mu" in inspect.signature(scheduler.set_timesteps).parameters else {}
    try:
        scheduler.set_timesteps(asked, **shift)
    except Exception:  # the pipeline has its own way to set the timesteps
        return None
    return len(scheduler.timesteps)


def choose_steps(steps: Steps, count: int) -> tuple[int, ...]:
    """Return the chosen steps in order, each once, as non-negative integers.

    Args:
        steps: What the user passed: an integer, a slice, or a list of them. None means all.
        count: The number of steps of the run.
    """
    chosen: set[int] = set()
    for item in check_steps(steps):
        if isinstance(item, slice):
            chosen.update(range(count)[item])
        elif -count <= item < count:
            chosen.add(item % count)
        else:
            raise InputError(f"there is no step {item!r}: the run has {count} steps, 0 to {count - 1}")
    if not chosen:
        raise InputError(f"no steps are chosen: the run has {count} steps, 0 to {count - 1}")
    return tuple(sorted(chosen))


def _checked(step: Any) -> int | slice:
    found = as_slice(step) if isinstance(step, slice) else as_integer(step)
    if found is None:
        raise InputError(f"steps are integers or slices, not {step!r}")
    return found
