"""The trajectory lens, compared with the closed form by hand, with DDIM's own prediction and with the bare pipeline."""

import json
import wave

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from diffsight import DiffusionModel, trajectory_lens
from diffsight.lenses.results.outputs import image_of
from helpers import SEED, close_image, draw, module_at, pipeline_footprint, recorded, refusal, same_image
from models import diffusion, text_encoders

QUIET = {"progress": False, "seed": SEED}


def arguments_of(name):
    return {key: value for key, value in diffusion.PIPELINES[name].inputs().items() if key != "output_type"}


SD = arguments_of("stable_diffusion")


def scheduler_calls(pipe, arguments):
    """Return (model_output, timestep, sample), and what was returned, of every scheduler step of the bare pipeline."""
    with recorded(pipe.scheduler, "step") as calls:
        image = draw(pipe, arguments, SEED)[0]
    return [((*args, *kwargs.values())[:3], output) for (args, kwargs), output in calls], image


def of_alphas(scheduler, i, timestep):
    alpha = scheduler.alphas_cumprod[int(timestep)].double()
    return alpha.sqrt(), (1 - alpha).sqrt()


def of_sigmas(scheduler, i, timestep):
    return 1.0, scheduler.sigmas[i].double()


def of_scaled_sigmas(scheduler, i, timestep):
    sigma = scheduler.sigmas[i].double()
    return 1 / (sigma**2 + 1).sqrt(), sigma / (sigma**2 + 1).sqrt()


def of_flow(scheduler, i, timestep):
    sigma = scheduler.sigmas[i].double()
    return 1 - sigma, sigma


def clean(kind, output, sample, a, b):
    """Return the clean sample in x = a x0 + b e, from the definition of each kind of output."""
    x, o = sample.double(), output.double()
    if kind == "epsilon":
        return (x - b * o) / a
    if kind == "v_prediction":  # of the sample in which the squares of both factors add up to one
        norm = (a**2 + b**2) ** 0.5
        return (a / norm) * (x / norm) - (b / norm) * o
    return o if kind == "sample" else x - b * o


FLOW_SIGMAS = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
SCHEDULERS = {
    "ddpm": (diffusers.DDPMScheduler, {}, of_alphas),
    "ddim": (diffusers.DDIMScheduler, {}, of_alphas),
    "ddim, v": (diffusers.DDIMScheduler, {"prediction_type": "v_prediction"}, of_alphas),
    "ddim, sample": (diffusers.DDIMScheduler, {"prediction_type": "sample"}, of_alphas),
    "pndm": (diffusers.PNDMScheduler, {"skip_prk_steps": True}, of_alphas),
    "lcm": (diffusers.LCMScheduler, {}, of_alphas),
    "euler": (diffusers.EulerDiscreteScheduler, {}, of_sigmas),
    "euler, v": (diffusers.EulerDiscreteScheduler, {"prediction_type": "v_prediction"}, of_sigmas),
    "euler ancestral": (diffusers.EulerAncestralDiscreteScheduler, {}, of_sigmas),
    "heun": (diffusers.HeunDiscreteScheduler, {}, of_sigmas),
    "dpm++": (diffusers.DPMSolverMultistepScheduler, {}, of_scaled_sigmas),
    "dpm++, karras, v": (
        diffusers.DPMSolverMultistepScheduler,
        {"use_karras_sigmas": True, "prediction_type": "v_prediction"},
        of_scaled_sigmas,
    ),
    "dpm++ sde": (diffusers.DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}, of_scaled_sigmas),
    "dpm++ 2m, sample": (diffusers.DPMSolverMultistepScheduler, {"prediction_type": "sample"}, of_scaled_sigmas),
    "dpm++ singlestep": (diffusers.DPMSolverSinglestepScheduler, {}, of_scaled_sigmas),
    "deis": (diffusers.DEISMultistepScheduler, {}, of_scaled_sigmas),
    "kdpm2": (diffusers.KDPM2DiscreteScheduler, {}, of_sigmas),
    "kdpm2 ancestral": (diffusers.KDPM2AncestralDiscreteScheduler, {}, of_sigmas),
    "tcd": (diffusers.TCDScheduler, {}, of_alphas),
    "unipc": (diffusers.UniPCMultistepScheduler, {}, of_scaled_sigmas),
    "unipc, flow": (diffusers.UniPCMultistepScheduler, FLOW_SIGMAS, of_flow),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_prediction_is_the_closed_form(sd, name):
    cls, settings, factors = SCHEDULERS[name]
    sd.scheduler = cls.from_config(sd.scheduler.config, **settings)
    calls, image = scheduler_calls(sd, {**SD, "output_type": "pil"})
    result = trajectory_lens(DiffusionModel(sd), **SD, **QUIET)
    assert result.steps == tuple(range(len(calls)))
    assert same_image(result.image, image)
    for i, ((output, timestep, sample), _) in enumerate(calls):
        expected = clean(sd.scheduler.config.prediction_type, output, sample, *factors(sd.scheduler, i, timestep))
        torch.testing.assert_close(result.latents["noisy"][i], sample[0])
        torch.testing.assert_close(result.latents["prediction"][i].double(), expected[0], rtol=1e-4, atol=1e-4)


def test_ddim_predicts_the_same(sd):
    calls, _ = scheduler_calls(sd, SD)
    result = trajectory_lens(DiffusionModel(sd), **SD, **QUIET)
    scheduler = sd.scheduler
    for i, ((output, timestep, sample), _) in enumerate(calls):
        expected = scheduler.step(output, timestep, sample).pred_original_sample
        torch.testing.assert_close(result.latents["prediction"][i], expected[0], rtol=1e-5, atol=1e-5)


FLOWS = {"flux": "flow", "wan": "flow", "cogvideox": "epsilon", "deepfloyd_if": "epsilon", "two_call_guidance": "flow"}


@pytest.mark.parametrize("name", FLOWS)
def test_other_pipelines(name):
    small = diffusion.PIPELINES[name]
    pipe, arguments = small.build(), arguments_of(name)
    calls, _ = scheduler_calls(pipe, arguments)
    result = trajectory_lens(DiffusionModel(pipe), **arguments, **QUIET)
    factors = of_flow if FLOWS[name] == "flow" else of_alphas
    for i, ((output, timestep, sample), _) in enumerate(calls):
        output = output[:, : sample.shape[1]]  # DeepFloyd IF also predicts a variance
        expected = clean(FLOWS[name], output, sample, *factors(pipe.scheduler, i, timestep))
        torch.testing.assert_close(result.latents["prediction"][i].double(), expected[0], rtol=1e-4, atol=1e-4)
    assert all(len(images) == len(calls) for images in result.images.values())


@pytest.mark.parametrize("cls", [diffusers.FlowMatchHeunDiscreteScheduler, diffusers.FlowMatchLCMScheduler])
def test_other_schedulers_of_flows(cls):
    small = diffusion.PIPELINES["stable_diffusion_3"]
    pipe, arguments = small.build(), arguments_of("stable_diffusion_3")
    pipe.scheduler = cls(shift=3.0)
    with recorded(pipe.scheduler, "step") as calls:  # of the lens's own run, since LCM adds noise without a generator
        result = trajectory_lens(DiffusionModel(pipe), **arguments, **QUIET)
    assert len(result.steps) == (5 if cls is diffusers.FlowMatchHeunDiscreteScheduler else 3)
    for i in result.steps:
        output, timestep, sample = calls[i][0][0][:3]
        expected = clean("flow", output, sample, *of_flow(pipe.scheduler, i, timestep))
        torch.testing.assert_close(result.latents["prediction"][i].double(), expected[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["stable_diffusion", "flux", "wan", "latent_consistency"])
def test_images_are_what_the_pipeline_draws_from_the_latents(name):
    """The bare pipeline, whose last scheduler step returns the prediction."""
    pipe, arguments = diffusion.PIPELINES[name].build(), arguments_of(name)
    result = trajectory_lens(DiffusionModel(pipe), **arguments, steps=iter([0, -1]), **QUIET)
    step, count = pipe.scheduler.step, 0
    for i in range(2):
        count = 0

        def last(*args, i=i, **kwargs):
            nonlocal count
            count += 1
            output = step(*args, **kwargs)
            replaced = result.latents["prediction"][i : i + 1]
            return tuple(replaced for _ in output) if count == result.steps[-1] + 1 else output

        pipe.scheduler.step = last
        assert close_image(result.images["prediction"][i], image_of(draw(pipe, arguments, SEED)[0]))
        del pipe.scheduler.step


def of_edm(scheduler, output, sample, i):
    """Karras et al. 2022: x0 = c_skip x + c_out F, with the signs of v-prediction."""
    sigma, data = scheduler.sigmas[i].double(), scheduler.config.sigma_data
    total = sigma**2 + data**2
    return data**2 / total * sample.double() - sigma * data / total.sqrt() * output.double()


@pytest.mark.parametrize("name", ["audioldm2", "stable_audio"])
def test_sounds(name, tmp_path):
    """The predictions, and the sound that the bare pipeline makes if its last step returns them."""
    pipe, arguments = text_encoders.built(name), {**text_encoders.TEXT_PIPELINES[name].call, "num_inference_steps": 3}
    arguments["prompt"] = "a red circle"
    calls, _ = scheduler_calls(pipe, arguments)
    result = trajectory_lens(DiffusionModel(pipe), **arguments, show=["prediction"], **QUIET)
    for i, ((output, timestep, sample), _) in enumerate(calls):
        if name == "stable_audio":
            expected = of_edm(pipe.scheduler, output, sample, i)
        else:
            expected = clean("epsilon", output, sample, *of_alphas(pipe.scheduler, i, timestep))
        torch.testing.assert_close(result.latents["prediction"][i].double(), expected[0], rtol=1e-4, atol=1e-4)
    step, count = pipe.scheduler.step, 0

    def last(*args, **kwargs):
        nonlocal count
        count += 1
        output = step(*args, **kwargs)
        if count == 3:
            output.prev_sample = result.latents["prediction"][:1]
        return output

    pipe.scheduler.step = last
    sound = np.asarray(draw(pipe, arguments, SEED)[0])
    del pipe.scheduler.step
    np.testing.assert_allclose(np.asarray(result.outputs["prediction"][0]), sound, atol=1e-3)
    np.testing.assert_array_equal(np.asarray(result.output), np.asarray(draw(pipe, arguments, SEED)[0]))
    result.save(tmp_path)
    with wave.open(str(tmp_path / "step_00_prediction.wav")) as file:
        assert file.getframerate() == result.rate == {"audioldm2": 16000, "stable_audio": 4}[name]
        samples = np.frombuffer(file.readframes(file.getnframes()), "<i2").reshape(-1, file.getnchannels()).T
    assert np.abs(samples / 32767 - np.atleast_2d(sound).clip(-1, 1)).max() < 1e-3
    assert (tmp_path / "image.wav").is_file()
    message = refusal(trajectory_lens, DiffusionModel(pipe), **arguments, show="guidance map", **QUIET)
    assert "guidance and guidance map can be shown for images" in message


def test_branches_and_what_guidance_adds(sd):
    """In every batch of Stable Diffusion, the unconditional branch comes first."""
    alphas, outputs = sd.scheduler.alphas_cumprod.double(), []
    hook = sd.unet.register_forward_hook(lambda module, args, output: outputs.append(output[0].double()))
    calls, _ = scheduler_calls(sd, SD)
    hook.remove()
    show = ["cond", "uncond", "guidance", "guidance map"]
    result = trajectory_lens(DiffusionModel(sd), **SD, show=show, **QUIET)
    assert list(result.images) == show
    for i, ((_, timestep, sample), _) in enumerate(calls):
        a, b = alphas[int(timestep)].sqrt(), (1 - alphas[int(timestep)]).sqrt()
        for branch, output in zip(("uncond", "cond"), outputs[i]):
            expected = clean("epsilon", output, sample[0], a, b)
            torch.testing.assert_close(result.latents[branch][i].double(), expected, rtol=1e-4, atol=1e-4)
        added = (result.latents["cond"] - result.latents["uncond"])[i]
        assert result.norms["guidance"][i].item() == pytest.approx(added.double().square().mean().sqrt().item())
        cond, uncond = (np.asarray(result.images[branch][i], dtype=float) for branch in ("cond", "uncond"))
        assert np.abs(np.asarray(result.images["guidance"][i]) - (127.5 + (cond - uncond) / 2)).max() <= 0.5


@pytest.mark.parametrize("name", ["two_call_guidance", "wan", "controlnet", "pixart_sigma"])
def test_branches_in_other_layouts(name):
    """The guided prediction is the same mixture of both branches as in the pipeline."""
    arguments = arguments_of(name)
    scale = arguments.get("true_cfg_scale", arguments["guidance_scale"])
    model = DiffusionModel(diffusion.PIPELINES[name].build())
    found = trajectory_lens(model, **arguments, show=["prediction", "cond", "uncond"], **QUIET).latents
    mixed = found["uncond"] + scale * (found["cond"] - found["uncond"])
    torch.testing.assert_close(found["prediction"], mixed, rtol=1e-3, atol=1e-3 * mixed.abs().max().item())


def test_exits_of_a_unet(sd):
    """Later residual blocks and attentions add nothing; hooks on the bare UNet do the same for one exit."""
    result = trajectory_lens(DiffusionModel(sd), **SD, steps=1, show="cond", exits="blocks", **QUIET)
    names = ["down_blocks.0", "down_blocks.1", "mid_block", "up_blocks.0", "up_blocks.1"]
    assert list(result.images) == ["cond", *names]
    torch.testing.assert_close(result.latents["up_blocks.1"], result.latents["cond"], rtol=1e-3, atol=1e-3)
    inputs = []
    hook = sd.unet.register_forward_pre_hook(lambda m, args, kwargs: inputs.append((args, kwargs)), with_kwargs=True)
    calls, _ = scheduler_calls(sd, SD)
    hook.remove()
    (output, timestep, sample), _ = calls[1]
    args, kwargs = inputs[1]
    hooks = []
    for up in sd.unet.up_blocks:
        hooks += [resnet.conv2.register_forward_hook(lambda m, args, out: out * 0) for resnet in up.resnets]
        for attention in getattr(up, "attentions", ()):
            hooks.append(attention.register_forward_hook(lambda m, args, out: (args[0],)))
    with torch.no_grad():
        output = sd.unet(*args, **kwargs)[0][1]
    for hook in hooks:
        hook.remove()
    expected = clean("epsilon", output, sample[0], *of_alphas(sd.scheduler, 1, timestep))
    torch.testing.assert_close(result.latents["mid_block"][0].double(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["flux", "stable_diffusion_3", "wan", "pixart_sigma"])
def test_exits_of_a_transformer(name):
    """At the last block this is the whole denoiser; at the first, hooks leave out all others."""
    pipe, arguments = diffusion.PIPELINES[name].build(), arguments_of(name)
    result = trajectory_lens(DiffusionModel(pipe), **arguments, steps=0, exits="blocks", **QUIET)
    exits = [column for column in result.images if column not in ("noisy", "prediction")]
    inputs = []
    record = pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: inputs.append((args, kwargs)), with_kwargs=True
    )
    calls, _ = scheduler_calls(pipe, arguments)
    record.remove()
    (_, timestep, sample), _ = calls[0]
    args, kwargs = inputs[0]
    by_path = [module_at(pipe, f"transformer.{path}") for path in exits]

    def image_tokens(output):
        return output if isinstance(output, torch.Tensor) else output[-1]

    for number in (0, len(exits) - 1):
        kept = []
        hooks = [by_path[number].register_forward_hook(lambda m, args, out, kept=kept: kept.append(image_tokens(out)))]
        if number < len(exits) - 1:

            def put(module, args, out, kept=kept):
                return kept[0] if isinstance(out, torch.Tensor) else (*out[:-1], kept[0])

            hooks.append(by_path[-1].register_forward_hook(put))
        with torch.no_grad():
            output = pipe.transformer(*args, **kwargs)[0]
        for hook in hooks:
            hook.remove()
        output = output[-1:, : sample.shape[1]]  # the conditional branch comes last; PixArt predicts a variance
        kind, factors = ("epsilon", of_scaled_sigmas) if name == "pixart_sigma" else ("flow", of_flow)
        expected = clean(kind, output, sample, *factors(pipe.scheduler, 0, timestep))
        found = result.latents[exits[number]].double()
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())


def test_a_pipeline_without_a_prompt():
    pipe = diffusion.PIPELINES["ddpm"].build()
    result = trajectory_lens(DiffusionModel(pipe), num_inference_steps=3, exits="blocks", **QUIET)
    assert result.timesteps == (666, 333, 0)
    assert len(result.images["mid_block"]) == 3


@pytest.mark.parametrize(
    ("steps", "chosen"), [(None, (0, 1, 2)), (-1, (2,)), ([2, 0], (0, 2)), (slice(1, None), (1, 2))]
)
def test_steps(sd, steps, chosen):
    result = trajectory_lens(DiffusionModel(sd), **SD, steps=steps, batch_size=1, **QUIET)
    assert result.steps == chosen
    assert all(len(images) == len(chosen) for images in result.images.values())


def test_the_model_is_left_as_it_was(sd):
    draw(sd, SD)  # sets attributes of the pipeline
    before = pipeline_footprint(sd)
    trajectory_lens(DiffusionModel(sd), **SD, show=["cond", "guidance"], exits="blocks", **QUIET)
    assert pipeline_footprint(sd) == before


def test_edits_of_the_model_count(sd):
    model = DiffusionModel(sd)

    @model.edit
    def edited(run):
        for _ in run.steps:
            run.unet.mid_block.output[:] = 0

    plain, other = (trajectory_lens(one, **SD, **QUIET).latents["prediction"] for one in (model, edited))
    assert not torch.equal(plain, other)
    hook = sd.unet.mid_block.register_forward_hook(lambda module, args, output: output * 0)
    expected = trajectory_lens(model, **SD, **QUIET).latents["prediction"]
    hook.remove()
    torch.testing.assert_close(other, expected)


def test_it_is_saved_and_shown(sd, tmp_path):
    result = trajectory_lens(DiffusionModel(sd), **SD, show=["noisy", "prediction", "guidance map"], **QUIET)
    names = {path.name for path in result.save(tmp_path)}
    assert {"grid.png", "norms.png", "trajectory.gif", "image.png", "lens.json", "lens.safetensors"} <= names
    assert {"step_02_noisy.png", "step_00_guidance_map.png"} <= names
    record = json.loads((tmp_path / "lens.json").read_text())
    assert record["timesteps"] == list(result.timesteps) and record["scheduler"] == "DDIMScheduler"
    assert torch.equal(load_file(tmp_path / "lens.safetensors")["prediction"], result.latents["prediction"])
    with Image.open(tmp_path / "trajectory.gif") as gif:
        assert gif.n_frames > 1
    assert result._repr_png_().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"show": ["latents"]}, "'latents' cannot be shown: choose from noisy"),
        ({"show": []}, "show is empty"),
        ({"steps": 3}, "there is no step 3: the run has 3 steps, 0 to 2"),
        ({"steps": "all"}, "steps are integers or slices, not 'all'"),
        ({"exits": "layers"}, 'exits must be "blocks" or None'),
        ({"seed": [1, 2]}, "one seed, an integer"),
        ({"batch_size": 0}, "batch_size must be 1 or more"),
        ({"output_type": "pt"}, "omit output_type"),
        ({"num_images_per_prompt": 2}, "omit num_images_per_prompt"),
        ({"prompt": ["a", "b"]}, "one prompt, a string, not list"),
        ({"show": "uncond", "guidance_scale": 1.0}, "guidance is off"),
        ({"guidance_skale": 1.0}, "guidance_scale"),
    ],
)
def test_bad_input(sd, change, words):
    assert words in refusal(trajectory_lens, DiffusionModel(sd), **{**SD, **QUIET, **change})


def test_what_cannot_be_predicted_or_has_no_exits(sd):
    assert "takes a DiffusionModel, not Stable" in refusal(trajectory_lens, sd, "a red circle")
    model = DiffusionModel(sd).edit(lambda run: None)
    assert "model with edits" in refusal(trajectory_lens, model, **SD, exits="blocks", **QUIET)
    sd.scheduler = diffusers.IPNDMScheduler()
    assert "IPNDMScheduler has the prediction type None" in refusal(trajectory_lens, DiffusionModel(sd), **SD, **QUIET)


def test_another_run_of_the_same_pipeline_is_open(sd):
    model = DiffusionModel(sd)
    with model.generate(**{**SD, "num_inference_steps": 5}, seed=0) as run:
        for _ in run.steps:
            run.scheduler.step.output
            assert "another run of the pipeline is open" in refusal(trajectory_lens, model, **SD, **QUIET)
            break


def halved(pipeline, index, timestep, tensors):
    return {"latents": tensors["latents"] / 2}


@pytest.mark.parametrize("more", [{}, {"callback_on_step_end": halved}], ids=["pasted", "with a callback"])
def test_latents_that_the_pipeline_changes_after_each_step_are_drawn_as_the_denoiser_gets_them(more):
    pipe = diffusion.stable_diffusion_family(diffusers.StableDiffusionInpaintPipeline)  # which pastes the image
    call = {**SD, "image": diffusion.IMAGE, "mask_image": diffusion.MASK, **more}
    with recorded(pipe.unet, "forward") as calls:
        draw(pipe, call, SEED)
    with torch.no_grad():
        decoded = [pipe.vae.decode(args[0][:1] / pipe.vae.config.scaling_factor).sample for (args, _), _ in calls]
    images = trajectory_lens(DiffusionModel(pipe), **call, show="noisy", **QUIET).images["noisy"]
    assert len(images) == len(decoded)
    for image, pixels in zip(images, decoded):
        assert close_image(image, pipe.image_processor.postprocess(pixels)[0])
