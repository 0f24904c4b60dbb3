"""A server's descriptions of its models: their configuration, without weights, and their entries in `/models`."""

import io
import tempfile
import zipfile
from copy import deepcopy
from pathlib import Path
from typing import Any

from diffusers import ModularPipeline

from diffsight import DiffusionModel
from diffsight.errors import InputError
from diffsight.gallery.serve.services import services_of
from diffsight.remote import VERSIONS


def configuration(model: Any) -> bytes:
    """Return the files from which a client builds the tree of a model, as a zip archive: configurations, tokenizers.

    Raises:
        InputError: This kind of model cannot be served.
    """
    with tempfile.TemporaryDirectory(prefix="diffsight-") as place:
        folder = Path(place)
        if isinstance(model, DiffusionModel):
            _save_pipeline(model.pipeline, folder)
        else:
            _save_language_model(model, folder)
        return _zipped(folder)


def description(name: str, model: Any) -> dict[str, Any]:
    """Return the entry of a model in `/models`."""
    kind = type(model).__name__
    if kind not in ("DiffusionModel", "LanguageModel"):
        raise InputError(f"{name}: a server can serve a DiffusionModel or a LanguageModel, but not {kind}")
    if kind == "DiffusionModel" and isinstance(model.pipeline, ModularPipeline):
        raise InputError(f"{name}: a modular pipeline cannot be served, because the state it returns cannot be sent")
    found: dict[str, Any] = {"name": name, "kind": kind, "versions": list(VERSIONS), "tree": repr(model)}
    names = {} if kind == "DiffusionModel" else (model.loaded_from or {}).get("names") or {}
    encoders = model.encoders if kind == "DiffusionModel" else {}
    texts = {name: str(encoder) for name, encoder in encoders.items()}
    return found | {"names": dict(names), "encoders": texts, "services": sorted(services_of(model))}


def _save_pipeline(pipeline: Any, folder: Path) -> None:
    pipeline.save_config(folder)
    for name, part in pipeline.components.items():
        place = folder / name
        if part is None:
            continue
        if hasattr(part, "dtype") and hasattr(part, "save_config"):  # a model of diffusers
            part.save_config(place)
        elif hasattr(part, "dtype") and hasattr(part, "config"):  # a model of transformers
            part.config.save_pretrained(place)
        else:
            part.save_pretrained(place)


def _save_language_model(model: Any, folder: Path) -> None:
    config = deepcopy(model.module.config)
    config.architectures = [type(model.module).__name__]
    config.save_pretrained(folder)
    generation = getattr(model.module, "generation_config", None)
    if generation is not None:
        generation.save_pretrained(folder)
    if model.tokenizer is not None:
        model.tokenizer.save_pretrained(folder)


def _zipped(folder: Path) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                archive.write(file, file.relative_to(folder))
    return data.getvalue()
