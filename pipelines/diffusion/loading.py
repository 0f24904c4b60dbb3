"""Open the diffusers pipeline that a user names: packaged, in a folder, on the hub, or live.

A pipeline that is not live is opened without weights: its modules are built from their configurations on the meta
device, which takes no time. The weights are loaded when they are first needed.
"""

import logging
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from importlib import import_module
from inspect import Parameter
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline, ModelMixin, ModularPipeline, ModularPipelineBlocks
from diffusers.utils import logging as diffusers_logging
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from diffsight.errors import InputError, suggest_packaged
from diffsight.pipelines.arguments import check_arguments, signature
from diffsight.pipelines.folder_checks import check_configurations, check_has_configuration, check_vocabulary
from diffsight.pipelines.hub_access import hub_access, hub_file
from diffsight.pipelines.loading_arguments import (
    check_modular_arguments,
    check_parts_of_dtypes,
    check_pipeline_arguments,
    with_dtypes,
)
from diffsight.pipelines.loading_errors import explained
from diffsight.pipelines.local_paths import find_path, shortened
from diffsight.pipelines.packaged import FOLDERS, LANGUAGE_MODELS
from diffsight.pipelines.quiet_loading import quiet_loading
from diffsight.pipelines.shapes.flux_defaults import set_defaults
from diffsight.pipelines.weights import (
    adopt,
    check_weights,
    requiring_all_weights,
    without_weights,
)

_OF_WEIGHTS = ("device_map", "max_memory", "offload_folder", "offload_state_dict", "quantization_config")
_LIBRARIES = ("diffusers", "transformers")  # the libraries that parts may come from
_OF_MODULAR = ("trust_remote_code", "components_manager", "collection", "workflow")
_OF_HUB = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "token")
_MODULAR_INDEX = "modular_model_index.json"
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")


Source = str | Path | DiffusionPipeline | ModularPipeline | ModularPipelineBlocks


def open_pipeline(
    source: Source, dispatch: bool = False, *, weights: bool = True, **arguments: Any
) -> tuple[DiffusionPipeline | ModularPipeline, Callable[[], None] | None]:
    """Open a pipeline.

    Args:
        source: A packaged name (`diffsight/shapes-clip`), a folder in the diffusers format, a hub id, the blocks of a
            modular pipeline, or a live pipeline, which is returned unchanged.
        dispatch: Whether to load the weights immediately.
        weights: Whether there are weights. If not, the modules stay empty.
        arguments: Passed to `DiffusionPipeline.from_pretrained`. For blocks, the components by name.

    Returns:
        The pipeline, and a function that loads its weights, or None if they are loaded.

    Raises:
        InputError: There is no such pipeline, or it takes no such argument (the message suggests similar names), or a
            part of it is missing.
    """
    if isinstance(source, ModularPipelineBlocks):
        return _of_blocks(source, arguments), None
    if isinstance(source, (DiffusionPipeline, ModularPipeline)):
        if arguments:
            raise InputError(f"{', '.join(arguments)} cannot be used with a pipeline that is already loaded")
        return source, None
    if not isinstance(source, (str, Path)):
        raise InputError(f"a pipeline is a name, a folder or a diffusers pipeline, not {type(source).__name__}")
    arguments = with_dtypes(arguments, of_pipeline=True)
    name = str(source)
    is_local = name.startswith("diffsight/") or find_path(name) is not None or not _HUB_ID.fullmatch(name)
    place = str(_folder(name)) if is_local else name
    explained = _explained_packaged if name in FOLDERS else _explained_folder if is_local else _explained_hub

    if not is_local:
        arguments = hub_access() | arguments
    if _is_modular(place, is_local, arguments):
        check_modular_arguments(arguments)
        with explained(name):
            check_configurations(Path(place))
            return _load_modular(place, arguments), None
    if weights and "quantization_config" in arguments:
        dispatch = True  # modules without weights cannot always adopt the classes of quantised modules
    is_quick = name in FOLDERS or not dispatch
    with explained(name), quiet_loading(transformers_logging, *([diffusers_logging] if is_quick else [])):
        check_configurations(Path(place))
        index = DiffusionPipeline.load_config(place, **_for_hub(arguments))
        known_class = _pipeline_class(index, arguments)
        _check_index(index, known_class, Path(place), arguments)
        if known_class is not None:
            check_pipeline_arguments(known_class, arguments)
        check_parts_of_dtypes(arguments, index)
        classes = _module_classes(index, place, arguments, weights)
        empty = {} if dispatch else _build_empty(classes, place, arguments)
        now = {key: value for key, value in arguments.items() if dispatch or key not in _OF_WEIGHTS}
        with requiring_all_weights():
            pipeline = DiffusionPipeline.from_pretrained(place, **now, **empty)
        check_pipeline_arguments(type(pipeline), arguments)
        for part, component in pipeline.components.items():
            if part not in arguments:
                check_vocabulary(Path(place), component, part)
    if name == "diffsight/shapes-flux":
        set_defaults(pipeline)
    if not empty or not weights:
        return pipeline, None

    def load() -> None:
        parts = {part: getattr(pipeline, part) for part in pipeline.components}
        lacking = [part for part, module in empty.items() if parts.get(part) is module]
        present = {part: value for part, value in parts.items() if part not in lacking}
        bars = [transformers_logging, *([diffusers_logging] if name in FOLDERS else [])]
        with explained(name), requiring_all_weights(), quiet_loading(*bars):
            loaded = DiffusionPipeline.from_pretrained(place, **{**arguments, **present})
        for part in lacking:
            adopt(empty[part], getattr(loaded, part))
        for attribute, value in vars(loaded).items():
            vars(pipeline).setdefault(attribute, value)

    return pipeline, load


# ---- modular pipelines


def _of_blocks(blocks: ModularPipelineBlocks, components: dict[str, Any]) -> ModularPipeline:
    """Return a pipeline made of blocks, with the given components."""
    pipeline = blocks.init_pipeline()
    check_arguments(type(blocks).__name__, components, pipeline.components)
    pipeline.update_components(**components)
    if not any(isinstance(part, nn.Module) for part in pipeline.components.values()):
        raise InputError(
            f"{type(blocks).__name__} has no components yet. Pass them by name, as in DiffusionModel(blocks, vae=vae): "
            f"{', '.join(pipeline.components)}"
        )
    return pipeline


def _is_modular(place: str, is_local: bool, arguments: dict[str, Any]) -> bool:
    """Return whether a folder or hub repository has only the index of a modular pipeline."""
    if is_local:
        return not (Path(place) / "model_index.json").is_file()
    return not hub_file(place, "model_index.json", arguments) and bool(hub_file(place, _MODULAR_INDEX, arguments))


def _load_modular(place: str, arguments: dict[str, Any]) -> ModularPipeline:
    """Load a modular pipeline from a folder or hub repository, with its weights."""
    trusts_code = bool(arguments.get("trust_remote_code"))
    index = ModularPipeline.load_config(place, **_for_hub(arguments))
    check_parts_of_dtypes(arguments, index)
    for name, entry in index.items():
        if isinstance(entry, (list, tuple)) and len(entry) == 3:
            library, kind = entry[2].get("type_hint") or entry[:2]
            cls = None if library is None else _class(name, library, kind, trusts_code)
            source = entry[2].get("pretrained_model_name_or_path")
            if cls is not None and source:
                check_has_configuration(Path(source), entry[2].get("subfolder") or "")
    of_loading = {key: arguments[key] for key in arguments if key not in _OF_MODULAR}
    of_index = {key: arguments[key] for key in (*_OF_MODULAR, *_OF_HUB) if key in arguments}
    pipeline = ModularPipeline.from_pretrained(place, **of_index)
    with requiring_all_weights():
        pipeline.load_components(**of_loading)
    specs = [pipeline.get_component_spec(name) for name in pipeline.null_component_names]
    missing = [spec.name for spec in specs if spec.pretrained_model_name_or_path]  # diffusers only logs a warning
    if missing:
        raise ValueError(f"these components could not be loaded: {', '.join(missing)}. The log says why")
    return pipeline


# ---- modules without weights


def _pipeline_class(index: dict[str, Any], arguments: dict[str, Any]) -> type | None:
    """Return the class that an index names, or None if it is not a diffusers class."""
    name = index.get("_class_name")
    found = getattr(diffusers, name, None) if isinstance(name, str) and "custom_pipeline" not in arguments else None
    return found if isinstance(found, type) and issubclass(found, DiffusionPipeline) else None


def _check_index(index: dict[str, Any], known_class: type | None, folder: Path, arguments: dict[str, Any]) -> None:
    """Raise ValueError, naming the entry, if an index does not name the pipeline's class, or a part of it.

    `folder` holds the file of a class of its own. Whether a hub repository does is not checked."""
    name = index.get("_class_name")
    words = name if isinstance(name, list) and name else [name]  # of a class in a file: the file and the class
    if "custom_pipeline" not in arguments and not all(isinstance(word, str) for word in words):
        given = f"contains {name!r} for '_class_name'" if "_class_name" in index else "has no '_class_name'"
        raise ValueError(f"its index {given}, which names the class of the pipeline")
    if "custom_pipeline" not in arguments and isinstance(name, list) and folder.is_dir():
        file = folder / f"{words[0]}.py"
        if not file.is_file():
            raise ValueError(f"its index names the class {words[-1]!r} in {file.name}, and there is no such file")
    found = getattr(diffusers, name, None) if isinstance(name, str) else None
    if isinstance(found, type) and not issubclass(found, (DiffusionPipeline, ModularPipeline)):
        raise ValueError(f"its index names the class {name!r}, which is not a pipeline")
    parameters = {} if known_class is None else signature(known_class.__init__).parameters
    optional = {name for name, parameter in parameters.items() if parameter.default is not Parameter.empty}
    settings = optional.difference(getattr(known_class, "_optional_components", ()))
    for part, entry in index.items():
        if part.startswith("_") or part in settings or part in arguments:
            continue
        if (part in parameters or isinstance(entry, (list, tuple))) and not _is_part(entry):
            raise ValueError(f"its index contains {entry!r} for {part!r} instead of a library and a class")


def _is_part(entry: Any) -> bool:
    is_pair = isinstance(entry, (list, tuple)) and len(entry) == 2
    return is_pair and (None in entry or all(isinstance(word, str) for word in entry))


def _module_classes(
    index: dict[str, Any], place: str, arguments: dict[str, Any], weights: bool
) -> dict[str, type[nn.Module]]:
    """Return the classes of the modules of the pipeline in a folder or hub repository, by name. `index` lists them.

    These are the modules that diffusers and transformers build from a configuration, except those that `arguments`
    contain. `weights` says whether there are weight files.

    Raises OSError if a module or its configuration is missing in a folder, and ValueError if a part needs code that may
    not be run."""
    classes = {}
    for name, entry in index.items():
        if name.startswith("_") or name in arguments or not _is_part(entry) or None in entry:
            continue
        cls = _class(name, *entry, bool(arguments.get("trust_remote_code")))
        if cls is not None:
            check_has_configuration(Path(place), name)
            if weights:
                check_weights(Path(place), name)
            classes[name] = cls
    return classes


def _build_empty(classes: dict[str, type[nn.Module]], place: str, arguments: dict[str, Any]) -> dict[str, nn.Module]:
    """Return modules of these classes without weights. Raises OSError if a configuration is missing."""
    of_hub = _for_hub(arguments)
    return {name: _build(cls, place, name, _dtype(arguments, name), of_hub) for name, cls in classes.items()}


def _for_hub(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: arguments[name] for name in _OF_HUB if name in arguments}


def _class(part: str, library: str, name: str, trusts_code: bool) -> type[nn.Module] | None:
    """Return the class of a component, if it is built from a configuration.

    Importing a module runs its code, so a module is not imported merely because a folder or repository names it."""
    if library in _LIBRARIES:
        module = import_module(library)
    else:
        module = getattr(diffusers.pipelines, library, sys.modules.get(library))
    if module is None and not trusts_code:
        raise ValueError(
            f"its part {part!r} is a {name} of {library!r}, which is neither diffusers nor transformers, and opening "
            "the pipeline would run that code. If you trust it, pass trust_remote_code=True, or import the module first"
        )
    found = getattr(module, name, None)
    return found if isinstance(found, type) and issubclass(found, (ModelMixin, PreTrainedModel)) else None


def _build(cls: type[nn.Module], place: str, name: str, dtype: torch.dtype | None, of_hub: dict) -> nn.Module:
    if issubclass(cls, PreTrainedModel):
        config = cls.config_class.from_pretrained(place, subfolder=name, **of_hub)
        with without_weights():
            return cls._from_config(config, **({"dtype": dtype} if dtype else {})).eval()
    config = cls.load_config(place, subfolder=name, **of_hub)
    with without_weights():
        module = cls.from_config(config).eval()
    if dtype:
        nn.Module.to(module, dtype)
        for path, part in module.named_modules():
            if path.rpartition(".")[2] in (cls._keep_in_fp32_modules or ()):
                part.to(torch.float32)
    return module


def _dtype(arguments: dict[str, Any], name: str) -> torch.dtype | None:
    """Return the dtype that the arguments of `from_pretrained` set for a component, if any."""
    dtype = arguments.get("dtype", arguments.get("torch_dtype"))
    if isinstance(dtype, dict):
        dtype = dtype.get(name, dtype.get("default", torch.float32))
    return dtype if isinstance(dtype, torch.dtype) else None


# ---- errors in the user's terms


def _explained_folder(name: str) -> AbstractContextManager[None]:
    return explained(f"the folder {name} cannot be loaded as a pipeline")


@contextmanager
def _explained_packaged(name: str) -> Iterator[None]:
    """Like `_explained_folder`, without diffusers' warning about a T5 where the pipeline's class expects a CLIP."""
    logger = logging.getLogger("diffusers.pipelines.pipeline_utils")
    logger.addFilter(_is_not_about_types)
    try:
        with _explained_folder(name):
            yield
    finally:
        logger.removeFilter(_is_not_about_types)


def _is_not_about_types(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("Expected types for text_encoder")


def _explained_hub(name: str) -> AbstractContextManager[None]:
    return explained(f"the model {name} cannot be loaded", _unknown(name))


def _folder(name: str) -> Path:
    """Return the folder of a packaged name or of a path."""
    if name in FOLDERS:
        return FOLDERS[name]
    if name in LANGUAGE_MODELS:
        raise InputError(f"{name} is a language model, not a pipeline: open it with LanguageModel({name!r})")
    folder = find_path(name)
    if name.startswith("diffsight/") or folder is None:
        raise InputError(_unknown(name))
    if not folder.is_dir():
        raise InputError(f"{name} is a file; pass the folder that holds model_index.json, or a name")
    if not any((folder / index).is_file() for index in ("model_index.json", _MODULAR_INDEX)):
        raise InputError(f"the folder {name!r} is not a pipeline, because it has no model_index.json")
    return folder


def _unknown(name: str) -> str:
    return (
        f"there is no model {shortened(name)!r}{suggest_packaged(name, FOLDERS)}. "
        f"Known: {', '.join(FOLDERS)}, a folder, or a hub id such as 'owner/name'"
    )
