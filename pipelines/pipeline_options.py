"""The options of transformers' pipelines, most of which accept any keyword and ignore those that they do not know.

check_options_of_call(pipeline, {"top_k": 3})       # fine for a text classifier
check_options_of_call(pipeline, {"topk": 3})        # InputError: … no argument 'topk' (did you mean 'top_k'?)

`_sanitize_parameters` tells: an option is named there, or it comes out for the step of the pipeline that gets it. What
is passed on to `generate`, a tokenizer or a processor has to be one of their arguments.
"""

from collections.abc import Mapping
from typing import Any

from transformers import Pipeline
from transformers.processing_utils import AudioKwargs, ImagesKwargs, TextKwargs, VideosKwargs

from diffsight.pipelines.arguments import check_arguments, named_arguments
from diffsight.pipelines.language.generation import generation_argument_names

_OF_PROCESSORS = (TextKwargs, ImagesKwargs, VideosKwargs, AudioKwargs)


def check_options_of_call(pipeline: Pipeline, options: Mapping[str, Any], near: set[str]) -> None:
    """Raise InputError if the call of a pipeline would ignore one of its options.

    Args:
        pipeline: The pipeline.
        options: The keyword arguments of the call.
        near: Other names that may have been meant.
    """
    known = {"num_workers", "batch_size"}
    known |= named_arguments(pipeline.__call__) | named_arguments(pipeline._sanitize_parameters)
    others = {name: value for name, value in options.items() if name not in known}
    if others:
        taken = _taken_further_on(pipeline)
        known |= taken & _passed_on(pipeline, others)
        near = near | taken
    check_arguments(type(pipeline).__name__, options, known, near)


def _passed_on(pipeline: Pipeline, options: dict[str, Any]) -> set[str]:
    """Return the options that come out of `_sanitize_parameters` for one of the steps of the pipeline."""
    try:
        return {name for parameters in pipeline._sanitize_parameters(**options) for name in parameters}
    except TypeError:  # it takes named options alone
        return set()


def _taken_further_on(pipeline: Pipeline) -> set[str]:
    """Return the names of the arguments of what a pipeline passes options on to."""
    taken = generation_argument_names(pipeline.model) if pipeline.model.can_generate() else set()
    if pipeline.tokenizer is not None:
        taken |= named_arguments(pipeline.tokenizer.__call__)
    if pipeline.processor is not None:
        taken |= named_arguments(pipeline.processor.__call__).union(*(kind.__annotations__ for kind in _OF_PROCESSORS))
    return taken
