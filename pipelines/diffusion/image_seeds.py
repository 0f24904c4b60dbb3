"""Check that each image of a seeded call is the image of a call of its own with that seed.

A pipeline that encodes one given image for several results draws for it from the first generator alone. The generators
of the others then stand elsewhere than in a call of their own.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from diffsight.errors import InputError
from diffsight.extending import ChangedMethod
from diffsight.pipelines.diffusion.call_arguments import argument_names
from diffsight.pipelines.diffusion.call_errors import is_of_pipeline
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
