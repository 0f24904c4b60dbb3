"""Latents of a step, images drawn from latents, and what a pipeline makes of a prompt, against the bare pipeline."""

from inspect import signature

import diffusers
import numpy as np
import pytest
import torch

from diffsight import DiffusionModel, OutOfOrderError
from diffsight.errors import AssignmentError
from helpers import SEED, bare_run, draw, drawn, first, refusal, same, same_image, with_first
from models import diffusion

SD = diffusion.PIPELINES["stable_diffusion"].inputs


def test_latents_are_what_the_scheduler_returns(kind, pipe):
    want, calls = bare_run(kind)
    with DiffusionModel(pipe).generate(**kind.inputs(), seed=SEED) as run:
        latents = [step.latents.clone() for step in run.steps]
    assert len(latents) == len(calls["step"])
    assert all(torch.equal(a, first(output)) for a, (_, output) in zip(latents, calls["step"]))
    assert same(want, drawn(run))


def test_latents_can_be_assigned(sd):
    step = sd.scheduler.step
    halved = lambda output: with_first(output, first(output) / 2)  # noqa: E731
    sd.scheduler.step = lambda *args, **kwargs: halved(step(*args, **kwargs))
    want = sd(**SD(), generator=torch.Generator().manual_seed(SEED)).images
    del sd.scheduler.step
    with DiffusionModel(sd).generate(**SD(), seed=SEED) as run:
        for at in run.steps:
            at.latents = at.latents / 2
    assert same(want, run.images)


@pytest.mark.parametrize(
    "value", [0, 1.5, None, [torch.zeros(1, 4, 16, 16)], np.zeros((1, 4, 16, 16))], ids=lambda v: type(v).__name__
)
def test_only_a_tensor_can_be_assigned_to_the_latents(sd, value):
    with pytest.raises(AssignmentError, match=rf"cannot take a {type(value).__name__}") as caught:
        with DiffusionModel(sd).generate(**SD(), seed=SEED) as run:
            for step in run.steps:
                step.latents = value
    assert caught.traceback[-1].path.name == "test_latents.py"
    assert (f"step.latents[:] = {value}" in str(caught.value)) == isinstance(value, (int, float))
    with DiffusionModel(sd).generate(**SD(), seed=SEED) as run:
        for step in run.steps:
            step.latents[:] = 0
    with torch.no_grad():
        assert same(run.images, sd.image_processor.postprocess(sd.vae.decode(torch.zeros(1, 4, 16, 16)).sample, "pt"))


def test_latents_of_a_step_that_the_loop_has_left(sd):
    with pytest.raises(OutOfOrderError, match="latents of step 1 were asked for too late"):
        with DiffusionModel(sd).generate(**SD(), seed=SEED) as run:
            run.scheduler.step.output  # of step 0, which is another value
            (step,) = run.steps[1:2]
            step.latents


@pytest.mark.parametrize("name", ["stable_diffusion", "stable_diffusion_xl", "flux", "pixart_sigma", "wan"])
def test_decoding_draws_what_the_pipeline_draws(name):
    kind = diffusion.PIPELINES[name]
    model, inputs = DiffusionModel(kind.build()), kind.inputs()
    with model.generate(**inputs, seed=SEED) as run:
        latents = [step.latents for step in run.steps]
    torch.manual_seed(0)
    before = torch.get_rng_state()
    images = model.decode(latents[-1], **inputs | {"num_inference_steps": 1})
    assert torch.equal(before, torch.get_rng_state())
    assert same(torch.as_tensor(images), torch.as_tensor(drawn(run)))
    assert len(model.decode(latents, **inputs | {"num_inference_steps": 1})) == len(latents)


def test_the_packaged_pipelines_need_no_arguments(capsys):
    for name in ("clip", "flux"):
        model = DiffusionModel(f"diffsight/shapes-{name}")
        model.set_progress_bar_config(disable=True)
        with model.generate("a red circle", seed=SEED, num_inference_steps=2) as run:
            (*_, latents) = [step.latents for step in run.steps]
            assert not capsys.readouterr().err
        assert same_image(model.decode(latents)[0], run.images[0])


def test_decoding_fits_the_image_that_a_pipeline_requires_to_the_latents():
    kind = diffusion.PIPELINES["img2img"]
    model = DiffusionModel(kind.build())
    with model.generate(**kind.inputs(), seed=SEED) as run:
        latents = [step.latents for step in run.steps]
    for given in ({}, {"strength": 0.5}):  # which would leave no step
        assert same(model.decode(latents[-1], output_type="pt", **given), run.images)


@pytest.mark.parametrize("given", [{}, {"image": diffusion.IMAGE, "mask_image": diffusion.MASK}])
def test_decoding_pastes_nothing_into_the_latents(given):
    pipe = diffusion.stable_diffusion_family(diffusers.StableDiffusionInpaintPipeline)  # which pastes after each step
    latents = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        decoded = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
    options = {"output_type": "pt", "height": diffusion.SIDE, "width": diffusion.SIDE}
    images = DiffusionModel(pipe).decode(latents, **given, **options)
    assert same(images, pipe.image_processor.postprocess(decoded, "pt"))


def test_decoding_what_a_pipeline_returns_that_pastes_into_the_latents():
    kind = diffusion.PIPELINES["inpaint"]
    pipe = diffusion.stable_diffusion_family(diffusers.StableDiffusionInpaintPipeline)
    model, starts = DiffusionModel(pipe), []
    with model.generate(**kind.inputs() | {"output_type": "latent"}, seed=SEED) as run:
        for _ in run.steps:
            starts.append(run.unet.input[:1].clone())
    images = model.decode(run.images, output_type="pt")
    assert same(images, model.generate(**kind.inputs(), seed=SEED).images)
    calls = []
    step = pipe.scheduler.step
    pipe.scheduler.step = lambda output, t, sample, **more: calls.append(sample) or step(output, t, sample, **more)
    draw(pipe, kind.inputs())
    del pipe.scheduler.step
    assert same(starts, calls)


def test_decoding_where_the_pipeline_puts_the_first_frame_before_the_latents():
    kind = diffusion.PIPELINES["ltx"]
    pipe = diffusion.quiet_pipeline(diffusers.LTXImageToVideoPipeline, **kind.build().components)
    model, inputs = DiffusionModel(pipe), {**kind.inputs(), "image": diffusion.IMAGE}
    with model.generate(**inputs, seed=SEED) as run:
        latents = [step.latents for step in run.steps]
    frames = model.decode(latents[-1], **inputs | {"num_inference_steps": 1, "seed": SEED})
    assert same(torch.as_tensor(frames), torch.as_tensor(drawn(run)))


def test_latents_that_cannot_be_drawn(sd):
    model = DiffusionModel(sd)
    assert "pass the arguments of the call that made them" in refusal(model.decode, torch.zeros(1, 4, 3, 3), **SD())
    for wrong in ("latents", [], [torch.zeros(1, 4, 3, 3), torch.zeros(1, 4, 4, 4)], None):
        assert refusal(model.decode, wrong).startswith("latents must be a tensor")


def two_controlnets():
    nets = [diffusion.controlnet_model(seed=3), diffusion.controlnet_model(seed=4)]
    return diffusion.stable_diffusion_family(diffusers.StableDiffusionControlNetPipeline, controlnet=nets)


def test_a_pipeline_that_cannot_make_a_single_step(sd):
    sd.scheduler = diffusers.PNDMScheduler.from_config(sd.scheduler.config, skip_prk_steps=False)
    latents = torch.zeros(1, 4, 16, 16)
    assert "cannot make a single step" in refusal(DiffusionModel(sd).decode, latents)
    model = DiffusionModel(two_controlnets())
    assert "`image` must be type `list`). Pass the arguments of the call" in refusal(model.decode, latents)
    images = model.decode(latents, image=[diffusion.IMAGE] * 2, output_type="pt")
    with torch.no_grad():
        assert same(images, sd.image_processor.postprocess(model.vae.decode(latents).sample, "pt"))


def test_errors_of_an_edit_are_raised_unchanged(sd):
    model = DiffusionModel(sd).edit(lambda run: [][run.encode_prompt.output[0].shape[0]])
    for call in (lambda: model.decode(torch.zeros(1, 4, 16, 16)), lambda: model.encode("a red circle")):
        with pytest.raises(IndexError):
            call()


def flux_inpainting():
    parts = {name: part for name, part in diffusion.flux().components.items() if "image" not in name}
    return diffusion.quiet_pipeline(diffusers.FluxInpaintPipeline, **parts)


def video_from_an_image():
    return diffusion.quiet_pipeline(diffusers.LTXImageToVideoPipeline, **diffusion.PIPELINES["ltx"].build().components)


@pytest.mark.parametrize("build", [diffusion.controlnet, flux_inpainting, video_from_an_image])
def test_a_prompt_is_encoded_without_the_images_that_a_pipeline_requires(build):
    pipe = build()
    with torch.no_grad():
        want = pipe.encode_prompt(
            prompt="a red circle",
            device="cpu",
            **{"prompt_2": None} if "prompt_2" in signature(pipe.encode_prompt).parameters else {},
            **{"num_images_per_prompt": 1, "do_classifier_free_guidance": True}
            if build is diffusion.controlnet
            else {},
        )
    assert same(DiffusionModel(pipe).encode("a red circle"), want)


def test_a_prompt_of_a_pipeline_that_needs_more():
    model = DiffusionModel(two_controlnets())
    assert "Pass what it needs, as in model.encode(prompt, image=image)" in refusal(model.encode, "a red circle")
    embeddings, _ = model.encode("a red circle", image=[diffusion.IMAGE] * 2)
    assert same(embeddings, DiffusionModel(diffusion.stable_diffusion()).encode("a red circle")[0])


def test_a_prompt_is_encoded_as_the_pipeline_does_it(sd):
    model = DiffusionModel(sd)
    assert refusal(model.encode, "a", negative_prompt=["b", "c"]).endswith(")")  # no advice to pass an image
    embeddings, negative = model.encode("a red circle", guidance_scale=5.0)
    assert not embeddings.requires_grad
    with torch.no_grad():
        wanted = sd.encode_prompt("a red circle", "cpu", 1, do_classifier_free_guidance=True)
    assert torch.equal(embeddings, wanted[0]) and torch.equal(negative, wanted[1])
    inputs = {**SD(), "guidance_scale": 5.0}
    again = {**inputs, "prompt": None, "prompt_embeds": embeddings, "negative_prompt_embeds": negative}
    assert same(
        model.generate(**inputs | {"prompt": "a red circle"}, seed=SEED).images,
        model.generate(**{k: v for k, v in again.items() if k != "negative_prompt"}, seed=SEED).images,
    )


def test_a_pipeline_without_prompts_encodes_none():
    model = DiffusionModel(diffusion.PIPELINES["ddpm"].build())
    assert refusal(model.encode, "a red circle").startswith("DDPMPipeline has no encode_prompt")
