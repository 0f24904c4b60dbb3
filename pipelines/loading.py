"""Finds the diffusers pipeline that a user names: packaged, in a folder, on the hub, or already there."""

import re
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

from diffsight.errors import InputError, suggest

_SHAPES = Path(__file__).parent / "shapes"
PACKAGED = {"diffsight/shapes-clip": _SHAPES / "clip"}
DESCRIPTIONS = {"diffsight/shapes-clip": "64 x 64 scenes of coloured shapes; CLIP text encoder, UNet, 6 M parameters"}
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def load_pipeline(source: str | Path | DiffusionPipeline, **arguments: Any) -> DiffusionPipeline:
    """The pipeline named by `source`: a packaged name (`diffsight/shapes-clip`), a folder in the diffusers format, a
    hub id, or a live pipeline, which is given back as it is. `arguments` go to `from_pretrained`.

    Raises InputError where there is no such pipeline, with near names."""
    if isinstance(source, DiffusionPipeline):
        if arguments:
            raise InputError(f"a live pipeline is already loaded; it takes no {', '.join(arguments)}")
        return source
    if not isinstance(source, (str, Path)):
        raise InputError(f"a pipeline is a name, a folder or a diffusers pipeline, not {type(source).__name__}")
    return (
        DiffusionPipeline.from_pretrained(_find(str(source)), **arguments)
        if _is_local(source)
        else _from_hub(str(source), arguments)
    )


def _is_local(source: str | Path) -> bool:
    name = str(source)
    return name.startswith("diffsight/") or Path(name).expanduser().exists() or not _HUB_ID.fullmatch(name)


def _find(name: str) -> Path:
    """The folder of a packaged name or of a path."""
    if name in PACKAGED:
        return PACKAGED[name]
    folder = Path(name).expanduser()
    if not name.startswith("diffsight/") and folder.is_dir():
        if (folder / "model_index.json").is_file():
            return folder
        raise InputError(f"the folder {name} is not a pipeline: it has no model_index.json")
    if not name.startswith("diffsight/") and folder.exists():
        raise InputError(f"{name} is a file; a pipeline is a folder with a model_index.json, or a name")
    raise InputError(_unknown(name))


def _from_hub(name: str, arguments: dict[str, Any]) -> DiffusionPipeline:
    try:
        return DiffusionPipeline.from_pretrained(name, **arguments)
    except OSError as error:  # what huggingface_hub raises where it finds nothing, or no network
        raise InputError(f"{_unknown(name)}. Asked on the hub: {str(error).splitlines()[0]}") from error


def _unknown(name: str) -> str:
    near = suggest(name, PACKAGED) or suggest(f"diffsight/{name.split('/')[-1]}", PACKAGED)
    return f"there is no model {name!r}{near}. Known: {', '.join(PACKAGED)}, a folder, or a hub id such as 'owner/name'"
