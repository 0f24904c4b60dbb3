"""The image that a vision-language model sees."""

from pathlib import Path
from typing import Any

import torch
from PIL import Image


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
