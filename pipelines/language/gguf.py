"""GGUF files: load one, or convert it to a folder that loads in seconds."""

import tempfile
from pathlib import Path

import transformers
from torch import nn


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
