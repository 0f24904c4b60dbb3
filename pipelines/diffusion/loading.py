"""Finds the diffusers pipeline that a user names: packaged, in a folder, on the hub, or already there.

One that is not there yet is opened without the weights of its modules, which are built from their configurations alone;
they are loaded when they are needed.
"""

import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

from diffsight.errors import InputError, suggest_packaged
from diffsight.pipelines.diffusion.empty import build_empty
from diffsight.pipelines.shapes.flux_defaults import set_defaults
from diffsight.pipelines.weights import adopt

_SHAPES = Path(__file__).parents[1] / "shapes"
PACKAGED = {f"diffsight/shapes-{name}": _SHAPES / name for name in ("clip", "t5", "flux")}
DESCRIPTIONS = {
    "diffsight/shapes-clip": "64 x 64 scenes of coloured shapes; CLIP text encoder, UNet, 6 M parameters",
    "diffsight/shapes-t5": "the same scenes; T5 text encoder, UNet, 6 M parameters",
    "diffsight/shapes-flux": "the same scenes; CLIP and T5 text encoders, FLUX transformer, 8 M parameters",
}
_OF_WEIGHTS = ("device_map", "max_memory", "offload_folder", "offload_state_dict", "quantization_config")
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def open_pipeline(
    source: str | Path | DiffusionPipeline, **arguments: Any
) -> tuple[DiffusionPipeline, Callable[[], None] | None]:
    """The pipeline named by `source`: a packaged name (`diffsight/shapes-clip`), a folder in the diffusers format, a
    hub id, or a live pipeline, which is given back as it is. `arguments` go to `from_pretrained`.

    With it what puts the weights into it; None where they are there.

    Raises InputError where there is no such pipeline, with near names, and where a part of it is missing."""
    if isinstance(source, DiffusionPipeline):
        if arguments:
            raise InputError(f"a live pipeline is already loaded; it takes no {', '.join(arguments)}")
        return source, None
    if not isinstance(source, (str, Path)):
        raise InputError(f"a pipeline is a name, a folder or a diffusers pipeline, not {type(source).__name__}")
    name = str(source)
    is_local = name.startswith("diffsight/") or Path(name).expanduser().exists() or not _HUB_ID.fullmatch(name)
    place = str(_folder(name)) if is_local else name
    explained = _explained_packaged if name in PACKAGED else _explained_folder if is_local else _explained_hub

    with explained(name):
        empty = build_empty(place, arguments)
        now = {key: value for key, value in arguments.items() if key not in _OF_WEIGHTS}
        pipeline = DiffusionPipeline.from_pretrained(place, **now, **empty)
    if name == "diffsight/shapes-flux":
        set_defaults(pipeline)
    if not empty:
        return pipeline, None

    def load() -> None:
        parts = {part: getattr(pipeline, part) for part in pipeline.components}
        lacking = [part for part, module in empty.items() if parts.get(part) is module]
        there = {part: value for part, value in parts.items() if part not in lacking}
        with explained(name):
            loaded = DiffusionPipeline.from_pretrained(place, **{**arguments, **there})
        for part in lacking:
            adopt(empty[part], getattr(loaded, part))
        for attribute, value in vars(loaded).items():
            vars(pipeline).setdefault(attribute, value)

    return pipeline, load


@contextmanager
def _explained_folder(name: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"the folder {name} cannot be loaded as a pipeline: {type(error).__name__}: {reason}"
        ) from error


@contextmanager
def _explained_packaged(name: str) -> Iterator[None]:
    """As any folder, and without diffusers' warning that a T5 stands where the pipeline's class names a CLIP."""
    logger = logging.getLogger("diffusers.pipelines.pipeline_utils")
    logger.addFilter(_is_not_on_types)
    try:
        with _explained_folder(name):
            yield
    finally:
        logger.removeFilter(_is_not_on_types)


def _is_not_on_types(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("Expected types for text_encoder")


@contextmanager
def _explained_hub(name: str) -> Iterator[None]:
    try:
        yield
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
    return (
        f"there is no model {name!r}{suggest_packaged(name, PACKAGED)}. "
        f"Known: {', '.join(PACKAGED)}, a folder, or a hub id such as 'owner/name'"
    )
