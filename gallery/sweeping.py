"""Save the results of a function for many items, a folder for each.

    def draw(prompt, seed):
        return diffusion_lens(model, prompt, seed=seed)

    sweep(draw, itertools.product(prompts, range(8)), "study")

An interrupted sweep continues where it stopped (see `resumable_folder`). Processes started by `accelerate launch` or
`torchrun` share the items (see `work_sharing`) and write the same files as a single process.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file
from tqdm.auto import tqdm

from diffsight.errors import InputError
from diffsight.gallery.gallery_index import PAGE
from diffsight.gallery.resumable_folder import ResumableFolder, place_name
from diffsight.lenses.results.result import LensResult
from diffsight.lenses.results.saving import expanded, save_files
from diffsight.lenses.work_sharing import Processes


def sweep(function: Callable[..., Any], items: Iterable[Any], folder: str | Path) -> Path:
    """Save the result of a function for each item in a folder of its own, and write a gallery of all results.

        sweep(draw, itertools.product(prompts, range(8)), "study")      # draw(prompt, seed)
        sweep(measure, prompts, "numbers")                              # measure(prompt)

    Args:
        function: Returns the result of a lens, an image, a tensor, a dictionary of tensors, or data for JSON.
        items: Texts, numbers, and tuples or dictionaries of them. A tuple is passed as several arguments, a dictionary
            as keyword arguments, anything else as one argument.
        folder: A new folder, or the folder of the same sweep, for which only the missing results are made.

    Returns:
        The page of the gallery, or the folder if no result comes from a lens.

    Raises:
        InputError: An item appears twice or is of another type, the folder holds a different sweep, or the function's
            return value cannot be saved.
    """
    if not callable(function):
        raise InputError(f"sweep takes a function and then the items, not {function!r}")
    listed = _checked(items)
    texts = [_text(item) for item in listed]
    folder = expanded(folder)
    name = getattr(function, "__qualname__", type(function).__name__)
    places = [folder / place_name(number, len(listed), text) for number, text in enumerate(texts)]
    item_at = dict(zip(places, listed))

    def make(place: Path, into: Path) -> None:
        _save(_call(function, item_at[place]), into)

    return fill(ResumableFolder(folder, {"function": name, "items": listed}), places, make)


def fill(folder: ResumableFolder, places: Sequence[Path], make: Callable[[Path, Path], Any]) -> Path:
    """Make the missing results, and return the page of the gallery.

    Processes that were started together share the work, and each makes its own part. All of them return when all
    results exist.

    Args:
        folder: The folder of all results.
        places: The folder of each result.
        make: Makes the result of a place, and writes it to a temporary folder, which is then renamed to the place.

    Raises:
        InputError: The folder cannot be used, because it holds another sweep.
    """
    processes = Processes()
    folder.check()
    if processes.is_main:
        folder.begin()
    mine = processes.share(folder.missing(places))
    for place in tqdm(mine, desc="results", disable=not processes.is_main):
        folder.make(place, make)
    processes.wait()
    if processes.is_main:
        folder.end()
    processes.wait()
    page = folder.folder / PAGE
    return page if page.is_file() else folder.folder


def _checked(items: Iterable[Any]) -> list[Any]:
    """Return the items as a list. Raise InputError for items that JSON cannot store, and for a string or mapping."""
    if isinstance(items, (str, bytes, Mapping)) or not isinstance(items, Iterable):
        raise InputError(f"items must be a list or another iterable, not {items!r:.60}")
    listed, seen = list(items), set()
    if not listed:
        raise InputError("there are no items")
    for number, item in enumerate(listed):
        try:
            text = json.dumps(item, allow_nan=False)
        except (TypeError, ValueError):
            raise InputError(
                f"item {number} is a {type(item).__name__}: items are texts, numbers, and tuples or dictionaries of "
                "them. Pass a name or a number, and look up in the function what it stands for"
            ) from None
        if text in seen:
            raise InputError(f"items must be unique, but {item!r} appears twice")
        seen.add(text)
    return listed


def _text(item: Any) -> str:
    """Return an item as words, for the name of its folder."""
    if isinstance(item, Mapping):
        return "_".join(f"{name}_{_text(value)}" for name, value in item.items())
    return "_".join(map(_text, item)) if isinstance(item, (list, tuple)) else str(item)


def _call(function: Callable[..., Any], item: Any) -> Any:
    if isinstance(item, Mapping):
        return function(**item)
    return function(*item) if isinstance(item, tuple) else function(item)


def _save(value: Any, folder: Path) -> None:
    """Write the return value of the function to a folder."""
    if isinstance(value, LensResult):
        value.save(folder)
    elif isinstance(value, Image.Image):
        save_files(folder, {"image.png": value.save})
    elif isinstance(value, torch.Tensor):
        _save({"value": value}, folder)
    elif isinstance(value, Mapping) and value and all(isinstance(one, torch.Tensor) for one in value.values()):
        tensors = {str(name): one.detach().cpu().contiguous().clone() for name, one in value.items()}
        save_files(folder, {"values.safetensors": partial(save_file, tensors)})
    else:
        try:
            text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
        except (TypeError, ValueError):
            raise InputError(
                f"the function returned a {type(value).__name__}, which a sweep cannot save: return the result of a "
                "lens, an image, tensors, or what JSON can hold"
            ) from None
        save_files(folder, {"value.json": lambda path: path.write_text(text, encoding="utf-8")})
