"""Check the options of a lens that are passed on to a model, before anything runs."""

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from diffsight.pipelines.arguments import check_arguments
from diffsight.pipelines.diffusion.model import DiffusionModel
from diffsight.pipelines.language.model import LanguageModel


def check_options(
    lens: Callable,
    model: LanguageModel | DiffusionModel | None,
    options: Mapping[str, Any],
    also: Iterable[str] = (),
) -> None:
    """Raise InputError, suggesting similar names, for an option that neither a lens nor its model accepts.

    Args:
        lens: The lens.
        model: The model. None if the lens passes no options on.
        options: What was passed beyond the lens's own options.
        also: Other names that are passed on.
    """
    own = inspect.signature(lens).parameters
    check_arguments(lens.__name__, options, {*also, *(() if model is None else model.argument_names)}, near=own)
