"""Open a model of any kind by its name, for commands that take all of them."""

import json
from pathlib import Path
from typing import Any

from diffsight.errors import InputError, suggest_packaged
from diffsight.pipelines.local_paths import find_path, shortened
from diffsight.pipelines.packaged import LANGUAGE_MODELS, PIPELINES

_INDICES = ("model_index.json", "modular_model_index.json")  # of pipelines


def open_model(source: str, **options: Any) -> Any:
    """Return the model with a name: a packaged name, a folder, a GGUF file or a hub id.

    `options` are passed to the class that opens it.

    Raises:
        InputError: There is no model with this name, or it takes no such option.
    """
    from diffsight import DiffusionModel, LanguageModel, VisionLanguageModel
    from diffsight.pipelines.hub_access import hub_access

    if source in PIPELINES:
        return DiffusionModel(source, **options)
    if source in LANGUAGE_MODELS or source.endswith(".gguf"):
        return LanguageModel(source, **options)
    folder = find_path(source)
    of_hub = hub_access() | options if folder is None else {}
    if any(_file(folder, source, index, of_hub) for index in _INDICES):
        return DiffusionModel(source, **options)
    config = _file(folder, source, "config.json", of_hub)
    if config is None:
        raise InputError(_not_found(source, folder))
    return (VisionLanguageModel if _sees_images(config) else LanguageModel)(source, **options)


def load_quietly() -> None:
    """Turn off the progress bars for loading: lenses have their own."""
    import diffusers
    import transformers

    diffusers.logging.disable_progress_bar()
    transformers.logging.disable_progress_bar()


def _file(folder: Path | None, source: str, name: str, of_hub: dict[str, Any]) -> Path | None:
    """Return a file of a folder, or of a repository on the hub if there is no folder. None if it does not exist."""
    from diffsight.pipelines.hub_access import hub_file

    if folder is None:
        return None if source.startswith("diffsight/") else hub_file(source, name, of_hub)
    return folder / name if (folder / name).is_file() else None


def _not_found(source: str, folder: Path | None) -> str:
    from diffsight.pipelines.loading_errors import hub_says

    if folder is not None:
        return f"there is no model in {shortened(source)}: it has neither model_index.json nor config.json"
    known = PIPELINES | LANGUAGE_MODELS
    asked = "/" in source and not source.startswith("diffsight/")
    return (
        f"there is no model {shortened(source)!r}{suggest_packaged(source, known)}. Known: {', '.join(known)}, a "
        "folder, a .gguf file, or a hub id such as 'owner/name'"
        + (f". {hub_says('it has no such repository, or does not let you read it')}" if asked else "")
    )


def _sees_images(config: Path) -> bool:
    try:
        return "vision_config" in json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
