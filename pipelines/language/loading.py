"""Open the language model that a user names: packaged, in a folder or a GGUF file, on the hub, or live.

A model that is not live is built from its configuration, without weights. They are loaded when they are first needed.
"""

import re
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from diffsight.errors import InputError, suggest_packaged
from diffsight.extending import unwrapped, wrapped_path
from diffsight.pipelines.folder_checks import check_configurations, check_vocabulary
from diffsight.pipelines.hub_access import hub_access
from diffsight.pipelines.language.gguf import load_gguf
from diffsight.pipelines.language.smollm2 import packaged_folder
from diffsight.pipelines.language.text_configs import WRITES, text_config
from diffsight.pipelines.loading_arguments import UNTRUSTED, check_model_arguments, with_dtypes
from diffsight.pipelines.loading_errors import explained, first_line, reason_of
from diffsight.pipelines.local_paths import find_path, shortened
from diffsight.pipelines.packaged import LANGUAGE_MODELS, PIPELINES
from diffsight.pipelines.weights import (
    adopt,
    check_weights,
    requiring_all_weights,
    without_weights,
)

_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")

Source = str | Path | nn.Module | tuple[nn.Module, Any]


def open_language_model(
    source: Source, tokenizer: Any = None, *, weights: bool = True, **arguments: Any
) -> tuple[nn.Module, Any, Callable[[], None] | None]:
    """Open a language model.

    Args:
        source: A packaged name (`diffsight/smollm2`), a folder, a GGUF file, a hub id, a live model, or a live
            `(model, tokenizer)`.
        tokenizer: A tokenizer, live or by name, that replaces the model's own.
        weights: Whether there are weights. If not, the model stays empty.
        arguments: Passed to the model's `from_pretrained`.

    Returns:
        The model, its tokenizer or None, and a function that loads the weights, or None if there is nothing to load.

    Raises:
        InputError: The model does not exist, or does not take one of the arguments. The message suggests similar names.
    """
    if isinstance(source, tuple):
        if len(source) != 2 or tokenizer is not None:
            raise InputError("pass a live model with one tokenizer: (model, tokenizer)")
        source, tokenizer = source
    if isinstance(source, nn.Module):
        if not hasattr(source, "config"):
            if hasattr(unwrapped(source), "config"):
                raise InputError(
                    f"a {type(source).__name__} hides the {type(unwrapped(source)).__name__} in it: pass that, as in "
                    f"net.{wrapped_path(source)}"
                )
            raise InputError(
                f"a language model is a transformers model with a configuration, and {type(source).__name__} has none: "
                "diffsight.Model(module) opens any module"
            )
        if arguments:
            raise InputError(f"{', '.join(arguments)} cannot be used with a model that is already loaded")
        return source, _tokenizer(tokenizer), None
    if not isinstance(source, (str, Path)):
        raise InputError(
            f"a language model is a name, a folder, a GGUF file or a live model, not {type(source).__name__}"
        )
    name = str(source)
    place, gguf = _place(name)
    arguments = with_dtypes(gguf | _usual(place) | arguments)
    with _explained(name, place):
        check_configurations(Path(place))
        config, kind = _checked(place, arguments)
        if weights:
            check_weights(Path(place), arguments.get("subfolder", ""))
        is_quantised = weights and "quantization_config" in arguments
        if is_quantised:  # modules without weights cannot always adopt the classes of its modules
            with requiring_all_weights():
                opened = _load_model(place, arguments)
        else:
            opened = _build_empty(config, kind, arguments)

    def load() -> None:
        with _explained(name, place), requiring_all_weights():
            loaded = _load_model(place, arguments)
        adopt(opened, loaded)

    tokenizer = _tokenizer(tokenizer) if tokenizer is not None else _own_tokenizer(place, gguf, arguments)
    return opened, tokenizer, load if weights and not is_quantised else None


def _build_empty(config: Any, kind: Any, arguments: dict[str, Any]) -> nn.Module:
    """Return the model without weights, on the meta device."""
    build = kind.from_config if hasattr(kind, "from_config") else kind._from_config
    code = {name: arguments[name] for name in ("trust_remote_code", "code_revision") if name in arguments}
    with without_weights():
        model = build(config, **(code if hasattr(kind, "from_config") else {})).eval()
    model.tie_weights()
    return model


def _load_model(place: str, arguments: dict[str, Any]) -> nn.Module:
    """Return the model with its weights."""
    kind = _kind(_configuration(place, arguments)[0])
    return (load_gguf if "gguf_file" in arguments else kind.from_pretrained)(place, **arguments)


def check_loading(source: Source, arguments: Mapping[str, Any]) -> None:
    """Raise InputError if a model in a folder or on the hub does not take the arguments. Reads its configuration."""
    if arguments and isinstance(source, (str, Path)):
        place, gguf = _place(str(source))
        with _explained(str(source), place):
            check_configurations(Path(place))
            _checked(place, with_dtypes(gguf | _usual(place) | arguments))


def _checked(place: str, arguments: dict[str, Any]) -> tuple[Any, Any]:
    """Return the model's configuration and class. Raise InputError if it does not take the arguments."""
    config, others = _configuration(place, arguments)
    layers = getattr(text_config(config, WRITES), "num_hidden_layers", None)
    if isinstance(layers, int) and layers < 0:
        raise ValueError(f"its configuration has {layers} layers")
    kind = _kind(config)
    is_known = not hasattr(kind, "_model_mapping") or type(config) in kind._model_mapping
    has_own_code = kind.__name__ in (getattr(config, "auto_map", None) or {}) and arguments.get("trust_remote_code")
    if is_known and not has_own_code:  # code of its own may take anything
        check_model_arguments(kind, config, others)
    return config, kind


def _configuration(place: str, arguments: dict[str, Any]) -> tuple[Any, list[str]]:
    """Return the model's configuration, changed by the arguments of `from_pretrained`, and the names of the arguments
    that do not change it."""
    if isinstance(arguments.get("config"), transformers.PreTrainedConfig):
        return deepcopy(arguments["config"]), list(arguments)
    types = {name: arguments[name] for name in ("dtype", "torch_dtype") if name in arguments}
    others = {name: value for name, value in arguments.items() if name not in types}
    config, unused = transformers.AutoConfig.from_pretrained(place, return_unused_kwargs=True, **others)
    for dtype in types.values():
        if isinstance(dtype, torch.dtype):
            config.dtype = dtype
    return config, [name for name in others if name in unused]


def _kind(config: Any) -> Any:
    """Return the class that the model was saved as, or else an auto class that fits its configuration."""
    saved_as = getattr(transformers, (config.architectures or [""])[0], None)
    if saved_as is not None:
        return saved_as
    kinds = ["AutoModelForSeq2SeqLM"] if config.is_encoder_decoder else ["AutoModelForCausalLM", "AutoModelForMaskedLM"]
    for kind in (*kinds, "AutoModelForImageTextToText", "AutoModel"):
        auto = getattr(transformers, kind)
        if type(config) in auto._model_mapping or getattr(config, "auto_map", None):
            return auto
    raise ValueError(f"transformers has no language model for a {type(config).__name__}")


def _own_tokenizer(place: str, gguf: dict[str, str], arguments: dict[str, Any]) -> Any:
    """Return the tokenizer saved with the model, or None if there is none."""
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(place, **gguf, **hub_arguments(arguments))
        if not gguf:
            check_vocabulary(Path(place), tokenizer)
        return tokenizer
    except Exception as error:  # the library for damaged files raises plain exceptions
        if any(Path(place).glob("tokenizer*")) or "trust_remote_code" in str(error):
            raise InputError(
                f"the tokenizer in {place} cannot be loaded: {reason_of(error)}. "
                "Pass another one, as in LanguageModel(place, tokenizer=tokenizer)"
            ) from error
        return None


def _usual(place: str | Path) -> dict[str, Any]:
    """Return the arguments of `from_pretrained` that users rarely pass."""
    return UNTRUSTED | ({} if find_path(place) else hub_access())


def hub_arguments(arguments: Mapping[str, Any], *more: str) -> dict[str, Any]:
    """Return the arguments of `from_pretrained` that select a place on the hub, and the arguments named in `more`."""
    kept = ("trust_remote_code", "revision", "token", "cache_dir", "local_files_only", *more)
    return {name: value for name, value in arguments.items() if name in kept}


def _tokenizer(given: Any) -> Any:
    if isinstance(given, (str, Path)):
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(given, **_usual(given))
            check_vocabulary(Path(given), tokenizer)
            return tokenizer
        except Exception as error:
            hint = ". Load it yourself, and pass the tokenizer" if "trust_remote_code" in str(error) else ""
            raise InputError(f"there is no tokenizer {str(given)!r}: {first_line(error)}{hint}") from error
    if given is not None and not callable(given):
        raise InputError(f"a tokenizer is a name, a folder or a transformers tokenizer, not {type(given).__name__}")
    return given


# ---- places


def place_of(source: str | Path) -> str:
    """Return the folder or hub id that a name stands for. Raise InputError if there is none."""
    return _place(str(source))[0]


def _place(name: str) -> tuple[str, dict[str, str]]:
    """Return the folder or hub id that a name stands for, and the GGUF file in it as an argument."""
    if name in LANGUAGE_MODELS:
        return str(packaged_folder()), {}
    path = find_path(name) or Path(name)
    if find_path(name) is not None and path.is_file():
        if path.suffix != ".gguf":
            raise InputError(f"{name} is a file, but a language model is a folder, a .gguf file, or a name")
        return str(path.parent), {"gguf_file": path.name}
    if find_path(name) is not None and path.is_dir():
        if not (path / "config.json").is_file():
            raise InputError(f"the folder {name!r} is not a language model, because it has no config.json{_hint(path)}")
        return str(path), {}
    if name.startswith("diffsight/") or not _HUB_ID.fullmatch(name):
        raise InputError(_unknown(name))
    return name, {}


def _hint(folder: Path) -> str:
    """Return what to open instead of a folder without a configuration."""
    if (folder / "adapter_config.json").is_file():
        return (
            ". It is an adapter, so load it with its model, as in "
            f"AutoModelForCausalLM.from_pretrained({str(folder)!r}), and pass the live (model, tokenizer)"
        )
    found = sorted(folder.glob("*.gguf"))
    return f"; it has {found[0].name}: name that file" if found else ""


# ---- errors in the user's terms


def _explained(name: str, place: str) -> AbstractContextManager[None]:
    if name not in LANGUAGE_MODELS and find_path(place) is None:
        return explained(f"the model {name} cannot be loaded", _unknown(name))
    what = "file" if (path := find_path(name)) is not None and path.is_file() else "folder"
    return explained(f"the {what} {name} cannot be loaded as a language model")


def _unknown(name: str) -> str:
    if name in PIPELINES:
        return f"{name} is a diffusion pipeline, not a language model: open it with DiffusionModel({name!r})"
    return (
        f"there is no language model {shortened(name)!r}{suggest_packaged(name, LANGUAGE_MODELS)}. "
        f"Known: {', '.join(LANGUAGE_MODELS)}, a folder, a .gguf file, a live "
        "(model, tokenizer), or a hub id such as 'openai-community/gpt2'"
    )
