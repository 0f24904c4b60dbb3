"""Finds the diffusers pipeline that a user names: packaged, in a folder, on the hub, or already there."""

import re
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

from diffsight.errors import InputError

_SHAPES = Path(__file__).parent / "shapes"
PACKAGED = {"diffsight/shapes-clip": _SHAPES / "clip"}
DESCRIPTIONS = {"diffsight/shapes-clip": "64 x 64 scenes of coloured shapes; CLIP text encoder, UNet, 6 M parameters"}
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")


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
    name = str(source)
    if name.startswith("diffsight/") or Path(name).expanduser().exists() or not _HUB_ID.fullmatch(name):
        folder = _folder(name)
        try:
            return DiffusionPipeline.from_pretrained(folder, **arguments)
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            reason = str(error).splitlines()[0]
            raise InputError(
                f"the folder {name} cannot be loaded as a pipeline: {type(error).__name__}: {reason}"
            ) from error
    try:
        return DiffusionPipeline.from_pretrained(name, **arguments)
    except OSError as error:  # what huggingface_hub raises where it finds nothing, or no network
        raise InputError(f"{_unknown(name)}. The hub: {str(error).split('. ')[0].splitlines()[0]}") from error


def _folder(name: str) -> Path:
    """The folder of a packaged name or of a path."""
    if name in PACKAGED:
        return PACKAGED[name]
    folder = Path(name).expanduser()
    if name.startswith("diffsight/") or not folder.exists():
        raise InputError(_unknown(name))
    if not folder.is_dir():
        raise InputError(f"{name} is a file; a pipeline is a folder with a model_index.json, or a name")
    if not (folder / "model_index.json").is_file():
        raise InputError(f"the folder {name!r} is not a pipeline: it has no model_index.json")
    return folder


def _unknown(name: str) -> str:
    short = {known.split("/")[-1]: known for known in PACKAGED}
    near = get_close_matches(name.split("/")[-1], short, n=1, cutoff=0.6)
    meant = f" (did you mean {short[near[0]]!r}?)" if near else ""
    return (
        f"there is no model {name!r}{meant}. Known: {', '.join(PACKAGED)}, a folder, or a hub id such as 'owner/name'"
    )
