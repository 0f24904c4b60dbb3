"""Read images from PIL images, paths, tensors or arrays: one image, several, or several for each text.

images_of("cat.png", texts=1)                   # [[<PIL image>]]
images_of([a, b], texts=2)                      # [[a], [b]]
images_of([[a, b], [c]], texts=2)
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.image_utils import load_image

from diffsight.errors import InputError
from diffsight.pipelines.local_paths import find_path, shortened


def images_of(given: Any, texts: int, placeholders: Sequence[int] = ()) -> list[list[Image.Image]]:
    """Return the images of each text.

    Args:
        given: One image, which goes with every text; a list with one image for each text; a list with a list for each
            text; or, where texts have placeholders, a list that is distributed over the placeholders in order.
        texts: The number of texts.
        placeholders: How many placeholders each text has.

    Raises:
        InputError: Something is not an image, or it is unclear which text an image belongs to.
    """
    if given is None:
        return [[] for _ in range(texts)]
    if _is_one(given):
        return [[read_image(given)] for _ in range(texts)]
    items = list(_listed(given))
    if any(item is None or not _is_one(item) for item in items):
        if len(items) != texts:
            raise InputError(
                f"images were passed for {len(items)} texts, but there are {texts}: pass one list of images per text"
            )
        return [_one_or_several(item) for item in items]
    images = [read_image(item) for item in items]
    if texts == 1:
        return [images]
    if any(placeholders) and sum(placeholders) == len(images):
        return [[images.pop(0) for _ in range(count)] for count in placeholders]
    if len(images) != texts:
        raise InputError(
            f"there are {len(images)} images for {texts} texts: pass one image per text, or one list of images per text"
        )
    return [[image] for image in images]


def read_image(given: Any) -> Image.Image:
    """Return one image as an RGB PIL image.

    Args:
        given: A PIL image, a path or URL, or a tensor or array of shape `(channels, height, width)` or `(height, width,
            channels)`, with floats from 0 to 1 or integers from 0 to 255.
    """
    if isinstance(given, (str, Path)):
        return _loaded(given)
    if isinstance(given, Image.Image):
        return given if given.mode == "RGB" else given.convert("RGB")
    if isinstance(given, (torch.Tensor, np.ndarray)):
        return _of_numbers(np.asarray(given.detach().cpu().float() if _is_floating(given) else given))
    raise InputError(f"an image is a PIL image, a path, a tensor or an array, not {type(given).__name__}")


def _loaded(place: str | Path) -> Image.Image:
    name = str(place)
    if not name.startswith(("http://", "https://", "data:")):
        place = find_path(name)
        if place is None or not place.is_file():
            raise InputError(f"there is no image {shortened(name)!r}: the file does not exist")
        name = str(place)
    try:
        return load_image(name)
    except Exception as error:  # raised by the library for files of this type
        raise InputError(f"the image {name!r} cannot be read: {type(error).__name__}: {error}") from error


def _of_numbers(values: np.ndarray) -> Image.Image:
    if values.ndim == 3 and values.shape[0] in (1, 3, 4) and values.shape[-1] not in (1, 3, 4):
        values = values.transpose(1, 2, 0)
    if values.ndim == 3 and values.shape[-1] == 1:
        values = values[..., 0]
    if values.ndim not in (2, 3) or (values.ndim == 3 and values.shape[-1] not in (3, 4)):
        raise InputError(f"an image has the shape (channels, height, width), not {tuple(values.shape)}")
    if values.size == 0 or values.min() < 0 or values.max() > (1 if values.dtype.kind == "f" else 255):
        raise InputError(
            "the values of an image are floats between 0 and 1, or integers from 0 to 255. Pass what a processor has "
            "prepared as a dictionary: {'input_ids': …, 'pixel_values': …}"
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
        raise InputError("there is no image, because the list is empty")
    return given


def _one_or_several(item: Any) -> list[Image.Image]:
    if item is None:
        return []
    return [read_image(item)] if _is_one(item) else [read_image(one) for one in item]
