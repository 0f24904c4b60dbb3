"""Check the model of a lens and the options that are passed on to it, before anything runs."""

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from diffusers import DiffusionPipeline

from diffsight.errors import InputError
from diffsight.pipelines.arguments import check_arguments
from diffsight.pipelines.diffusion.model import DiffusionModel
from diffsight.pipelines.language.model import LanguageModel


def check_kind(lens: str, model: Any, kind: type[DiffusionModel] | type[LanguageModel]) -> None:
    """Raise InputError, saying what to write, if a lens is called with something other than a model of a kind."""
    if isinstance(model, kind):
        return
    hint = ""
    if isinstance(model, str):  # a prompt, or the name of a model
        hint = f": write {lens}(model, {model!r})" if " " in model else f": write {kind.__name__}({model!r})"
    elif isinstance(model, DiffusionPipeline) and kind is DiffusionModel:
        hint = ": write DiffusionModel(pipeline)"
    raise InputError(f"{lens} takes a {kind.__name__}, not {type(model).__name__}{hint}")


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
