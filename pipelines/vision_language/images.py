"""Pictures as a user has them: PIL images, paths, tensors, arrays; one, several, or several for each text.

pictures_of("cat.png", texts=1)                 # [[<PIL image>]]
pictures_of([a, b], texts=2)                    # [[a], [b]]
pictures_of([[a, b], [c]], texts=2)
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.image_utils import load_image

from diffsight.errors import InputError


def pictures_of(given: Any, texts: int, placeholders: Sequence[int] = ()) -> list[list[Image.Image]]:
    """The pictures of each text. One picture alone goes with every text. In a list there is one for each text, or a
    list for each; where texts hold `placeholders` (how many each), pictures are dealt out in their order.

    Raises InputError for what is no picture, and where it cannot be told whose a picture is."""
    if given is None:
        return [[] for _ in range(texts)]
    if _is_one(given):
        return [[read_picture(given)] for _ in range(texts)]
    items = list(_listed(given))
    if any(item is None or not _is_one(item) for item in items):
        if len(items) != texts:
            raise InputError(f"there are pictures for {len(items)} texts, and {texts} texts: give a list for each text")
        return [_one_or_several(item) for item in items]
    pictures = [read_picture(item) for item in items]
    if texts == 1:
        return [pictures]
    if any(placeholders) and sum(placeholders) == len(pictures):
        return [[pictures.pop(0) for _ in range(count)] for count in placeholders]
    if len(pictures) != texts:
        raise InputError(
            f"there are {len(pictures)} pictures for {texts} texts: give one for each, or a list of pictures for each"
        )
    return [[picture] for picture in pictures]


def read_picture(given: Any) -> Image.Image:
    """One picture: a PIL image, a path (or URL), a tensor or array of the shape (channels, height, width) or (height,
    width, channels), with numbers from 0 to 1, or whole ones from 0 to 255."""
    if isinstance(given, (str, Path)):
        return _loaded(given)
    if isinstance(given, Image.Image):
        return given if given.mode == "RGB" else given.convert("RGB")
    if isinstance(given, (torch.Tensor, np.ndarray)):
        return _of_numbers(np.asarray(given.detach().cpu().float() if _is_floating(given) else given))
    raise InputError(f"a picture is a PIL image, a path, a tensor or an array, not {type(given).__name__}")


def _loaded(place: str | Path) -> Image.Image:
    name = str(place)
    if not name.startswith(("http://", "https://", "data:")):
        place = Path(name).expanduser()
        if not place.is_file():
            raise InputError(f"there is no picture {name!r}: the file does not exist")
        name = str(place)
    try:
        return load_image(name)
    except Exception as error:  # of whatever reads files of this kind
        raise InputError(f"the picture {name!r} cannot be read: {type(error).__name__}: {error}") from error


def _of_numbers(values: np.ndarray) -> Image.Image:
    if values.ndim == 3 and values.shape[0] in (1, 3, 4) and values.shape[-1] not in (1, 3, 4):
        values = values.transpose(1, 2, 0)
    if values.ndim == 3 and values.shape[-1] == 1:
        values = values[..., 0]
    if values.ndim not in (2, 3) or (values.ndim == 3 and values.shape[-1] not in (3, 4)):
        raise InputError(f"a picture has the shape (channels, height, width), not {tuple(values.shape)}")
    if values.size == 0 or values.min() < 0 or values.max() > (1 if values.dtype.kind == "f" else 255):
        raise InputError(
            "the numbers of a picture lie between 0 and 1, or are whole ones from 0 to 255. What a processor has "
            "prepared goes into a dictionary: {'input_ids': …, 'pixel_values': …}"
        )
    values = (values * 255).round() if values.dtype.kind == "f" else values
    return Image.fromarray(values.astype(np.uint8)).convert("RGB")


def _is_floating(values: Any) -> bool:
    return isinstance(values, torch.Tensor) and values.is_floating_point()


def _is_one(given: Any) -> bool:
    if isinstance(given, (torch.Tensor, np.ndarray)):
        return given.ndim < 4
    return not isinstance(given, (list, tuple))


def _listed(given: Any) -> Any:
    if len(given) == 0:
        raise InputError("there is no picture: the list is empty")
    return given


def _one_or_several(item: Any) -> list[Image.Image]:
    if item is None:
        return []
    return [read_picture(item)] if _is_one(item) else [read_picture(one) for one in item]
