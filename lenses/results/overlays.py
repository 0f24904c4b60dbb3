"""Heat maps over images."""

import numpy as np
import torch
from matplotlib import colormaps
from PIL import Image
from torch.nn import functional as F

_COLORS = colormaps["inferno"]
_OPACITY = 0.75


def scaled(heat: torch.Tensor) -> torch.Tensor:
    """Return a map whose smallest value is 0 and whose largest is 1; zeros if all its values are the same."""
    heat = heat - heat.min()
    return heat / heat.max() if heat.max() > 0 else heat


def at_size(heat: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Return a map (rows, columns), resized to an image (height, width) and scaled from 0 to 1."""
    resized = F.interpolate(heat[None, None].float(), size=size, mode="bicubic", align_corners=False)[0, 0]
    return scaled(resized)


def overlay(image: Image.Image, heat: torch.Tensor) -> Image.Image:
    """Return an image under a map, (rows, columns). Where the map is dark, little of the image is seen."""
    image = image.convert("RGB")
    shares = at_size(heat, image.size[::-1]).numpy()
    colors = _COLORS(shares)[..., :3]
    grey = np.asarray(image.convert("L"), dtype=float)[..., None] / 255
    mixed = _OPACITY * colors + (1 - _OPACITY) * grey
    return Image.fromarray((mixed * 255).round().clip(0, 255).astype(np.uint8))
