"""The arguments of a pipeline's call: its signature or, for a modular pipeline, the inputs of its blocks.

call_defaults(pipeline)                             # {"prompt": None, "num_inference_steps": 50, …}
arguments_by_name(pipeline, ("a red circle",), {})  # {"prompt": "a red circle"}
"""

from collections.abc import Mapping
from typing import Any

from diffusers import ModularPipeline

from diffsight.errors import InputError
from diffsight.pipelines.argument_types import is_number
from diffsight.pipelines.arguments import check_arguments, named_arguments, signature


def call_defaults(pipeline: Any) -> dict[str, Any]:
    """Return the arguments that a pipeline declares, name to default. The default is None if there is none."""
    if isinstance(pipeline, ModularPipeline):
        return {given.name: given.default for given in pipeline._blocks.inputs if given.name is not None}
    parameters = signature(pipeline.__call__).parameters.values()
    return {p.name: None if p.default is p.empty else p.default for p in parameters}


def required_inputs(pipeline: ModularPipeline) -> list[str]:
    """Return the names of the inputs that all workflows of a modular pipeline require."""
    return [given.name for given in pipeline._blocks.inputs if given.required]


def argument_names(pipeline: Any) -> set[str]:
    """Return the names of all arguments that a pipeline takes, including those that it reads from its `**kwargs`."""
    if not isinstance(pipeline, ModularPipeline):
        return named_arguments(pipeline.__call__)
    dictionaries = {given.kwargs_type for given in pipeline._blocks.inputs if given.kwargs_type is not None}
    return {"state", "output", *call_defaults(pipeline), *dictionaries}


def arguments_by_name(pipeline: Any, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call by name.

    Raises:
        InputError: The pipeline has no such argument, or an argument is a text or a list where a number is declared.
    """
    name, known = type(pipeline).__name__, argument_names(pipeline)
    check_arguments(name, kwargs, known, near={"seed", "grad"})
    if args and isinstance(args[0], str) and not any("prompt" in argument for argument in known):
        raise InputError(f"{name} does not take a prompt")
    if isinstance(pipeline, ModularPipeline):
        if len(args) > 1 or (args and "prompt" in kwargs):
            raise InputError(
                f"{name} takes only the prompt by position: pass all other arguments by name, as in "
                "num_inference_steps=20"
            )
        arguments = {**dict(zip(["prompt"], args)), **kwargs}
    else:
        try:
            arguments = signature(pipeline.__call__).bind_partial(*args, **kwargs).arguments
        except TypeError as error:
            raise InputError(f"{name}: {error}") from None
    declared = _declared_types(pipeline)
    for argument, value in arguments.items():
        if isinstance(value, (str, bytes, list, tuple, Mapping)) and is_number(declared.get(argument)):
            raise InputError(f"{name}: {argument} must be a number, not {value!r}")
    return arguments


def _declared_types(pipeline: Any) -> dict[str, Any]:
    if isinstance(pipeline, ModularPipeline):
        return {given.name: given.type_hint for given in pipeline._blocks.inputs if given.name is not None}
    return {name: p.annotation for name, p in signature(pipeline.__call__).parameters.items()}
