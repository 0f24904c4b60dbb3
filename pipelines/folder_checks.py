"""Check small files in a model's folder whose errors the libraries report misleadingly or not at all.

transformers replaces a missing vocabulary with an empty one, and the missing configuration of a part of a pipeline with
the default of its class. It mistakes a configuration that is not a dictionary for the name of a model on the hub.
"""

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

_CONFIGURATIONS = ("config.json", "*_config.json", "*model_index.json")


def check_configurations(folder: Path) -> None:
    """Raise ValueError if a configuration in a folder, or in the folders in it, does not hold a dictionary.

    If `folder` is not a folder but the name of a repository, nothing is checked."""
    for place in (folder, *(part for part in folder.glob("*") if part.is_dir())):
        for file in sorted({file for pattern in _CONFIGURATIONS for file in place.glob(pattern) if file.is_file()}):
            try:
                found = json.loads(file.read_text(encoding="utf-8"))
            except ValueError:
                raise ValueError(f"{file} is not valid JSON") from None
            if not isinstance(found, dict):
                raise ValueError(f"{file} holds a {type(found).__name__}, not a dictionary")


def check_has_configuration(folder: Path, part: str) -> None:
    """Raise OSError if a part of a model folder, a module, has no configuration.

    If `folder` is not a folder but the name of a repository, nothing is checked."""
    if folder.is_dir() and not (folder / part / "config.json").is_file():
        raise OSError(f"there is no config.json in {folder / part}")


def check_vocabulary(folder: Path, loaded: Any, part: str = "") -> None:
    """Raise OSError if a tokenizer, or the one in a processor, was loaded from a model folder, or from a part of it,
    without its vocabulary files.

    If `folder` is not a folder but the name of a repository, nothing is checked."""
    tokenizer = getattr(loaded, "tokenizer", loaded)
    if not folder.is_dir() or not isinstance(tokenizer, PreTrainedTokenizerBase):
        return
    own = type(tokenizer).vocab_files_names.values()  # empty if the tokens are bytes
    files = dict.fromkeys(("tokenizer.json", *own))  # any tokenizer can be saved as tokenizer.json
    if own and not any((folder / part / file).is_file() for file in files):
        raise OSError(
            f"the tokenizer in {folder / part} has no vocabulary: it has none of the files {', '.join(files)}"
        )
