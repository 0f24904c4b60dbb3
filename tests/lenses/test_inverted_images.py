"""Lenses on an inverted image: what they draw without a change is what the bare pipeline draws from its noise."""

import inspect
import json

import diffusers
import pytest
import torch

from diffsight import (
    DiffusionModel,
    activation_patching,
    attention_from,
    attention_maps,
    attribution_patching,
    block_ablation,
    causal_tracing,
    diffusion_lens,
    encoder_patching,
    feature_effect,
    invert,
    prompt_swap,
    prompt_to_prompt,
    steering_sweep,
    trajectory_lens,
)
from diffsight.lenses import SAE, latent_distance
from helpers import SEED, close_image, draw, refusal, same_image
from models import diffusion, language

PROMPT, OTHER, POINT = "a red circle", "a red square", "unet.mid_block"
CALL = {"num_inference_steps": 3, "progress": False}


@pytest.fixture(scope="module")
def model():
    return DiffusionModel(diffusion.stable_diffusion())


@pytest.fixture(scope="module")
def inverted(model):
    return invert(model, diffusion.IMAGE, PROMPT, seed=SEED, **CALL)


@pytest.fixture(scope="module")
def other_latents(model, inverted):
    """What the bare pipeline draws from the noise for another prompt."""
    call = {"num_inference_steps": 3, "guidance_scale": 1.0, "latents": inverted.noise, "output_type": "latent"}
    return [draw(model.pipeline, {**call, "prompt": prompt}) for prompt in (PROMPT, OTHER)]


QUIET = {"progress": False}
IMAGES = {
    "trajectory_lens": lambda model, **k: trajectory_lens(model, PROMPT, **QUIET, **k).image,
    "diffusion_lens": lambda model, **k: diffusion_lens(model, PROMPT, layers=[0, -1], **QUIET, **k).images[-1],
    "attention_maps": lambda model, **k: attention_maps(model, PROMPT, ["circle"], **k).image,
    "attention_from": lambda model, **k: attention_from(model, PROMPT, (0.5, 0.5), **k).image,
    "prompt_to_prompt": lambda model, **k: prompt_to_prompt(model, PROMPT, OTHER, **k).source_image,
    "encoder_patching": lambda model, **k: (
        encoder_patching(model, OTHER, PROMPT, layers=[0], words="square", into="circle", **QUIET, **k).target_image
    ),
    "feature_effect": lambda model, **k: feature_effect(model, SAE(32, 64), PROMPT, 3, point=POINT, **k).images[0],
    "prompt_swap": lambda model, **k: prompt_swap(model, PROMPT, OTHER, latent_distance(), **QUIET, **k).image,
    "steering_sweep": lambda model, **k: steering_sweep(
        model, PROMPT, POINT, torch.ones(32), factors=[0, 9], **QUIET, **k
    ).images[0][0],
}


@pytest.mark.parametrize("name", IMAGES)
def test_without_a_change_it_is_the_reconstruction(model, inverted, name):
    image = IMAGES[name](model, inverted=inverted)
    assert close_image(image, inverted.reconstruction)
    assert not close_image(image, IMAGES[name](model, seed=SEED, num_inference_steps=3))


def test_effects_are_measured_on_the_image(model, inverted, other_latents):
    """The distance of the two prompts' latents, and that of a run in which the whole denoiser is patched."""
    distance = (other_latents[0] - other_latents[1]).square().mean().sqrt().item()
    metric = latent_distance()
    patched = activation_patching(model, PROMPT, OTHER, metric, sites=[POINT, "unet"], inverted=inverted, **QUIET)
    assert patched.target[0].item() == pytest.approx(distance, rel=1e-3)
    assert patched.values[0, 1, 0].item() == pytest.approx(0, abs=1e-3)
    estimated = attribution_patching(model, PROMPT, OTHER, metric, sites=POINT, inverted=inverted, **QUIET)
    assert estimated.target[0].item() == pytest.approx(distance, rel=1e-3)
    ablated = block_ablation(model, PROMPT, metric, sites=POINT, inverted=inverted, **QUIET)
    hook = model.pipeline.unet.mid_block.register_forward_hook(lambda module, args, output: args[0])
    call = {"prompt": PROMPT, "num_inference_steps": 3, "guidance_scale": 1.0, "output_type": "latent"}
    without = draw(model.pipeline, {**call, "latents": inverted.noise})
    hook.remove()
    expected = (without - other_latents[0]).square().mean().sqrt().item()
    assert ablated.values[0, 0, 0].item() == pytest.approx(expected, rel=1e-3)
    traced = causal_tracing(
        model, PROMPT, "red", sites="unet", metric=lambda outcome: outcome.latents.square().mean().sqrt(), samples=1,
        inverted=inverted, **QUIET,
    )  # fmt: skip
    assert traced.clean == pytest.approx(other_latents[0].square().mean().sqrt().item(), rel=1e-3)


def test_other_arguments_take_the_place_of_its_own(model, inverted):
    """Another prompt and guidance, in a run of the bare pipeline from the same noise."""
    changed = trajectory_lens(model, OTHER, guidance_scale=4.0, inverted=inverted, **QUIET)
    call = {"prompt": OTHER, "guidance_scale": 4.0, "num_inference_steps": 3, "latents": inverted.noise}
    assert same_image(changed.image, draw(model.pipeline, call)[0])
    assert changed.prompt == OTHER and changed.seed == SEED


def test_the_controller_of_a_rectified_flow_acts_in_lenses():
    flux = DiffusionModel(diffusion.flux())
    flow = invert(flux, diffusion.IMAGE, PROMPT, eta=0.9, max_sequence_length=diffusion.TOKENS, **CALL)
    seen = trajectory_lens(flux, inverted=flow, **QUIET)
    assert same_image(seen.image, flow.reconstruction)
    assert not same_image(seen.image, trajectory_lens(flux, **flow.arguments, **QUIET).image)


def test_the_call_can_be_made_again_from_its_record(model, inverted, tmp_path):
    result = trajectory_lens(model, inverted=inverted, **QUIET)
    assert "inverted" not in result.call.arguments and result.call.arguments["num_inference_steps"] == 3
    assert torch.equal(result.call.tensors["latents"], inverted.noise)
    result.save(tmp_path)
    record = json.loads((tmp_path / "lens.json").read_text())
    assert record["call"]["arguments"]["latents"] == {"$tensor": "latents"}


def test_it_is_an_argument_of_each_of_them():
    for lens in (
        *map(globals().get, IMAGES), activation_patching, attribution_patching, block_ablation, causal_tracing
    ):  # fmt: skip
        parameter = inspect.signature(lens).parameters["inverted"]
        assert (parameter.kind, parameter.default) == (inspect.Parameter.KEYWORD_ONLY, None)
        assert "inverted: The result of `invert` for an image" in lens.__doc__


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seed": 1}, "an inverted image has its own noise: omit seed"),
        ({"latents": torch.zeros(1, 4, 16, 16)}, "an inverted image has its own noise: omit latents"),
        ({"height": 64}, "the image was inverted with height=32, not with height=64: omit height"),
        ({"num_inference_steps": 9}, "inverted with num_inference_steps=3, not with num_inference_steps=9"),
        ({"timesteps": [9, 1]}, "the image was inverted with its default timesteps"),
        ({"inverted": diffusion.IMAGE}, "inverted must be what invert returns, not Image"),
    ],
)
def test_bad_input(model, inverted, change, words):
    assert words in refusal(trajectory_lens, model, **{"inverted": inverted, **QUIET, **change})


def test_another_model_or_scheduler(inverted):
    pipe = diffusion.stable_diffusion()
    assert same_image(trajectory_lens(DiffusionModel(pipe), inverted=inverted, **QUIET).image, inverted.reconstruction)
    xl = DiffusionModel(diffusion.stable_diffusion_xl())
    message = refusal(trajectory_lens, xl, inverted=inverted, **QUIET)
    assert "inverted by StableDiffusionPipeline" in message and "StableDiffusionXLPipeline: invert it" in message
    pipe.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    message = refusal(trajectory_lens, DiffusionModel(pipe), inverted=inverted, **QUIET)
    assert "inverted with DDIMInverseScheduler, but the pipeline now has DPMSolverMultistepScheduler" in message
    pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    assert "has no inverse" in refusal(trajectory_lens, DiffusionModel(pipe), inverted=inverted, **QUIET)
    with torch.no_grad():
        pipe.unet.conv_out.weight += 1
    assert "with other weights" in refusal(trajectory_lens, DiffusionModel(pipe), inverted=inverted, **QUIET)
    message = refusal(activation_patching, language.model(), "a", "b", latent_distance(), inverted=inverted)
    assert "inverted is for pipelines: omit it with LanguageModel" in message
