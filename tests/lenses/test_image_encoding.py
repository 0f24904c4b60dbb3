"""Latents of an image, with the noise of a step, against the formulas of autoencoders and schedulers."""

import copy

import numpy as np
import pytest
import torch
from accelerate import cpu_offload

from diffsight import DiffusionModel
from diffsight.lenses.attention.given_image import GivenImage
from diffsight.lenses.denoising.image_encoding import encode_image
from models import diffusion
from models.denoisers import DENOISERS
from models.diffusion import IMAGE, PIPELINES


def encoded(pipe, image):
    """Return the latents of an image by hand, before they are scaled."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 127.5 - 1
    latents = pipe.vae.encode(pixels)
    return latents.latent_dist.mode() if hasattr(latents, "latent_dist") else latents.latent


def packed(latents):
    """Return latents (1, channels, rows, columns) as a sequence of patches of 2 x 2."""
    _, channels, rows, columns = latents.shape
    patches = latents.reshape(1, channels, rows // 2, 2, columns // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(1, rows * columns // 4, channels * 4)


NOISED = {
    "chroma": "flow",
    "sana": "flow",
    "aura_flow": "flow",
    "pixart_sigma": "diffusion",
    "hunyuan_dit": "diffusion",
}


@pytest.mark.parametrize("name", NOISED)
@torch.no_grad()
def test_the_noise_of_each_step(name):
    """(1 - s) x + s n in a flow with the time s, and sqrt(a) x + sqrt(1 - a) n in a diffusion with the signal a."""
    small = DENOISERS.get(name) or PIPELINES[name]
    pipe, inputs, seen = small.build(), dict(small.inputs()), []
    image = IMAGE.resize((inputs["width"], inputs["height"]))
    given = GivenImage(DiffusionModel(pipe), image, 3, inputs | {"num_inference_steps": 4})
    pipe.transformer.register_forward_hook(
        lambda module, args, kwargs, output: seen.append([*args, *kwargs.values()][0][:1]), with_kwargs=True
    )
    with DiffusionModel(pipe).generate(**given.arguments, seed=5) as run:
        given.follow(run, "transformer")
    shift = pipe.vae.config.get("shift_factor") or 0
    latents = (encoded(pipe, image) - shift) * pipe.vae.config.scaling_factor
    latents = packed(latents) if name == "chroma" else latents
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(3))
    calls = len(seen) // 4  # one for each branch of guidance
    for time, value in zip(pipe.scheduler.timesteps, seen[::calls], strict=True):
        if NOISED[name] == "flow":
            expected = (1 - time / 1000) * latents + time / 1000 * noise
        else:
            signal = pipe.scheduler.alphas_cumprod[int(time)]
            expected = signal.sqrt() * latents + (1 - signal).sqrt() * noise
        assert torch.allclose(value, expected, atol=1e-5)


@torch.no_grad()
def test_means_of_channels():
    pipe = diffusion.stable_diffusion_xl()
    mean, std = [0.1, 0.2, 0.3, 0.4], [2.0, 3.0, 4.0, 5.0]
    pipe.vae.register_to_config(latents_mean=mean, latents_std=std, scaling_factor=0.5)
    mean, std = (torch.tensor(numbers)[:, None, None] for numbers in (mean, std))
    assert torch.allclose(encode_image(pipe, IMAGE)[0], (encoded(pipe, IMAGE) - mean) * 0.5 / std, atol=1e-6)


def test_an_autoencoder_that_overflows_in_float16():
    pipe = diffusion.stable_diffusion_xl()
    with torch.no_grad():
        pipe.vae.encoder.conv_in.weight *= 3e5
    pipe.vae.half()
    pipe.vae.encoder.conv_norm_out.float()  # as models that keep some modules in float32
    before, seen = {name: weight.clone() for name, weight in pipe.vae.state_dict().items()}, set()
    whole = copy.deepcopy(pipe)
    whole.vae.float()
    expected = encode_image(whole, IMAGE)[0].half()
    postprocess = pipe.image_processor.postprocess
    pipe.image_processor.postprocess = lambda image: seen.add(pipe.vae.dtype) or postprocess(image)
    latents, _ = encode_image(pipe, IMAGE)
    assert latents.isfinite().all() and torch.equal(latents, expected)
    assert seen == {torch.float16}
    for name, weight in pipe.vae.state_dict().items():
        assert weight.dtype is before[name].dtype and torch.equal(weight, before[name])
    cpu_offload(pipe.vae, torch.device("cpu"), offload_buffers=True)
    assert torch.equal(encode_image(pipe, IMAGE)[0], expected)
    assert all(weight.is_meta for weight in pipe.vae.parameters())


def test_an_autoencoder_whose_weights_are_loaded_in_parts():
    pipe = diffusion.stable_diffusion()
    expected, _ = encode_image(pipe, IMAGE)
    for part in (pipe.text_encoder, pipe.unet, pipe.vae):
        cpu_offload(part, torch.device("cpu"), offload_buffers=True)
    assert torch.equal(encode_image(pipe, IMAGE)[0], expected)
