"""Inversion, compared with diffusers' inverse schedulers, with loops by hand, and with exact reconstruction."""

import json
import math

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from diffsight import DiffusionModel, invert
from helpers import SEED, draw, pipeline_footprint, recorded, refusal, same_image
from models import diffusion

IMAGE, PROMPT, STEPS = diffusion.IMAGE, "a red circle", 4
CALL = {"num_inference_steps": STEPS, "seed": SEED, "progress": False}
FLUX = {**CALL, "max_sequence_length": diffusion.TOKENS}


@pytest.fixture
def flux():
    return diffusion.flux()


def latents_of(pipe):
    """Return the latents of the image by hand, before they are packed."""
    pixels = torch.from_numpy(np.array(IMAGE)).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        mode = pipe.vae.encode(pixels).latent_dist.mode()
    return (mode - (pipe.vae.config.shift_factor or 0)) * pipe.vae.config.scaling_factor


@pytest.mark.parametrize("kind", ["v_prediction", "epsilon", "dpm"])
def test_it_is_the_inverse_of_diffusers(sd, kind):
    scheduler, inverse = diffusers.DDIMScheduler, diffusers.DDIMInverseScheduler
    if kind == "dpm":
        scheduler, inverse = diffusers.DPMSolverMultistepScheduler, diffusers.DPMSolverMultistepInverseScheduler
    kind = "epsilon" if kind == "dpm" else kind
    sd.scheduler = scheduler.from_config(sd.scheduler.config, prediction_type=kind)
    inverted = invert(DiffusionModel(sd), IMAGE, PROMPT, **CALL)
    assert type(sd.scheduler) is scheduler
    sd.scheduler = inverse.from_config(sd.scheduler.config)
    arguments = {"prompt": PROMPT, "num_inference_steps": STEPS, "guidance_scale": 1.0, "output_type": "latent"}
    with recorded(sd.scheduler, "step") as calls:
        expected = draw(sd, {**arguments, "latents": latents_of(sd)})
    torch.testing.assert_close(inverted.noise, expected, rtol=1e-3, atol=1e-4)
    for latents, ((args, _), _) in zip(inverted.latents, calls):
        torch.testing.assert_close(latents, args[2][0], rtol=1e-3, atol=1e-4)


def test_the_reconstruction_is_what_the_pipeline_draws_from_the_noise(sd):
    inverted = invert(DiffusionModel(sd), IMAGE, PROMPT, **CALL)
    arguments = {"prompt": PROMPT, "num_inference_steps": STEPS, "guidance_scale": 1.0, "latents": inverted.noise}
    assert same_image(inverted.reconstruction, draw(sd, arguments)[0])
    assert same_image(inverted.reconstruction, DiffusionModel(sd).generate(**inverted.arguments).images[0])


def test_a_rectified_flow_by_hand(flux):
    """x + (s' - s) v(x, s) along the noise levels of the pipeline, in the opposite order."""
    inverted = invert(DiffusionModel(flux), IMAGE, PROMPT, **FLUX)
    x = flux._pack_latents(latents_of(flux), 1, 4, 16, 16)
    torch.testing.assert_close(inverted.latents[0], x[0])
    embeds, pooled, text_ids = flux.encode_prompt(PROMPT, None, max_sequence_length=diffusion.TOKENS)
    ids = flux._prepare_latent_image_ids(1, 8, 8, "cpu", torch.float32)
    levels = flux.scheduler.sigmas.flip(0)
    assert len(levels) == STEPS + 1
    for i in range(STEPS):
        with torch.no_grad():
            flow = flux.transformer(
                x, embeds, pooled, levels[i][None], ids, text_ids, torch.tensor([1.0]), return_dict=False
            )[0]
        x = x + (levels[i + 1] - levels[i]) * flow
        torch.testing.assert_close(inverted.latents[i + 1], x[0], rtol=1e-4, atol=1e-4)


def test_with_a_controller_the_noise_is_that_of_the_seed(flux):
    """With gamma 1 the path is straight: it ends in the noise. With eta 1 it leads straight to the image."""
    inverted = invert(DiffusionModel(flux), IMAGE, PROMPT, gamma=1.0, eta=1.0, **FLUX)
    noise = torch.randn(inverted.noise.shape, generator=torch.Generator().manual_seed(SEED))
    torch.testing.assert_close(inverted.noise, noise, rtol=1e-4, atol=1e-4)
    assert np.abs(np.asarray(inverted.reconstruction, int) - np.asarray(inverted.decoded, int)).max() <= 2


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "flow"])
def test_fixed_point_iterations_make_it_exact(sd, flux, kind):
    if kind != "flow":
        sd.scheduler = diffusers.DDIMScheduler.from_config(
            sd.scheduler.config, prediction_type=kind, timestep_spacing="trailing"
        )
        sd.unet.conv_out.weight.data *= 0.03  # random weights change too much between two estimates
    model, call = (DiffusionModel(flux), FLUX) if kind == "flow" else (DiffusionModel(sd), CALL)
    errors = []
    for count in (0, 6):
        inverted = invert(model, IMAGE, PROMPT, fixed_point=count, **call)
        arguments = {name: value for name, value in inverted.arguments.items() if name != "seed"}
        drawn = draw(model.pipeline, {**arguments, "output_type": "latent"})
        errors.append((drawn - inverted.latents[:1]).norm() / inverted.latents[:1].norm())
        assert len(inverted.latents) == STEPS + 1
    assert errors[1] < 0.1 * errors[0]


@pytest.mark.parametrize("name", ["stable_diffusion_3", "stable_diffusion_xl"])
def test_other_pipelines(name):
    pipe = diffusion.PIPELINES[name].build()
    if name == "stable_diffusion_xl":
        pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
    inverted = invert(DiffusionModel(pipe), IMAGE, PROMPT, fixed_point=6, **CALL)
    assert abs(inverted.psnr - inverted.decoded_psnr) < 1


def test_errors_of_the_reconstruction(sd):
    inverted = invert(DiffusionModel(sd), IMAGE, PROMPT, **CALL)
    a, b = (np.asarray(one, dtype=float) for one in (IMAGE, inverted.reconstruction))
    assert inverted.psnr == pytest.approx(20 * math.log10(255 / ((a - b) ** 2).mean() ** 0.5))
    parts = inverted.psnr_by_region(2, 4)
    assert parts[1][3] == pytest.approx(10 * math.log10(255**2 / ((a - b)[16:, 24:] ** 2).mean()))
    assert "cannot be divided into 0 x 1" in refusal(inverted.psnr_by_region, 0, 1)


def test_a_tensor_is_an_image_too(sd):
    pixels = torch.from_numpy(np.array(IMAGE)).permute(2, 0, 1) / 255
    found = (invert(DiffusionModel(sd), image, PROMPT, **CALL).noise for image in (IMAGE, pixels))
    assert torch.equal(*found)


def test_it_is_saved_and_nothing_is_left_behind(sd, tmp_path):
    draw(sd, {"prompt": PROMPT, "num_inference_steps": 1})  # sets attributes of the pipeline
    before = pipeline_footprint(sd)
    inverted = invert(DiffusionModel(sd), IMAGE, PROMPT, **CALL)
    assert pipeline_footprint(sd) == before
    names = {path.name for path in inverted.save(tmp_path)}
    assert names >= {"grid.png", "image.png", "reconstruction.png", "inversion.safetensors", "inversion.json"}
    assert json.loads((tmp_path / "inversion.json").read_text())["psnr"] == inverted.psnr
    assert torch.equal(load_file(tmp_path / "inversion.safetensors")["latents"], inverted.latents)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"image": "scene.png"}, "must be a PIL image or a tensor, not str"),
        ({"image": IMAGE.convert("L")}, 'the mode L: pass image.convert("RGB")'),
        ({"image": Image.new("RGB", (31, 32))}, "31 x 32 pixels, but both sides must be multiples of 2"),
        ({"image": torch.full((3, 32, 32), 2.0)}, "values from 0 to 1, not 2 to 2"),
        ({"image": torch.full((3, 32, 32), torch.nan)}, "values from 0 to 1, not nan to nan"),
        ({"image": torch.zeros(32, 32, 3)}, "float tensor of shape (3, height, width)"),
        ({"fixed_point": -1}, "fixed_point is a number of iterations"),
        ({"gamma": 0.5}, "gamma is for rectified flows: omit it with DDIMScheduler"),
        ({"eta": 2}, "eta must be from 0 to 1"),
        ({"latents": torch.zeros(1)}, "omit latents"),
        ({"prompt": ["a"]}, "one prompt, a string, not list"),
    ],
)
def test_bad_input(sd, change, words):
    given = {"image": IMAGE, "prompt": PROMPT, **CALL, **change}
    assert words in refusal(invert, DiffusionModel(sd), given.pop("image"), given.pop("prompt"), **given)


def test_what_cannot_be_inverted(sd):
    model = DiffusionModel(sd)
    assert "model with edits" in refusal(invert, model.edit(lambda run: None), IMAGE, PROMPT, **CALL)
    sd.scheduler = diffusers.EulerDiscreteScheduler.from_config(sd.scheduler.config)
    message = refusal(invert, model, IMAGE, PROMPT, **CALL)
    assert "EulerDiscreteScheduler has no inverse: choose one of DDIMScheduler" in message
    sd.scheduler = diffusers.IPNDMScheduler()
    assert "has the prediction type None" in refusal(invert, model, IMAGE, PROMPT, **CALL)
    sd.scheduler = diffusers.DPMSolverMultistepScheduler()
    assert "no fixed-point iterations" in refusal(invert, model, IMAGE, PROMPT, fixed_point=1, **CALL)
    assert "does not have the argument latents" in refusal(
        invert, DiffusionModel(diffusion.ddpm()), IMAGE, **{**CALL, "prompt": ""}
    )
