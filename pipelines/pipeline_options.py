"""Check the options of transformers pipelines, most of which accept any keyword and ignore unknown ones.

check_options_of_call(pipeline, {"top_k": 3})       # fine for a text classifier
check_options_of_call(pipeline, {"topk": 3})        # InputError: … no argument 'topk' (did you mean 'top_k'?)
check_options_of_loading("text-generation", {"model": folder, "bananas": 3})    # the same, before anything is loaded

An option is known if `_sanitize_parameters` declares it or returns it for a step of the pipeline. Options that are
passed on to `generate`, a tokenizer or a processor must be arguments of that function.
"""

from collections.abc import Mapping
from importlib import import_module
from typing import Any

import transformers
from torch import nn
from transformers import GenerationConfig, GenerationMixin, Pipeline, PreTrainedTokenizerBase
from transformers.pipelines import PIPELINE_REGISTRY
from transformers.processing_utils import AudioKwargs, ImagesKwargs, TextKwargs, VideosKwargs

from diffsight.pipelines.arguments import check_arguments, named_arguments
from diffsight.pipelines.language.generation import generation_argument_names
from diffsight.pipelines.loading_arguments import UNTRUSTED, arguments_of_init, arguments_of_method

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


def check_options_of_loading(task: str, options: Mapping[str, Any]) -> None:
    """Raise InputError if no pipeline of a task takes one of the options. Only a configuration is loaded for this.

    `check_options_of_opened` finds options that are ignored only with a particular model and tokenizer."""
    try:
        kind = options.get("pipeline_class") or PIPELINE_REGISTRY.check_task(task)[1]["impl"]
    except KeyError:  # transformers knows aliases of the task
        return
    if isinstance(kind, str):
        module, _, name = kind.rpartition(".")
        kind = getattr(import_module(module), name)
    known = _of_loading(kind) | arguments_of_method(kind, "_sanitize_parameters") | {"num_workers", "batch_size"}
    known |= named_arguments(PreTrainedTokenizerBase.__call__).union(*(own.__annotations__ for own in _OF_PROCESSORS))
    if kind._pipeline_calls_generate:
        known |= {*vars(GenerationConfig()), *named_arguments(GenerationMixin.generate)}
        if known.issuperset(options):
            return
        model = _model_class(options)
        if model is None:
            return
        known |= named_arguments(model.forward)
    check_arguments(kind.__name__, options, known - {"self"})


def check_options_of_opened(pipeline: Pipeline, options: Mapping[str, Any]) -> None:
    """Raise InputError if a pipeline will ignore one of the options it was opened with."""
    taken = _of_loading(type(pipeline)) | set(getattr(pipeline, "_generate_kwargs", ()))
    others = {name: value for name, value in options.items() if name not in taken}
    check_options_of_call(pipeline, others, near=_of_loading(type(pipeline)))


def _of_loading(kind: type[Pipeline]) -> set[str]:
    """Return the names of the arguments of `transformers.pipeline` and of the pipeline class that it instantiates."""
    return named_arguments(transformers.pipeline) | arguments_of_init(kind)


def _model_class(options: Mapping[str, Any]) -> type[nn.Module] | None:
    """Return the class of the model in the options of a pipeline, or None if it cannot be found."""
    model = options.get("model")
    if isinstance(model, nn.Module):
        return type(model)
    place = options.get("config") or model
    if place is None:
        return None
    hub = UNTRUSTED | {name: options[name] for name in ("revision", "token", "trust_remote_code") if name in options}
    given = isinstance(place, transformers.PreTrainedConfig)
    config = place if given else transformers.AutoConfig.from_pretrained(place, **hub)
    return getattr(transformers, (config.architectures or [""])[0], None)


def _passed_on(pipeline: Pipeline, options: dict[str, Any]) -> set[str]:
    """Return the options that `_sanitize_parameters` returns for the steps of the pipeline."""
    try:
        return {name for parameters in pipeline._sanitize_parameters(**options) for name in parameters}
    except TypeError:  # it takes only named options
        return set()


def _taken_further_on(pipeline: Pipeline) -> set[str]:
    """Return the names of the arguments of the functions that a pipeline passes options on to."""
    taken = generation_argument_names(pipeline.model) if pipeline.model.can_generate() else set()
    if pipeline.tokenizer is not None:
        taken |= named_arguments(pipeline.tokenizer.__call__)
    if pipeline.processor is not None:
        taken |= named_arguments(pipeline.processor.__call__).union(*(kind.__annotations__ for kind in _OF_PROCESSORS))
    return taken
