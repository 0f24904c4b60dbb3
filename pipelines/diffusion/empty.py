"""Modules of a pipeline without weights, built from their configurations: on the meta device, in no time."""

from importlib import import_module
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate import init_empty_weights
from diffusers import DiffusionPipeline, ModelMixin
from torch import nn
from transformers import PreTrainedModel

from diffsight.pipelines.weights import check_weights

_OF_HUB = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "token")


def build_empty(place: str, arguments: dict[str, Any]) -> dict[str, nn.Module]:
    """The modules of the pipeline in the folder or hub repository `place`, by name, without weights: those that
    diffusers and transformers build from a configuration, and that `arguments`, of `from_pretrained`, do not give.

    Raises OSError where a configuration or, in a folder, a file of weights is missing."""
    of_hub = {name: arguments[name] for name in _OF_HUB if name in arguments}
    modules = {}
    for name, entry in DiffusionPipeline.load_config(place, **of_hub).items():
        if name.startswith("_") or name in arguments or not isinstance(entry, (list, tuple)) or None in entry:
            continue
        cls = _class(*entry)
        if cls is not None:
            modules[name] = _build(cls, place, name, _dtype(arguments, name), of_hub)
    return modules


def _class(library: str, name: str) -> type[nn.Module] | None:
    """The class of a component, where it is one that is built from a configuration."""
    try:
        found = getattr(getattr(diffusers.pipelines, library, None) or import_module(library), name, None)
    except ImportError:  # a component with code of its own, in its folder
        return None
    return found if isinstance(found, type) and issubclass(found, (ModelMixin, PreTrainedModel)) else None


def _build(cls: type[nn.Module], place: str, name: str, dtype: torch.dtype | None, of_hub: dict) -> nn.Module:
    check_weights(Path(place), name)
    if issubclass(cls, PreTrainedModel):
        config = cls.config_class.from_pretrained(place, subfolder=name, **of_hub)
        with init_empty_weights():
            return cls._from_config(config, **({"dtype": dtype} if dtype else {})).eval()
    config = cls.load_config(place, subfolder=name, **of_hub)
    with init_empty_weights():
        module = cls.from_config(config).eval()
    if dtype:
        nn.Module.to(module, dtype)
        for path, part in module.named_modules():
            if path.rpartition(".")[2] in (cls._keep_in_fp32_modules or ()):
                part.to(torch.float32)
    return module


def _dtype(arguments: dict[str, Any], name: str) -> torch.dtype | None:
    """The type of a component's weights that the arguments of `from_pretrained` ask for, if they do."""
    dtype = arguments.get("dtype", arguments.get("torch_dtype"))
    if isinstance(dtype, dict):
        dtype = dtype.get(name, dtype.get("default", torch.float32))
    return dtype if isinstance(dtype, torch.dtype) else None
