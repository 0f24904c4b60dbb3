"""Repeat a result from its record, and compare the two.

    repetition = repeat("lens")
    print(repetition)                   # identical or the differences, with the versions then and now
    repetition.is_identical

Every saved file is compared with the one the lens writes now: images by their pixels, numbers by their values, the
record by its entries. Page and thumbnail are left out, since they contain the same data.
"""

import importlib
import inspect
import io
import json
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageSequence
from rich.console import Console
from rich.table import Table
from safetensors import SafetensorError
from safetensors.torch import load_file

from diffsight.errors import DiffsightError, InputError
from diffsight.gallery.gallery_index import find_results
from diffsight.lenses.features.autoencoder import SAE
from diffsight.lenses.results.call_values import ArgumentDecoder, UnknownValueError, named, public_name
from diffsight.lenses.results.record import versions
from diffsight.lenses.results.result import LensResult
from diffsight.lenses.results.saved_results import ARGUMENTS, PAGE, read_record
from diffsight.lenses.results.thumbnail import THUMBNAIL
from diffsight.pipelines.local_paths import find_path, printable, shortened

_PARTS = ("arguments", "models")  # of a call
_OF_MODEL = {
    "kind": str,
    "source": str | None,
    "options": dict,
    "revision": str | None,
    "weights": str,
    "edits": list | tuple,
}
_KINDS = ("DiffusionModel", "LanguageModel", "VisionLanguageModel", "SAE")
_NAMED = 5  # results that an error names
_NOT_COMPARED = ("versions", "call", "files")  # entries of a record


@dataclass(frozen=True)
class Repetition:
    """A repeated result, and its differences from the saved one.

    Attributes:
        record: The file of the record.
        result: The repeated result.
        compared: The names of the files that were compared.
        differences: The differences, by the name of the file.
        notes: Changes in the models.
        then: The versions of the libraries in the record.
        now: The versions of the installed libraries.
    """

    record: Path
    result: LensResult = field(repr=False)
    compared: tuple[str, ...]
    differences: Mapping[str, str]
    notes: tuple[str, ...]
    then: Mapping[str, str]
    now: Mapping[str, str]

    @property
    def is_identical(self) -> bool:
        """Whether the results are identical, bit for bit."""
        return not self.differences

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=110, color_system=None)
        outcome = "identical" if self.is_identical else "different"
        files = f"{len(self.compared)} file{'s' * (len(self.compared) > 1)} compared with {printable(self.record)}"
        console.print(f"{outcome} ({files})", markup=False, highlight=False)
        for name, difference in self.differences.items():
            console.print(f"  {name}: {difference}", markup=False, highlight=False)
        for note in self.notes:
            console.print(f"  note: {note}", markup=False, highlight=False)
        table = Table("", "then", "now", box=None, pad_edge=False)
        for name in {**self.then, **self.now}:
            then, now = self.then.get(name, "-"), self.now.get(name, "-")
            table.add_row(name, then, now, "" if then == now else "changed")
        console.print(table)
        return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())


def repeat(path: str | Path, **replaced: Any) -> Repetition:
    """Repeat a result from its record, and compare it with the saved files.

        repeat("lens")
        repeat("steered", model=steered)        # a live or edited model must be passed

    Args:
        path: The record of a result, or a folder with one result in it or in its subfolders.
        replaced: Arguments to use in place of those in the record.

    Raises:
        InputError: There is no record, or it lacks data that is needed to repeat the result.
    """
    path = _find(path)
    record = read_record(path)
    if record is None:
        raise InputError(f"{path} is not the record of a result")
    call = _call_in(path, record)
    then, now = record.get("versions", {}), versions()
    try:
        result = _call_again(path, call, replaced)
    except InputError as error:
        own, here = then.get("diffsight"), now["diffsight"]
        if own in (None, here):
            raise
        raise InputError(f"{error}. The record was written by diffsight {own}, and this is diffsight {here}") from None
    with tempfile.TemporaryDirectory() as folder:
        names = [one.name for one in result.save(folder) if one.name not in (PAGE, ARGUMENTS, THUMBNAIL)]
        differences = {}
        for name in names:
            old = path if name == result.record_file else path.parent / name
            difference = _difference(old, Path(folder) / name)
            differences |= {name: difference} if difference else {}
    notes = tuple(_notes(call, result.call.record()))
    return Repetition(path, result, tuple(names), differences, notes, then, now)


def _call_in(path: Path, record: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the call in a record. Raises InputError if anything needed to repeat it is missing."""
    call = record.get("call")
    if not isinstance(call, dict):
        raise InputError(
            f"{path} does not say how the result was made: only a result that a lens returned can be repeated"
        )
    if not isinstance(call.get("function"), str) or not all(isinstance(call.get(key), dict) for key in _PARTS):
        raise InputError(f"{path} is damaged: its call does not have a function, arguments and models")
    if not isinstance(record.get("versions", {}), dict):
        raise InputError(f"{path} is damaged: its versions are not a dictionary")
    for name, model in call["models"].items():
        if not isinstance(model, dict) or not all(isinstance(model.get(key), kind) for key, kind in _OF_MODEL.items()):
            raise InputError(f"{path} is damaged: its call does not say how {name} was loaded")
    return call


def _find(given: str | Path) -> Path:
    if isinstance(given, LensResult):
        raise InputError("repeat takes the folder of a saved result: call result.save(folder) first")
    path = find_path(given)
    if path is None:
        raise InputError(f"there is no file or folder {shortened(str(given))}")
    if not path.is_dir():
        return path
    below = [one.path for one in find_results(path)]
    found = [one for one in below if one.parent == path] or below
    if len(found) != 1:
        names = ", ".join(str(one.relative_to(path)) for one in found[:_NAMED]) + (", …" if len(found) > _NAMED else "")
        raise InputError(f"{path} has " + (f"several results ({names}): name one of them" if found else "no result"))
    return found[0]


class _Models(dict):
    """The models of a call by name, each loaded on first use."""

    def __init__(self, records: Mapping[str, Any], passed: Mapping[str, Any]) -> None:
        super().__init__(passed)
        self._records = records

    def __missing__(self, name: str) -> Any:
        self[name] = model = _load(name, self._records[name])
        return model


def _load(name: str, record: Mapping[str, Any]) -> Any:
    if not record["source"]:
        what = "an SAE that was not loaded from a folder" if record["kind"] == "SAE" else "a live model"
        raise InputError(f"{name} was {what}: pass it, as in repeat(path, {name}={name})")
    if record["edits"]:
        raise InputError(
            f"{name} had edits, which the record only lists: pass the edited model, as in repeat(path, {name}={name})"
        )
    if record["kind"] not in _KINDS:
        raise InputError(
            f"{name} was a {record['kind']!r}, which cannot be loaded: pass it, as in repeat(path, {name}={name})"
        )
    options = ArgumentDecoder({}, {}).decode(record["options"])
    if record["kind"] == "SAE":
        return SAE.load(record["source"], **options)
    return getattr(importlib.import_module("diffsight"), record["kind"])(record["source"], **options)


def _call_again(path: Path, call: Mapping[str, Any], replaced: Mapping[str, Any]) -> Any:
    """Call the function of a record again and return its result."""
    function = named(call["function"])
    if public_name(function) != call["function"]:
        raise InputError(f"{path} is damaged: {call['function']} is not a lens")
    models = _Models(call["models"], replaced)
    decoder = ArgumentDecoder(_tensors(path.parent / ARGUMENTS), models)
    arguments = {key: value for key, value in replaced.items() if key not in call["models"]}
    for key, value in call["arguments"].items():
        try:
            arguments[key] = replaced[key] if key in replaced else decoder.decode(value)
        except LookupError:
            raise InputError(
                f"{path.parent / ARGUMENTS} does not have {key}: pass it, as in repeat(path, {key}=…)"
            ) from None
        except UnknownValueError as error:
            raise InputError(
                f"{key} cannot be repeated, because {error}: pass it, as in repeat(path, {key}=…)"
            ) from None
        except (AttributeError, RuntimeError, TypeError, ValueError) as error:
            if isinstance(error, DiffsightError):
                raise
            raise InputError(f"{path} is damaged: its argument {key} cannot be read ({error})") from None
    try:
        inspect.signature(function).bind(**arguments)
    except TypeError as error:
        raise InputError(
            f"{path} does not fit {call['function']} of diffsight {versions()['diffsight']}: {error}. It may be "
            "damaged or of another version"
        ) from None
    if "progress" in inspect.signature(function).parameters:
        arguments["progress"] = False
    return function(**arguments)


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    if not path.is_file():
        return {}
    try:
        return load_file(path)
    except SafetensorError as error:
        raise InputError(f"{path} is damaged: {error}") from None


# ---- comparing


def _notes(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    """Yield changes in the models."""
    for name, model in old["models"].items():
        now = new["models"].get(name)
        if now is None:
            continue
        for what in ("weights", "revision"):
            if model[what] != now[what]:
                yield f"the {what} of {name} changed: {now[what]} now, {model[what]} in the record"


def _difference(old: Path, new: Path) -> str:
    """Return a description of how two files differ, or "" if they do not."""
    if not old.is_file():
        return "missing"
    try:
        return _COMPARE.get(new.suffix, _of_bytes)(old, new)
    except (OSError, SyntaxError, TypeError, ValueError, RecursionError, SafetensorError) as error:
        return f"damaged: {error}"


def _of_images(old: Path, new: Path) -> str:
    a, b = (_pixels(path) for path in (old, new))
    if a.shape != b.shape:
        return f"a different size: {_size(b)} instead of {_size(a)}"
    most, share = int(np.abs(a - b).max()), float((a != b).mean())
    return f"up to {most} of 255, in {share:.2%} of the values" if most else ""


def _pixels(path: Path) -> np.ndarray:
    """Return the frames of an image, (frames, height, width, channels)."""
    with Image.open(path) as image:
        return np.stack([np.asarray(frame.convert("RGBA"), dtype=int) for frame in ImageSequence.Iterator(image)])


def _size(pixels: np.ndarray) -> str:
    frames, height, width, _ = pixels.shape
    return f"{width} x {height}" + (f", {frames} frames" if frames > 1 else "")


def _of_tensors(old: Path, new: Path) -> str:
    a, b = load_file(old), load_file(new)
    found = [f"{name} is only in one of them" for name in a.keys() ^ b.keys()]
    for name in sorted(a.keys() & b.keys()):
        one, other = a[name], b[name]
        if one.shape != other.shape or one.dtype != other.dtype:
            found.append(f"{name} has the shape {tuple(other.shape)} instead of {tuple(one.shape)}")
        elif not torch.equal(one.nan_to_num(), other.nan_to_num()) or not torch.equal(one.isnan(), other.isnan()):
            off = (one.double() - other.double()).abs().masked_fill(one.isnan() & other.isnan(), 0)
            most = off.nan_to_num(torch.inf).max().item()
            found.append(f"{name} by up to {most:.3g}")
    return "; ".join(found)


def _of_records(old: Path, new: Path) -> str:
    a, b = (json.loads(path.read_text(encoding="utf-8")) for path in (old, new))
    names = [name for name in {**a, **b} if name not in _NOT_COMPARED and a.get(name) != b.get(name)]
    return f"different {', '.join(names)}" if names else ""


def _of_bytes(old: Path, new: Path) -> str:
    return "" if old.read_bytes() == new.read_bytes() else "different content"


_COMPARE = {".png": _of_images, ".gif": _of_images, ".safetensors": _of_tensors, ".json": _of_records}
