"""Check the keyword arguments for loading a model, because most loading functions accept any keyword.

    check_pipeline_arguments(StableDiffusionPipeline, {"torch_dtype": dtype, "vae": vae})   # both are known
    check_pipeline_arguments(StableDiffusionPipeline, {"torch_type": dtype})                # InputError: … no argument

The names that `from_pretrained` reads from its `**kwargs` are found in its source code, see `named_arguments`.
"""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
import transformers
from diffusers import DiffusionPipeline, ModelMixin, ModularPipeline
from transformers import PreTrainedModel

from diffsight.errors import InputError, suggest
from diffsight.pipelines.arguments import check_arguments, named_arguments

UNTRUSTED = {"trust_remote_code": False}  # by default, transformers asks at the terminal whether to run the code
_OF_WRAPPERS = ("dispatch", "remote", "api_key")
_DTYPES = ("dtype", "torch_dtype")
_PLACE = "pretrained_model_name_or_path"


def check_pipeline_arguments(kind: type, given: Collection[str], loaded_by: type = DiffusionPipeline) -> None:
    """Raise InputError if `from_pretrained` would ignore an argument.

    Args:
        kind: The class of the pipeline in diffusers.
        given: The names of the arguments.
        loaded_by: The class whose `from_pretrained` is called.
    """
    if not given:  # the usual case; reading the source code takes 10 ms
        return
    known = arguments_of_init(kind).union(*(named_arguments(k.from_pretrained) for k in (DiffusionPipeline, loaded_by)))
    check_arguments(f"{kind.__name__}.from_pretrained", given, known - {_PLACE}, _OF_WRAPPERS)


def check_modular_arguments(given: Iterable[str]) -> None:
    """Raise InputError if a modular pipeline, which passes arguments on to its components, would ignore an argument."""
    loading = (ModularPipeline, ModelMixin, PreTrainedModel)
    known = named_arguments(ModularPipeline.load_components).union(
        *(named_arguments(k.from_pretrained) for k in loading)
    )
    check_arguments("ModularPipeline.from_pretrained", given, known - {_PLACE, "self"}, _OF_WRAPPERS)


def check_model_arguments(kind: type, config: transformers.PreTrainedConfig, given: Iterable[str]) -> None:
    """Raise InputError if transformers does not know one of the arguments for loading a model.

    Args:
        kind: The class of the model, or an auto class.
        config: Its configuration.
        given: The names of the arguments, except those that have changed the configuration.
    """
    fitting = kind._model_mapping[type(config)] if hasattr(kind, "_model_mapping") else kind
    classes = fitting if isinstance(fitting, tuple) else (fitting,)
    known = named_arguments(PreTrainedModel.from_pretrained) | named_arguments(transformers.AutoModel.from_pretrained)
    known = (known - {_PLACE}).union(*map(arguments_of_init, classes))
    near = {"tokenizer", "names", *_OF_WRAPPERS, *config.to_dict()}
    check_arguments(f"{classes[0].__name__}.from_pretrained", given, known, near.difference(given))


def with_dtypes(arguments: Mapping[str, Any], of_pipeline: bool = False) -> dict[str, Any]:
    """Return the arguments of `from_pretrained` with a dtype in place of its name, such as "float16".

    Args:
        arguments: The arguments.
        of_pipeline: Whether they are for a pipeline of diffusers, which takes a dictionary with a dtype for each part.
            Other models take "auto", the dtype that they were saved with.

    Raises:
        InputError: A dtype is not a floating-point dtype. diffusers would use float32.
    """
    given = {name: arguments[name] for name in _DTYPES if arguments.get(name) is not None}
    return {**arguments, **{name: _checked_dtype(name, value, of_pipeline) for name, value in given.items()}}


def check_parts_of_dtypes(arguments: Mapping[str, Any], index: Mapping[str, Any]) -> None:
    """Raise InputError if the dtypes are for a part that the index of a pipeline does not list."""
    parts = ["default", *(part for part in index if not part.startswith("_"))]
    for name in _DTYPES:
        given = arguments.get(name)
        unknown = next((part for part in given if part not in parts), None) if isinstance(given, Mapping) else None
        if unknown is not None:
            raise InputError(f"{name}: the pipeline has no part {unknown!r}{suggest(str(unknown), parts)}")


def _checked_dtype(name: str, value: Any, of_pipeline: bool) -> Any:
    if of_pipeline and isinstance(value, Mapping):
        return {part: _checked_dtype(f"{name}[{part!r}]", one, of_pipeline) for part, one in value.items()}
    if not of_pipeline and isinstance(value, str) and value == "auto":
        return value
    dtype = getattr(torch, value, None) if isinstance(value, str) else value
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise InputError(f"{name} must be a floating-point dtype, such as torch.float16 or 'float16', not {value!r}")
    return dtype


def arguments_of_init(kind: type) -> set[str]:
    """Return the names of the arguments of the constructor of a class and of its base classes."""
    return arguments_of_method(kind, "__init__")


def arguments_of_method(kind: type, name: str) -> set[str]:
    """Return the names of the arguments of a method of a class, and of the same method of its base classes."""
    own = (vars(base)[name] for base in kind.__mro__ if name in vars(base) and base is not object)
    return set().union(*map(named_arguments, own)) - {"self"}
