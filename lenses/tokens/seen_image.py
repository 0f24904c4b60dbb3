"""The image that a vision-language model sees, and where its tokens are."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from diffsight.errors import InputError
from diffsight.pipelines.vision_language.images import images_of
from diffsight.pipelines.vision_language.model import VisionLanguageModel


def seen_image(image: Any, pixels: torch.Tensor | None) -> Image.Image:
    """Return the image that was divided into patches: the processor's image if it returns one, or else `image`."""
    if isinstance(pixels, torch.Tensor) and pixels.ndim == 4 and len(pixels) == 1 and pixels.shape[1] == 3:
        low, high = pixels.amin(), pixels.amax()
        seen = ((pixels[0] - low) / (high - low).clamp(min=1e-6) * 255).round().byte()
        return Image.fromarray(seen.permute(1, 2, 0).cpu().numpy())
    if isinstance(image, (str, Path)):
        with Image.open(image) as opened:
            return opened.convert("RGB")
    if isinstance(image, torch.Tensor):
        image = image if image.is_floating_point() else image / 255
        return Image.fromarray((image.clamp(0, 1) * 255).byte().permute(1, 2, 0).cpu().numpy())
    return image.convert("RGB")


@dataclass(frozen=True, eq=False)
class SeenImage:
    """The image of a prompt.

    Attributes:
        image: The image that was divided into patches.
        places: The positions of its tokens in the sequence, (rows, columns).
    """

    image: Image.Image
    places: torch.Tensor


def seen_images(model: Any, prompts: Sequence[str], images: Any) -> list[SeenImage | None]:
    """Return the image of each prompt.

    It is None if the model takes no images, the prompt has none or several, or its tokens lie on no known grid. Nothing
    runs.
    """
    if not isinstance(model, VisionLanguageModel) or images is None:
        return [None] * len(prompts)
    run = model.trace(list(prompts), images=images)
    try:
        grids, given = run.image_grids, images_of(images, len(prompts))
    except InputError:  # a resampler mixes the patches, or placeholders distribute the images
        return [None] * len(prompts)
    pixels, found = run.model_inputs.values.get("pixel_values"), []
    alone = isinstance(pixels, torch.Tensor) and len(pixels) == sum(map(len, given))
    for own, places in zip(given, grids):
        before = sum(map(len, given[: len(found)]))
        part = pixels[before : before + 1] if alone else None
        found.append(SeenImage(seen_image(own[0], part), places[0].cpu()) if len(own) == len(places) == 1 else None)
    return found
