"""Open a model of any kind by its name, for commands that take all of them."""

import json
from pathlib import Path
from typing import Any

from diffsight.errors import InputError
from diffsight.pipelines.local_paths import find_path
from diffsight.pipelines.packaged import LANGUAGE_MODELS, PIPELINES


def open_model(source: str, **options: Any) -> Any:
    """Return the model with a name: a packaged name, a folder, a GGUF file or a hub id.

    `options` are passed to the class that opens it.

    Raises:
        InputError: There is no model with this name.
    """
    from diffsight import DiffusionModel, LanguageModel, VisionLanguageModel

    path = find_path(source)
    if source in PIPELINES or (path is not None and (path / "model_index.json").is_file()):
        return DiffusionModel(source, **options)
    if source in LANGUAGE_MODELS or source.endswith(".gguf"):
        return LanguageModel(source, **options)
    if path is not None and (path / "config.json").is_file():
        return (
            VisionLanguageModel(source, **options)
            if _sees_images(path / "config.json")
            else LanguageModel(source, **options)
        )
    try:
        return DiffusionModel(source, **options)
    except InputError:
        if path is not None or source.startswith("diffsight/"):
            raise
    return LanguageModel(source, **options)


def load_quietly() -> None:
    """Turn off the progress bars for loading: lenses have their own."""
    import diffusers
    import transformers

    diffusers.logging.disable_progress_bar()
    transformers.logging.disable_progress_bar()


def _sees_images(config: Path) -> bool:
    try:
        return "vision_config" in json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
