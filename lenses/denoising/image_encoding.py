"""Encode an image as the latents from which a pipeline draws it."""

from collections.abc import Mapping
from typing import Any

import torch
from PIL import Image

from diffsight.errors import InputError
from diffsight.pipelines.diffusion.components import execution_device
from diffsight.pipelines.diffusion.float32_copies import in_float32


def check_image(pipeline: Any, image: Any) -> Image.Image:
    """Return a PIL image of a size that the pipeline can draw.

    Args:
        pipeline: The pipeline.
        image: A PIL image in mode RGB, or a float tensor (3, height, width) from 0 to 1.

    Raises:
        InputError: The image is neither of these, or the pipeline cannot draw its size.
    """
    if isinstance(image, torch.Tensor):
        image = _from_tensor(image)
    if not isinstance(image, Image.Image):
        raise InputError(f"the image must be a PIL image or a tensor, not {type(image).__name__}")
    if image.mode != "RGB":
        raise InputError(f'the image has the mode {image.mode}: pass image.convert("RGB")')
    multiple = pipeline.vae_scale_factor * (2 if hasattr(pipeline, "_pack_latents") else 1)
    if any(side % multiple for side in image.size):
        width, height = (max(multiple, round(side / multiple) * multiple) for side in image.size)
        raise InputError(
            f"the image has {image.width} x {image.height} pixels, but both sides must be multiples of {multiple}: "
            f"pass image.resize(({width}, {height}))"
        )
    return image


def check_can_encode(pipeline: Any) -> None:
    """Raise InputError unless the pipeline has an autoencoder that encodes images, and latents of the usual layout."""
    vae, processor = getattr(pipeline, "vae", None), getattr(pipeline, "image_processor", None)
    config = getattr(vae, "config", {})
    if processor is None or "scaling_factor" not in config or not hasattr(vae, "encode"):
        raise InputError(
            f"{type(pipeline).__name__} has no autoencoder for images, so there are no latents of an image"
        )
    if not hasattr(pipeline, "vae_scale_factor"):
        raise InputError(
            f"{type(pipeline).__name__} cannot be given the latents of an image, because their layout is not known"
        )


@torch.no_grad()
def encode_image(pipeline: Any, image: Image.Image) -> tuple[torch.Tensor, Image.Image]:
    """Return the latents of an image as the scheduler takes them, (1, ...), and the image decoded from them."""
    vae, dtype, device = pipeline.vae, pipeline.vae.dtype, execution_device(pipeline)
    if dtype is torch.float16 and vae.config.get("force_upcast"):
        vae = in_float32(vae, device)  # the pipeline also decodes in float32
    pixels = pipeline.image_processor.preprocess(image).to(device, vae.dtype)
    encoded = vae.encode(pixels)
    latents = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded[0]
    decoded = pipeline.image_processor.postprocess(vae.decode(latents, return_dict=False)[0])[0]
    latents = _scaled(latents, vae.config).to(dtype)
    pack = getattr(pipeline, "_pack_latents", None)
    return (latents if pack is None else pack(latents, *latents.shape)), decoded


def _scaled(latents: torch.Tensor, config: Mapping[str, Any]) -> torch.Tensor:
    mean, std = (config.get(name) for name in ("latents_mean", "latents_std"))
    if mean is None or std is None:
        return (latents - (config.get("shift_factor") or 0)) * config["scaling_factor"]
    mean, std = (latents.new_tensor(numbers)[:, None, None] for numbers in (mean, std))
    return (latents - mean) * config["scaling_factor"] / std


def _from_tensor(image: torch.Tensor) -> Image.Image:
    if image.ndim != 3 or len(image) != 3 or not image.is_floating_point():
        raise InputError(
            f"the image must be a float tensor of shape (3, height, width), not {image.dtype} of shape "
            f"{tuple(image.shape)}"
        )
    if not (image.amin() >= 0 and image.amax() <= 1):  # nan is neither
        raise InputError(f"the image must have values from 0 to 1, not {image.amin():.3g} to {image.amax():.3g}")
    return Image.fromarray((image.detach().cpu().permute(1, 2, 0) * 255).round().byte().numpy())
