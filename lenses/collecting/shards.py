"""Shards: a safetensors file for each batch of prompts, and an index. An unfinished folder is continued.

activations.json                    the points, and the number of vectors in each file
activations_00000.safetensors       "unet.mid_block", (vectors, features), and "unet.mid_block origins", (vectors, 4)
unfinished.json                     the settings of the collection, while the folder is being written
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from diffsight.errors import InputError
from diffsight.lenses.collecting.image_collection import Vectors
from diffsight.lenses.collecting.point_activations import PointActivations
from diffsight.lenses.results.record import as_json, write_record
from diffsight.lenses.results.saving import check_writable

INDEX = "activations.json"
_UNFINISHED = "unfinished.json"


def write_shards(
    folder: str | Path,
    settings: Mapping[str, Any],
    batches: Iterable[tuple[int, Sequence[str]]],
    read: Callable[[Sequence[str], int], Vectors],
) -> Path:
    """Write the vectors of each batch to a file, and then the index.

    Args:
        folder: The folder. If it holds part of the same collection, the missing files are added.
        settings: The settings of the collection, as the index records them.
        batches: For each batch, the number of its first prompt and its prompts.
        read: Returns the vectors of a batch.

    Raises:
        InputError: The folder holds another collection or other files.
    """
    folder = check_writable(folder)
    _open(folder, settings)
    files: dict[str, dict[str, int]] = {}
    for number, (start, prompts) in enumerate(batches):
        name = f"activations_{number:05}.safetensors"
        if not (folder / name).exists():
            _write(folder / name, read(prompts, start))
        files[name] = _sizes(folder / name, settings["points"])
    _replace(folder / INDEX, lambda path: write_record({**settings, "files": files}, path))
    (folder / _UNFINISHED).unlink()
    return folder


def load_shards(folder: Path, record: Mapping[str, Any], points: Sequence[str]) -> PointActivations:
    """Return the vectors of some points in a folder."""
    values: dict[str, list[torch.Tensor]] = {point: [] for point in points}
    origins: dict[str, list[torch.Tensor]] = {point: [] for point in points}
    for file in record["files"]:
        with safe_open(folder / file, framework="pt") as stored:
            for point in points:
                values[point].append(stored.get_tensor(point))
                origins[point].append(stored.get_tensor(f"{point} origins"))
    joined = [{point: torch.cat(parts) for point, parts in one.items()} for one in (values, origins)]
    return PointActivations(record["model"], *joined)


def _open(folder: Path, settings: Mapping[str, Any]) -> None:
    """Check that a folder is new, empty, or holds part of the same collection."""
    wanted = json.loads(as_json(settings))
    if folder.is_dir() and (folder / _UNFINISHED).is_file():
        try:
            known = json.loads((folder / _UNFINISHED).read_text(encoding="utf-8"))
        except (ValueError, RecursionError):
            known = None
        if not isinstance(known, dict):
            raise InputError(f"{folder / _UNFINISHED} is damaged: remove the folder, or choose a new one")
        differing = [name for name in wanted if name != "versions" and known.get(name) != wanted[name]]
        if differing:
            raise InputError(
                f"{folder} holds part of a collection that differs in {', '.join(differing)}: pass the same to "
                "continue it, or choose a new folder"
            )
        return
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} already exists: choose a new or an empty folder")
    folder.mkdir(parents=True, exist_ok=True)
    _replace(folder / _UNFINISHED, lambda path: write_record(settings, path))


def _write(path: Path, vectors: Vectors) -> None:
    tensors = {}
    for name, (values, origins) in vectors.items():
        tensors |= {name: values.contiguous(), f"{name} origins": origins.contiguous()}
    _replace(path, lambda place: save_file(tensors, place))


def _sizes(path: Path, points: Sequence[str]) -> dict[str, int]:
    """Return the number of vectors of each point in a file."""
    with safe_open(path, framework="pt") as stored:
        return {point: stored.get_slice(point).get_shape()[0] for point in points}


def _replace(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file under another name first, so that the file is either complete or missing."""
    beside = path.with_name(f".{path.name}")
    write(beside)
    beside.replace(path)
