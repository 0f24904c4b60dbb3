"""Make sure that each image of a seeded call is the image of a call of its own with that seed.

A pipeline that encodes one given image for several results draws for it from the first generator alone. The generators
of the others then stand elsewhere than in a call of their own, which is an error.

Many pipelines do not pass their generators on to the scheduler. If it draws noise, as those for stochastic sampling do,
the noise of all images would come from one stream, so it is given the generators.
"""

import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from types import ModuleType
from typing import Any

import torch
from diffusers import SchedulerMixin

from diffsight.errors import InputError
from diffsight.extending import ChangedMethod
from diffsight.pipelines.diffusion.call_arguments import argument_names
from diffsight.pipelines.diffusion.call_errors import is_of_pipeline
from diffsight.pipelines.diffusion.pipeline_copies import stateful_parts
from diffsight.pipelines.diffusion.run import with_progress_bars
from diffsight.pipelines.seeds import have_drawn_alike


@contextmanager
def images_kept_apart(pipeline: Any, generators: Sequence[torch.Generator]) -> Iterator[None]:
    """Raise InputError if a pipeline draws more from some of its generators than from others.

    This is checked when it begins to loop over its steps, and at the end of the block. Some pipelines fail before their
    loop if they were not given an image for each generator."""
    is_looping = False

    def check() -> None:
        if not have_drawn_alike(generators):
            raise InputError(
                _refusal(pipeline, len(generators), "it draws more from some of the seeds than from others")
            )

    def checking(progress_bar: Callable[..., Any]) -> Callable[..., Any]:
        def checked(*args: Any, **kwargs: Any) -> Any:
            nonlocal is_looping
            check()
            is_looping = True
            return progress_bar(*args, **kwargs)

        return checked

    with ExitStack() as changes:
        for part in with_progress_bars(pipeline):
            changes.callback(ChangedMethod(part, "progress_bar", checking).remove)
        try:
            yield
        except (IndexError, ValueError) as error:
            if is_looping or not _is_about_images(error):
                raise
            raise InputError(_refusal(pipeline, len(generators), str(error).rstrip("."))) from error
        check()


_call: ContextVar[tuple[Any, list[torch.Generator]] | None] = ContextVar("diffsight_call", default=None)


@contextmanager
def noise_of_schedulers_seeded(pipeline: Any, generators: Sequence[torch.Generator]) -> Iterator[None]:
    """Draw the noise that the schedulers of a pipeline draw without a generator from those of the images.

    Raises InputError if several generators are given, and the noise is not that of one image for each of them."""
    before = _call.set((pipeline, [*generators]))  # in the run's own context
    try:
        with ExitStack() as changes:
            for module in _drawing_modules(pipeline):
                changes.callback(ChangedMethod(module, "randn_tensor", _seeding).remove)
            yield
    finally:
        _call.reset(before)


def _seeding(randn_tensor: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Return a function `randn_tensor` that draws from the generators of the run that calls it."""

    @functools.wraps(randn_tensor)
    def seeded(shape: Sequence[int], generator: Any = None, *args: Any, **kwargs: Any) -> torch.Tensor:
        call = _call.get()
        if generator is None and call is not None:
            pipeline, generator = call
            if len(generator) not in (1, shape[0]):
                reason = f"its scheduler draws noise for {shape[0]} of them"
                raise InputError(_refusal(pipeline, len(generator), reason))
        return randn_tensor(shape, generator, *args, **kwargs)

    return seeded


def _drawing_modules(pipeline: Any) -> set[ModuleType]:
    """Return the modules of Python with the code of the schedulers that draws noise."""
    schedulers = [part for part in stateful_parts(pipeline) if isinstance(part, SchedulerMixin)]
    modules = {sys.modules.get(cls.__module__) for scheduler in schedulers for cls in type(scheduler).__mro__}
    return {module for module in modules if hasattr(module, "randn_tensor")}


def _is_about_images(error: Exception) -> bool:
    """Return whether a pipeline has failed because it has more generators than images. It counts through both, or
    compares their numbers."""
    return is_of_pipeline(error) and (isinstance(error, IndexError) or "list of generators" in str(error))


def _refusal(pipeline: Any, count: int, reason: str) -> str:
    given = [name for name in ("prompt", "image", "video") if name in argument_names(pipeline)]
    listed = ", ".join(f"{name}=[{name}] * {count}" for name in given)
    advice = f", or pass one of each given input for each seed ({listed}) if the pipeline takes that" if given else ""
    title = type(pipeline).__name__
    return f"{title} cannot draw from {count} seeds in this call: {reason}. Draw from one seed in each run{advice}"
