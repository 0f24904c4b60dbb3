"""DiffusionModel: runs of small random pipelines against the bare pipeline, with hooks and patches written by hand."""

import copy
import functools
import textwrap
from contextlib import ExitStack, contextmanager

import diffusers
import pytest
import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import nn

from diffsight import DiffusionModel, OutOfOrderError
from diffsight.errors import InputError, NoRunError, PointNotFoundError, RunClosedError
from helpers import SEED, draw, drawn, first, hooked, pipeline_footprint, same, with_first
from models import diffusion

# Heun's scheduler steps twice in every inference step but the last.
SECOND_ORDER = diffusion.SmallPipeline(
    lambda: diffusion.with_second_order(diffusion.stable_diffusion()),
    diffusion.PIPELINES["stable_diffusion"].inputs,
    denoiser="unet",
    denoiser_block="unet.mid_block",
    text_encoder_layer="text_encoder.encoder.layers.1",
    steps=5,
)
KINDS = {**diffusion.PIPELINES, "second_order": SECOND_ORDER}
TEXT = [name for name, kind in KINDS.items() if kind.text_encoder_layer]
LATENT = [name for name, kind in KINDS.items() if kind.decode]


@pytest.fixture(params=KINDS)
def kind(request):
    return KINDS[request.param]


@pytest.fixture
def pipe(kind):
    return kind.build()


SD = diffusion.PIPELINES["stable_diffusion"].inputs


# By hand


@contextmanager
def patched(owner, name, around):
    """`around(original, *args, **kwargs)` in the place of a method of one object."""
    original = getattr(owner, name)
    owner.__dict__[name] = functools.wraps(original)(functools.partial(around, original))
    try:
        yield
    finally:
        del owner.__dict__[name]


@contextmanager
def recorded(owner, name="forward"):
    """The calls of a method, or of a module's forward: a list of (inputs, output), copied as they pass."""
    calls = []

    def keep(original, *args, **kwargs):
        inputs = copy.deepcopy((args, {k: v for k, v in kwargs.items() if k != "generator"}))
        output = original(*args, **kwargs)
        calls.append((inputs, copy.deepcopy(output)))
        return output

    with patched(owner, name, keep):
        yield calls


def module_at(pipe, path):
    component, _, rest = path.partition(".")
    return getattr(pipe, component).get_submodule(rest)


@functools.cache
def bare_run(kind):
    """What the bare pipeline draws, and the calls of its parts meanwhile. One run of each kind is enough for all tests:
    it is built with the same weights each time."""
    pipe = kind.build()
    watched = {"block": (module_at(pipe, kind.denoiser_block), "forward"), "step": (pipe.scheduler, "step")}
    if kind.text_encoder_layer:
        watched["layer"] = (module_at(pipe, kind.text_encoder_layer), "forward")
    if kind.decode:
        watched["decode"] = (pipe.vae, "decode")
    with ExitStack() as stack:
        calls = {name: stack.enter_context(recorded(*method)) for name, method in watched.items()}
        return draw(pipe, kind.inputs()), calls


# Unread runs


def test_an_unread_run_gives_the_bits_of_the_bare_pipeline(kind, pipe):
    want = draw(pipe, kind.inputs())
    model = DiffusionModel(pipe)
    assert torch.equal(drawn(model.generate(**kind.inputs(), seed=SEED)), want)
    with model.generate(**kind.inputs(), seed=SEED) as run:
        pass
    assert torch.equal(drawn(run), want)


def test_walking_through_the_steps_changes_nothing(kind, pipe):
    want, _ = bare_run(kind)
    with DiffusionModel(pipe).generate(**kind.inputs(), seed=SEED) as run:
        for _ in run.steps:
            pass
    assert torch.equal(drawn(run), want)


def test_without_a_seed_the_global_generator_is_drawn_from(sd):
    torch.manual_seed(SEED)
    want = sd(**SD())[0]
    torch.manual_seed(SEED)
    assert torch.equal(DiffusionModel(sd).generate(**SD()).images, want)


def test_a_generator_of_ones_own_is_passed_on(sd):
    model = DiffusionModel(sd)
    run = model.generate(**SD(), generator=torch.Generator().manual_seed(SEED))
    assert torch.equal(run.images, draw(sd, SD()))


def test_the_defaults_of_the_pipeline_are_kept(sd):
    with recorded(sd.scheduler, "step") as steps:
        want = draw(sd, {"prompt": "a red circle"})[0]
    with DiffusionModel(sd).generate("a red circle", seed=SEED) as run:
        walked = sum(1 for _ in run.steps)
    assert walked == len(steps) == 50
    assert run.images[0].tobytes() == want.tobytes()


def test_the_result_is_what_the_pipeline_returned(sd):
    model = DiffusionModel(sd)
    result = model.generate(**SD(), seed=SEED).result
    assert type(result) is type(sd(**SD()))
    run = model.generate(**SD(), seed=SEED, return_dict=False)
    assert isinstance(run.result, tuple)
    assert torch.equal(run.images, result.images)
    assert run.finish() is run.result


def test_calling_the_model_calls_the_pipeline(sd):
    generator = torch.Generator().manual_seed(SEED)
    assert torch.equal(DiffusionModel(sd)(**SD(), generator=generator).images, draw(sd, SD()))


def test_nothing_runs_before_it_is_asked_for(sd):
    with recorded(sd.text_encoder) as encoded, recorded(sd.unet) as denoised:
        run = DiffusionModel(sd).generate(**SD(), seed=SEED)
        assert (len(encoded), len(denoised)) == (0, 0)
        _ = run.text_encoder.layers[0].output
        assert (len(encoded), len(denoised)) == (0, 0)  # it waits inside of the first call
        run.finish()
        assert (len(encoded), len(denoised)) == (2, 3)


def test_pictures_and_videos_are_told_apart():
    video = diffusion.PIPELINES["ltx"]
    with pytest.raises(InputError, match="no images, it has frames"):
        _ = DiffusionModel(video.build()).generate(**video.inputs(), seed=0).images
    with pytest.raises(InputError, match="no frames, it has images"):
        _ = DiffusionModel(diffusion.stable_diffusion()).generate(**SD(), seed=0).frames


def test_an_error_of_the_pipeline_comes_out_as_it_is(sd):
    with pytest.raises(ValueError) as bare:
        sd(**SD(), height=33, width=33)
    with pytest.raises(ValueError) as error:
        _ = DiffusionModel(sd).generate(**SD(), height=33, width=33, seed=0).images
    assert str(error.value) == str(bare.value)


# Steps


def test_there_is_a_step_for_every_call_of_the_scheduler(kind, pipe):
    calls = bare_run(kind)[1]["step"]
    told = [float(kwargs.get("timestep", args[1] if len(args) > 1 else None)) for (args, kwargs), _ in calls]
    with DiffusionModel(pipe).generate(**kind.inputs(), seed=SEED) as run:
        steps = [(step.index, step.timestep, step.component) for step in run.steps]
    indices, timesteps, components = zip(*steps)
    assert len(steps) == len(calls) == kind.steps
    assert indices == tuple(range(kind.steps))
    assert timesteps == pytest.approx(told, rel=1e-5)
    # Each names the component that begins it: a ControlNet runs before the UNet that it steers.
    assert set(components) == {"controlnet" if "controlnet" in pipe.components else kind.denoiser}


@pytest.mark.parametrize("sigmas", [[1.0, 0.5, 1e-3], [1.0, 0.6, 2e-4]])
def test_timesteps_near_the_end_of_the_schedule_are_not_mistaken(sigmas):
    kind = diffusion.PIPELINES["flux"]  # tells its transformer t / 1000: 1.0 at the beginning
    pipe, inputs = kind.build(), {**kind.inputs(), "sigmas": sigmas}
    with recorded(pipe.scheduler, "step") as calls:
        draw(pipe, inputs)
    told = [float(args[1]) for (args, _), _ in calls]
    assert told[0] == pytest.approx(1000)
    with DiffusionModel(pipe).generate(**inputs, seed=SEED) as run:
        assert [step.timestep for step in run.steps] == pytest.approx(told, rel=1e-5)


def test_a_part_of_the_steps(kind, pipe):
    want, calls = bare_run(kind)
    with DiffusionModel(pipe).generate(**kind.inputs(), seed=SEED) as run:
        seen = [(step.index, first(run[kind.denoiser_block].output).clone()) for step in run.steps[1:3]]
    assert [index for index, _ in seen] == [1, 2]
    for index, output in seen:
        assert torch.equal(output, first(calls["block"][index * kind.calls_per_step][1]))
    assert torch.equal(drawn(run), want)


def test_leaving_the_loop_early_lets_the_model_run_on(sd):
    with DiffusionModel(sd).generate(**SD(), seed=SEED) as run:
        for step in run.steps:
            if step.index == 1:
                break
        latents = run.vae.decode.input.clone()
    with recorded(sd.vae, "decode") as calls:
        assert torch.equal(draw(sd, SD()), run.images)
    assert torch.equal(calls[0][0][0][0], latents)


def test_both_calls_of_two_call_guidance():
    for name in ("two_call_guidance", "wan"):
        kind = diffusion.PIPELINES[name]
        pipe = kind.build()
        calls = bare_run(kind)[1]["block"]
        assert len(calls) == 2 * kind.steps
        with DiffusionModel(pipe).generate(**kind.inputs(), seed=SEED) as run:
            for step in run.steps:
                block = run[kind.denoiser_block]
                for branch in (0, 1):
                    assert same(block.calls[branch].output, calls[2 * step.index + branch][1])


class SteppingACopy(diffusers.DDPMPipeline):
    """Denoises with a copy of its scheduler, as LTX-2 does, and keeps the copy."""

    @torch.no_grad()
    def __call__(self, generator=None, num_inference_steps=3):
        scheduler = self.__dict__["last"] = copy.deepcopy(self.scheduler)
        scheduler.set_timesteps(num_inference_steps)
        config = self.unet.config
        sample = randn_tensor((1, config.in_channels, config.sample_size, config.sample_size), generator)
        for timestep in scheduler.timesteps:
            noise = self.unet(sample, timestep).sample
            sample = scheduler.step(noise, timestep, sample, generator=generator).prev_sample
        return diffusers.ImagePipelineOutput(images=sample)


@pytest.fixture(params=["DDPMScheduler", "FlowMatchEulerDiscreteScheduler"])
def copying(request):
    return SteppingACopy(unet=diffusion.ddpm().unet, scheduler=getattr(diffusers, request.param)())


def test_a_pipeline_that_steps_a_copy_of_its_scheduler(copying):
    want = draw(copying, {})
    timesteps = copying.last.timesteps.tolist()
    own = copy.deepcopy(vars(copying.scheduler))
    with DiffusionModel(copying).generate(seed=SEED) as run:
        steps = [(step.index, step.timestep) for step in run.steps]
    assert torch.equal(run.images, want)
    assert [index for index, _ in steps] == [0, 1, 2]
    assert [timestep for _, timestep in steps] == pytest.approx(timesteps, rel=1e-5)
    assert same(vars(copying.scheduler), own)  # the pipeline's own scheduler has not been stepped


def test_a_step_of_a_copied_scheduler_can_be_edited(copying, monkeypatch):
    original, calls = type(copying.scheduler).step, []

    def dim(self, *args, **kwargs):
        calls.append(None)
        output = original(self, *args, **kwargs)
        return with_first(output, output.prev_sample * 0.5) if len(calls) == 2 else output

    with monkeypatch.context() as patch:
        patch.setattr(type(copying.scheduler), "step", dim)
        want = draw(copying, {})
    with DiffusionModel(copying).generate(seed=SEED) as run:
        for step in run.steps:
            if step.index == 1:
                output = run.scheduler.step.output
                run.scheduler.step.output = with_first(output, output.prev_sample * 0.5)
    assert torch.equal(run.images, want)


def test_a_copy_of_the_scheduler_that_is_kept_is_an_ordinary_one(copying):
    draw(copying, {})
    attributes = set(vars(copying.last))
    with DiffusionModel(copying).generate(seed=SEED) as run:
        for _ in run.steps:
            pass
    assert type(copying.last) is type(copying.scheduler)
    assert set(vars(copying.last)) == attributes


class TwoSamplers(diffusers.DiffusionPipeline):
    """A prior and a decoder with a scheduler each, as in Kandinsky and Wuerstchen."""

    def __init__(self, prior, prior_scheduler, unet, scheduler):
        super().__init__()
        self.register_modules(prior=prior, prior_scheduler=prior_scheduler, unet=unet, scheduler=scheduler)

    @torch.no_grad()
    def __call__(self, generator=None):
        sample = randn_tensor((1, 3, diffusion.SIDE, diffusion.SIDE), generator)
        for net, scheduler, count in ((self.prior, self.prior_scheduler, 2), (self.unet, self.scheduler, 3)):
            scheduler.set_timesteps(count)
            for timestep in scheduler.timesteps:
                sample = scheduler.step(net(sample, timestep).sample, timestep, sample, generator=generator).prev_sample
        return diffusers.ImagePipelineOutput(images=sample)


def test_the_steps_of_two_samplers():
    ddpm = diffusers.DDPMScheduler()
    flow = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe = TwoSamplers(diffusion.ddpm().unet, flow, diffusion.ddpm().unet, ddpm)
    want = draw(pipe, {})
    told = flow.timesteps.tolist() + ddpm.timesteps.tolist()
    with DiffusionModel(pipe).generate(seed=SEED) as run:
        steps = [(step.index, step.component, step.timestep) for step in run.steps]
    assert torch.equal(run.images, want)
    assert [step[:2] for step in steps] == list(enumerate(["prior"] * 2 + ["unet"] * 3))
    assert [timestep for *_, timestep in steps] == pytest.approx(told, rel=1e-5)


class WithoutScheduler(diffusers.DiffusionPipeline):
    """Takes steps of its own."""

    def __init__(self, unet):
        super().__init__()
        self.register_modules(unet=unet)

    @torch.no_grad()
    def __call__(self, generator=None):
        sample = randn_tensor((1, 3, diffusion.SIDE, diffusion.SIDE), generator)
        for timestep in (900, 500, 100):
            sample = sample - 0.1 * self.unet(sample, timestep).sample
        return diffusers.ImagePipelineOutput(images=sample)


def test_without_a_scheduler_a_step_is_a_call_of_the_denoiser():
    pipe = WithoutScheduler(diffusion.ddpm().unet)
    with recorded(pipe.unet.mid_block) as calls:
        want = draw(pipe, {})
    with DiffusionModel(pipe).generate(seed=SEED) as run:
        for step in run.steps:
            assert step.timestep == (900, 500, 100)[step.index]
            assert torch.equal(run.unet.mid_block.output, calls[step.index][1])
    assert step.index == 2
    assert torch.equal(run.images, want)


# Reading


def test_reading_a_block_in_every_step(kind, pipe):
    want, calls = bare_run(kind)
    inputs, outputs = [], []
    with DiffusionModel(pipe).generate(**kind.inputs(), seed=SEED) as run:
        for _ in run.steps:
            block = run[kind.denoiser_block]
            inputs.append(copy.deepcopy(block.inputs))
            outputs.append(copy.deepcopy(block.output))
    assert torch.equal(drawn(run), want)
    first_calls = calls["block"][:: kind.calls_per_step]
    assert len(first_calls) == len(inputs) == kind.steps
    assert same(inputs, [call[0] for call in first_calls])
    assert same(outputs, [call[1] for call in first_calls])
    assert not same(outputs[0], outputs[1])


def test_reading_latents_between_the_steps(kind, pipe):
    want, calls = bare_run(kind)
    noise, latents = [], []
    with DiffusionModel(pipe).generate(**kind.inputs(), seed=SEED) as run:
        for _ in run.steps:
            noise.append(run.scheduler.step.input.clone())
            latents.append(first(run.scheduler.step.output).clone())
    assert torch.equal(drawn(run), want)
    assert same(noise, [args[0] for (args, _), _ in calls["step"]])
    assert same(latents, [first(output) for _, output in calls["step"]])


@pytest.mark.parametrize("kind", TEXT, indirect=True)
def test_reading_a_layer_of_the_text_encoder(kind, pipe):
    want, calls = bare_run(kind)
    with DiffusionModel(pipe).generate(**kind.inputs(), seed=SEED) as run:
        seen = copy.deepcopy(run[kind.text_encoder_layer].output)
    assert same(seen, calls["layer"][0][1])
    assert torch.equal(drawn(run), want)


@pytest.mark.parametrize("kind", LATENT, indirect=True)
def test_reading_at_the_vae(kind, pipe):
    want, calls = bare_run(kind)
    with DiffusionModel(pipe).generate(**kind.inputs(), seed=SEED) as run:
        latents = run.vae.decode.input.clone()
        decoded = copy.deepcopy(run.vae.decode.output)
    ((args, _), output), *_ = calls["decode"]
    assert same((latents, decoded), (args[0], output))
    assert torch.equal(drawn(run), want)


@pytest.mark.parametrize("kind", ["img2img", "inpaint"], indirect=True)
def test_reading_what_the_vae_encodes(kind, pipe):
    with recorded(pipe.vae, "encode") as calls:
        draw(pipe, kind.inputs())
    with DiffusionModel(pipe).generate(**kind.inputs(), seed=SEED) as run:
        for call, ((args, _), output) in enumerate(calls):
            assert torch.equal(run.vae.encode.calls[call].input, args[0])
            assert torch.equal(run.vae.encode.calls[call].output.latent_dist.mean, output.latent_dist.mean)


def test_reading_what_the_prompt_became(sd):
    want = sd.encode_prompt("a red circle", "cpu", 1, True)
    ids = sd.tokenizer("a red circle", padding="max_length", max_length=77, return_tensors="pt").input_ids
    with DiffusionModel(sd).generate("a red circle", num_inference_steps=1, seed=SEED) as run:
        tokens = run.tokenizer.output.input_ids.clone()
        encoded = run.encode_prompt.output
    assert torch.equal(tokens, ids)
    assert same(encoded, want)


# Editing: each equals a hook, or a patch, written by hand


@pytest.mark.parametrize("kind", TEXT, indirect=True)
def test_editing_a_layer_of_the_text_encoder(kind, pipe):
    (plain, _), calls = bare_run(kind), []

    def double(module, args, output):
        calls.append(None)
        return with_first(output, first(output) * 2) if len(calls) == 1 else output  # the prompt comes first

    with hooked(module_at(pipe, kind.text_encoder_layer), double):
        want = draw(pipe, kind.inputs())
    assert not torch.equal(want, plain)

    with DiffusionModel(pipe).generate(**kind.inputs(), seed=SEED) as run:
        output = run[kind.text_encoder_layer].output
        run[kind.text_encoder_layer].output = with_first(output, first(output) * 2)
    assert torch.equal(drawn(run), want)


def test_editing_a_block_in_step_1_alone(kind, pipe):
    (plain, _), calls = bare_run(kind), []

    def negate(module, args, output):
        calls.append(None)
        chosen = len(calls) == 1 + kind.calls_per_step
        return with_first(output, -first(output)) if chosen else output

    with hooked(module_at(pipe, kind.denoiser_block), negate):
        want = draw(pipe, kind.inputs())
    assert not torch.equal(want, plain)

    def replace(block):
        block.output = with_first(block.output, -first(block.output))

    def edit_in_place(block):
        first(block.output).neg_()

    for edit in (replace, edit_in_place):
        with DiffusionModel(pipe).generate(**kind.inputs(), seed=SEED) as run:
            for step in run.steps:
                if step.index == 1:
                    edit(run[kind.denoiser_block])
        assert torch.equal(drawn(run), want), edit.__name__


def test_editing_what_a_block_is_given_in_step_1(kind, pipe):
    (plain, _), calls = bare_run(kind), []

    def halve(original, *args, **kwargs):
        calls.append(None)
        if len(calls) == 1 + kind.calls_per_step:
            if args:
                args = (args[0] / 2, *args[1:])
            else:
                kwargs = {**kwargs, next(iter(kwargs)): next(iter(kwargs.values())) / 2}
        return original(*args, **kwargs)

    with patched(module_at(pipe, kind.denoiser_block), "forward", halve):
        want = draw(pipe, kind.inputs())
    assert not torch.equal(want, plain)

    with DiffusionModel(pipe).generate(**kind.inputs(), seed=SEED) as run:
        for step in run.steps:
            if step.index == 1:
                run[kind.denoiser_block].input = run[kind.denoiser_block].input / 2
    assert torch.equal(drawn(run), want)


@pytest.mark.parametrize("point", ["input", "output"])
def test_editing_a_step_of_the_scheduler(kind, pipe, point):
    (plain, _), calls = bare_run(kind), []

    def scale(original, noise, *args, **kwargs):
        calls.append(None)
        if len(calls) != 2:
            return original(noise, *args, **kwargs)
        if point == "input":
            return original(noise * 0.5, *args, **kwargs)
        output = original(noise, *args, **kwargs)
        return with_first(output, first(output) * 0.5)

    with patched(pipe.scheduler, "step", scale):
        want = draw(pipe, kind.inputs())
    assert not torch.equal(want, plain)

    with DiffusionModel(pipe).generate(**kind.inputs(), seed=SEED) as run:
        for step in run.steps:
            if step.index == 1 and point == "input":
                run.scheduler.step.input = run.scheduler.step.input * 0.5
            elif step.index == 1:
                output = run.scheduler.step.output
                run.scheduler.step.output = with_first(output, first(output) * 0.5)
    assert torch.equal(drawn(run), want)


@pytest.mark.parametrize("kind", LATENT, indirect=True)
def test_editing_what_the_vae_decodes(kind, pipe):
    (plain, _), seen = bare_run(kind), []

    def flip(original, latents, *args, **kwargs):
        seen.append(latents.flip(-1))
        return original(seen[0], *args, **kwargs)

    with patched(pipe.vae, "decode", flip):
        want = draw(pipe, kind.inputs())
    assert not torch.equal(want, plain)

    for ahead in (False, True):
        with DiffusionModel(pipe).generate(**kind.inputs(), seed=SEED) as run:
            run.vae.decode.input = seen[0] if ahead else run.vae.decode.input.flip(-1)
        assert torch.equal(drawn(run), want), f"{ahead=}"


@pytest.mark.parametrize("kind", LATENT, indirect=True)
def test_leaving_the_vae_out(kind, pipe):
    want, calls = bare_run(kind)
    ((_, decoded),) = calls["decode"]
    with DiffusionModel(pipe).generate(**kind.inputs(), seed=SEED + 1) as run:
        run.vae.decode.skip(decoded)
    assert torch.equal(drawn(run), want)  # decoded in another run


def test_editing_what_the_prompt_became(sd):
    inputs = SD()
    other = {**inputs, "prompt": "a green square"}
    want, encoded = draw(sd, other), sd.encode_prompt(other["prompt"], "cpu", 1, True)
    assert not torch.equal(want, draw(sd, inputs))
    with DiffusionModel(sd).generate(**inputs, seed=SEED) as run:
        run.encode_prompt.output = encoded
    assert torch.equal(run.images, want)


def test_editing_the_tokens(sd):
    red, green = (sd.tokenizer(word, add_special_tokens=False).input_ids[0] for word in ("red", "green"))
    want = draw(sd, {**SD(), "prompt": SD()["prompt"].replace("red", "green")})
    with DiffusionModel(sd).generate(**SD(), seed=SEED) as run:
        ids = run.tokenizer.output.input_ids
        ids[ids == red] = green
    assert torch.equal(run.images, want)


def test_a_value_of_a_step_that_has_ended_is_too_late(sd):
    with DiffusionModel(sd).generate(**SD(), seed=SEED) as run:
        for step in run.steps:
            if step.index == 1:
                _ = run.scheduler.step.output
                with pytest.raises(OutOfOrderError, match=r"unet\.mid_block\.output"):
                    _ = run.unet.mid_block.output
                with pytest.raises(OutOfOrderError, match=r"text_encoder"):
                    _ = run.text_encoder.layers[0].output


# Seeds


def batch_of(kind):
    """Inputs of two pictures, or of two prompts."""
    if "prompt" not in kind.inputs():
        return {**kind.inputs(), "batch_size": 2}
    return {**kind.inputs(), "prompt": ["a red circle", "a blue square above a green circle"]}


# An inpainting pipeline encodes the masked picture once for a batch, with the first generator.
BATCHED = [name for name in KINDS if name != "inpaint"]


@pytest.mark.parametrize("kind", BATCHED, indirect=True)
def test_each_picture_of_a_batch_has_a_seed_of_its_own(kind, pipe):
    inputs = batch_of(kind)
    batch = drawn(DiffusionModel(pipe).generate(**inputs, seed=5))
    assert len(batch) == 2
    for i, picture in enumerate(batch):
        single = {**inputs, "prompt": inputs["prompt"][i]} if "prompt" in inputs else {**inputs, "batch_size": 1}
        assert torch.allclose(picture, draw(pipe, single, 5 + i)[0], atol=1e-4)


@pytest.mark.parametrize("seeds", [[9, 4], (7, 7)], ids=str)
def test_a_seed_for_each_picture(sd, seeds):
    inputs = batch_of(diffusion.PIPELINES["stable_diffusion"])
    batch = DiffusionModel(sd).generate(**inputs, seed=seeds).images
    assert len(batch) == 2
    for picture, prompt, seed in zip(batch, inputs["prompt"], seeds):
        assert torch.allclose(picture, draw(sd, {**inputs, "prompt": prompt}, seed)[0], atol=1e-4)


def test_several_pictures_of_each_prompt(sd):
    prompts = ["a red circle", "a blue square"]
    images = DiffusionModel(sd).generate(**{**SD(), "prompt": prompts}, num_images_per_prompt=2, seed=5).images
    assert len(images) == 4
    for i, image in enumerate(images):
        want = draw(sd, {**SD(), "prompt": prompts[i // 2]}, seed=5 + i)[0]
        assert torch.allclose(image, want, atol=1e-4)


def test_several_videos_of_a_prompt():
    kind = diffusion.PIPELINES["ltx"]
    pipe = kind.build()
    frames = DiffusionModel(pipe).generate(**kind.inputs(), num_videos_per_prompt=2, seed=5).frames
    for i in range(2):
        assert torch.allclose(frames[i], draw(pipe, kind.inputs(), seed=5 + i)[0], atol=1e-4)


def test_prompts_that_are_encoded_already_are_counted_too(sd):
    inputs = SD()
    encoded, negative = sd.encode_prompt(["a red circle", "a blue square"], "cpu", 1, True)
    del inputs["prompt"]
    inputs |= {"prompt_embeds": encoded, "negative_prompt_embeds": negative}
    images = DiffusionModel(sd).generate(**inputs, seed=5).images
    for i, prompt in enumerate(["a red circle", "a blue square"]):
        assert torch.allclose(images[i], draw(sd, {**SD(), "prompt": prompt}, 5 + i)[0], atol=1e-4)


def test_a_seed_draws_the_same_again_and_another_something_else(sd):
    model = DiffusionModel(sd)
    once = model.generate(**SD(), seed=5).images
    assert torch.equal(model.generate(**SD(), seed=5).images, once)
    assert not torch.equal(model.generate(**SD(), seed=6).images, once)


def test_a_seed_does_not_touch_the_global_generator(sd):
    before = torch.get_rng_state()
    _ = DiffusionModel(sd).generate(**SD(), seed=5).images
    assert torch.equal(torch.get_rng_state(), before)


def test_a_call_that_hides_its_arguments_can_be_seeded(sd):
    class Hiding(type(sd)):
        def __call__(self, *args, **kwargs):
            return super().__call__(*args, **kwargs)

    model = DiffusionModel(Hiding(**sd.components, requires_safety_checker=False))
    model.set_progress_bar_config(disable=True)
    assert torch.equal(model.generate(**SD(), seed=SEED).images, draw(sd, SD()))


# Several runs


def test_two_models_in_lockstep_step_by_step():
    a, b = diffusion.stable_diffusion(), diffusion.stable_diffusion()
    inputs, others = SD(), {**SD(), "prompt": "a green square"}
    with recorded(a.unet.mid_block) as calls:
        want_a = draw(a, inputs, seed=0)
    given = iter([output for _, output in calls])
    with hooked(b.unet.mid_block, lambda module, args, output: next(given)):
        want_b = draw(b, others, seed=1)
    assert not torch.equal(want_b, draw(b, others, seed=1))

    one, other = DiffusionModel(a), DiffusionModel(b)
    turns = 0
    with one.generate(**inputs, seed=0) as x, other.generate(**others, seed=1) as y:
        for s, t in zip(x.steps, y.steps, strict=True):
            assert s.index == t.index == turns
            turns += 1
            y.unet.mid_block.output = x.unet.mid_block.output
    assert turns == 3
    assert torch.equal(x.images, want_a)
    assert torch.equal(y.images, want_b)


def test_two_models_of_different_kinds_in_lockstep():
    kinds = diffusion.PIPELINES["stable_diffusion"], diffusion.PIPELINES["two_call_guidance"]
    pipes = [kind.build() for kind in kinds]
    wants = [draw(pipe, kind.inputs()) for kind, pipe in zip(kinds, pipes, strict=True)]
    x, y = (DiffusionModel(pipe).generate(**kind.inputs(), seed=SEED) for kind, pipe in zip(kinds, pipes, strict=True))
    pairs = [(s.component, t.component) for s, t in zip(x.steps, y.steps, strict=True)]
    assert pairs == [("unet", "transformer")] * 3
    assert torch.equal(x.finish().images, wants[0])
    assert torch.equal(y.finish().images, wants[1])


def test_two_pipelines_that_share_their_parts(sd):
    other = type(sd)(**sd.components, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    inputs, others = SD(), {**SD(), "prompt": "a green square"}
    wants = draw(sd, inputs, seed=0), draw(other, others, seed=1)
    before = pipeline_footprint(sd)
    one, two = DiffusionModel(sd), DiffusionModel(other)
    with one.generate(**inputs, seed=0) as x, two.generate(**others, seed=1) as y:
        for _ in zip(x.steps, y.steps, strict=True):
            assert not torch.equal(x.unet.mid_block.output, y.unet.mid_block.output)
            assert not torch.equal(x.scheduler.step.output[0], y.scheduler.step.output[0])
    assert torch.equal(x.images, wants[0])
    assert torch.equal(y.images, wants[1])
    assert pipeline_footprint(sd) == before


def test_the_bare_pipeline_can_be_called_while_a_run_is_open(sd):
    want = draw(sd, SD())
    with DiffusionModel(sd).generate(**SD(), seed=SEED) as run:
        for step in run.steps:
            if step.index == 1:
                run.unet.mid_block.output = torch.zeros_like(run.unet.mid_block.output)
                assert torch.equal(draw(sd, SD()), want)
    assert not torch.equal(run.images, want)


def test_the_model_means_its_innermost_run(sd):
    model = DiffusionModel(sd)
    with pytest.raises(NoRunError, match=r"unet\.mid_block\.output .* `with model\.generate"):
        _ = model.unet.mid_block.output
    with model.generate(**SD(), seed=SEED) as run:
        for _ in run.steps:
            assert model.unet.mid_block.output is run.unet.mid_block.output


# The parts


def test_a_component_is_exchanged(sd):
    want = draw(diffusion.with_second_order(diffusion.stable_diffusion()), SD())
    model = DiffusionModel(sd)
    model.scheduler = diffusers.HeunDiscreteScheduler.from_config(model.scheduler.config)
    assert type(sd.scheduler) is diffusers.HeunDiscreteScheduler
    with model.generate(**SD(), seed=SEED) as run:
        assert [step.index for step in run.steps] == [0, 1, 2, 3, 4]
    assert torch.equal(run.images, want)


def test_an_exchanged_text_encoder_answers_to_the_standard_names(sd):
    model = DiffusionModel(sd)
    assert len(model.text_encoder.layers) == 3
    model.text_encoder = model_two = diffusion.clip_encoder(sd.tokenizer, seed=7)
    assert model.text_encoder.ln_final._owner is model_two.final_layer_norm
    assert torch.equal(model.generate(**SD(), seed=SEED).images, draw(sd, SD()))


def test_settings_of_the_pipeline_are_reached_through_the_model(sd):
    model = DiffusionModel(sd)
    assert model.pipeline is sd
    assert (model.device, model.dtype) == (sd.device, sd.dtype)
    assert model.unet.config is sd.unet.config
    assert model.scheduler.config is sd.scheduler.config
    assert model.safety_checker is None
    assert model.text_encoder.final_layer_norm.weight is sd.text_encoder.final_layer_norm.weight
    assert model["unet.mid_block"].path == model.unet.mid_block.path == "unet.mid_block"


def test_casting(sd):
    model = DiffusionModel(sd)
    single = model.generate(**SD(), seed=SEED).images
    assert model.to(torch.float64) is model
    assert sd.unet.dtype == torch.float64
    double = model.generate(**SD(), seed=SEED).images
    assert torch.equal(double, draw(sd, SD()))
    assert not torch.equal(double.float(), single.float())


def with_kinds_of_forward(found):
    """Return a footprint that compares overrides of `forward` by type: accelerate renews its own in every call."""
    return {
        place: (cls, attributes, type(forward), hooks) for place, (cls, attributes, forward, hooks) in found.items()
    }


@pytest.mark.parametrize("name", ["stable_diffusion", "flux"])
@pytest.mark.parametrize("setting", ["enable_model_cpu_offload", "enable_group_offload", "enable_attention_slicing"])
def test_offload_and_other_settings_keep_working(name, setting):
    kind = diffusion.PIPELINES[name]
    arguments = {
        "enable_model_cpu_offload": {"device": "cpu"},  # the hooks are those of an accelerator
        "enable_group_offload": {"onload_device": torch.device("cpu"), "offload_type": "leaf_level"},
        "enable_attention_slicing": {},
    }
    pipe = kind.build()
    model = DiffusionModel(pipe)
    getattr(model, setting)(**arguments[setting])
    with recorded(module_at(pipe, kind.denoiser_block)) as calls:
        want = draw(pipe, kind.inputs())
    before = with_kinds_of_forward(pipeline_footprint(pipe))
    with model.generate(**kind.inputs(), seed=SEED) as run:
        _ = run.text_encoder.input
        _ = run[kind.text_encoder_layer].output
        for step in run.steps:
            _ = run[kind.denoiser].inputs
            assert same(run[kind.denoiser_block].output, calls[step.index][1])
            if step.index == 2:
                _ = run.vae.decode.output
    assert torch.equal(run.images, want)
    assert with_kinds_of_forward(pipeline_footprint(pipe)) == before


@pytest.mark.parametrize("walk", [False, True], ids=["unread", "step_by_step"])
def test_the_progress_bar_shows(sd, capsys, walk):
    model = DiffusionModel(sd)
    model.set_progress_bar_config(disable=True)
    assert sd._progress_bar_config == {"disable": True}
    _ = model.generate(**SD(), seed=SEED).images
    assert capsys.readouterr().err == ""
    model.set_progress_bar_config(desc="denoising")
    with model.generate(**SD(), seed=SEED) as run:
        for _ in run.steps if walk else ():
            pass
    shown = capsys.readouterr().err
    assert "denoising" in shown
    assert "3/3" in shown


def test_print_shows_the_parts(kind, pipe):
    shown = repr(DiffusionModel(pipe))
    assert shown.startswith(f"{type(pipe).__name__}(")
    for name, part in pipe.components.items():
        if isinstance(part, nn.Module):
            tree = textwrap.indent(repr(part), "  ").lstrip()
            assert f"  ({name}): {tree}" in shown
        elif part is not None:
            assert f"  ({name}): {type(part).__name__}" in shown
        else:
            assert f"({name})" not in shown
    _, besides = shown.split("traceable besides modules: ")
    methods = {method.strip() for method in besides.splitlines()[0].split(",")}
    expected = {"scheduler.step()"}
    expected |= {"encode_prompt()", "tokenizer()"} if kind.text_encoder_layer else set()
    expected |= {"vae.encode()", "vae.decode()"} if kind.decode else set()
    assert expected <= methods
    for method in methods:
        owner, _, name = method.removesuffix("()").rpartition(".")
        assert callable(getattr(getattr(pipe, owner) if owner else pipe, name))


def test_print_shows_the_standard_names():
    _, names = repr(DiffusionModel(diffusion.stable_diffusion_xl())).split("\nstandard names: ")
    assert set(names.split(", ")) == {
        "text_encoder.layers = text_encoder.encoder.layers",
        "text_encoder.ln_final = text_encoder.final_layer_norm",
        "text_encoder_2.layers = text_encoder_2.text_model.encoder.layers",
        "text_encoder_2.ln_final = text_encoder_2.text_model.final_layer_norm",
    }


def test_dir_lists_what_can_be_asked_for(kind, pipe):
    model = DiffusionModel(pipe)
    parts = {name for name, part in pipe.components.items() if part is not None}
    assert parts <= set(dir(model))
    assert {"generate", "pipeline", "output", "set_progress_bar_config", "save_pretrained"} <= set(dir(model))
    assert {"step", "config", "timesteps"} <= set(dir(model.scheduler))
    if kind.decode:
        assert {"encode", "decode", "decoder"} <= set(dir(model.vae))
    run = model.generate(**kind.inputs(), seed=0)
    assert parts | {"steps", "result", "images", "frames", "stop"} <= set(dir(run))
    if kind.text_encoder_layer:
        assert {"layers", "ln_final", "input", "output"} <= set(dir(run.text_encoder))


# What does not exist


@pytest.mark.parametrize(
    "ask, asked, near",
    [
        (lambda m: m.unett, "unett", "unet"),
        (lambda m: m["unet.mid_blok"], "mid_blok", "mid_block"),
        (lambda m: m.unet.mid_blok, "mid_blok", "mid_block"),
        (lambda m: m.vae.decod, "decod", "decode"),
        (lambda m: m.scheduler.stepp, "stepp", "step"),
        (lambda m: m.text_encoder.layer, "layer", "layers"),
        (lambda m: m.text_encoder.ln_finl, "ln_finl", "ln_final"),
        (lambda m: m.encode_promt, "encode_promt", "encode_prompt"),
        (lambda m: setattr(m.unet.mid_block, "outputs", None), "outputs", "output"),
    ],
)
@pytest.mark.parametrize("bound", [False, True], ids=["model", "run"])
def test_a_part_that_does_not_exist(sd, ask, asked, near, bound):
    model = DiffusionModel(sd)
    with recorded(sd.text_encoder) as calls:
        with pytest.raises(PointNotFoundError) as error:
            ask(model.generate(**SD(), seed=0) if bound else model)
        assert calls == []
    assert asked in str(error.value)
    assert repr(near) in str(error.value)


def test_exchanging_a_component_that_does_not_exist(sd):
    with pytest.raises(PointNotFoundError, match=r"schedulr .*'scheduler'"):
        DiffusionModel(sd).schedulr = sd.scheduler
    assert not hasattr(sd, "schedulr")


def test_a_layer_that_does_not_exist(sd):
    with pytest.raises(PointNotFoundError, match=r"text_encoder\.layers\[7\] .* has 3 children"):
        _ = DiffusionModel(sd).text_encoder.layers[7]


# Nothing is left


def run_to_the_end(model, kind):
    with model.generate(**kind.inputs(), seed=SEED) as run:
        read_everything(run, kind)


def read_everything(run, kind, until=None):
    if kind.text_encoder_layer:
        _ = run.tokenizer.output
        _ = run[kind.text_encoder_layer].input
        _ = run.encode_prompt.output
    for step in run.steps:
        _ = run[kind.denoiser_block].output
        _ = run.scheduler.step.output
        if step.index == until:
            return
        if kind.decode and step.index == kind.steps - 1:
            _ = run.vae.decode.input
            run.vae.decode.output = copy.deepcopy(run.vae.decode.output)


def end_with_an_error(model, kind):
    with pytest.raises(ZeroDivisionError), model.generate(**kind.inputs(), seed=SEED) as run:
        read_everything(run, kind, until=1)
        _ = 1 / 0


def end_with_an_interrupt(model, kind):
    with pytest.raises(KeyboardInterrupt), model.generate(**kind.inputs(), seed=SEED) as run:
        read_everything(run, kind, until=1)
        raise KeyboardInterrupt


def end_with_stop(model, kind):
    with model.generate(**kind.inputs(), seed=SEED) as run:
        read_everything(run, kind, until=1)
        run.stop()
    with pytest.raises(RunClosedError, match="stopped"):
        _ = run.result


def end_with_an_error_of_the_model(model, kind):
    def fail(*_):
        raise ZeroDivisionError

    with (
        hooked(module_at(model.pipeline, kind.denoiser_block), fail),
        pytest.raises(ZeroDivisionError),
        model.generate(**kind.inputs(), seed=SEED) as run,
    ):
        read_everything(run, kind)


def drop_half_way(model, kind):
    run = model.generate(**kind.inputs(), seed=SEED)
    read_everything(run, kind, until=1)
    del run


ENDINGS = (
    run_to_the_end,
    end_with_an_error,
    end_with_an_interrupt,
    end_with_stop,
    end_with_an_error_of_the_model,
    drop_half_way,
)


def test_nothing_is_left_behind(kind, pipe):
    want = draw(pipe, kind.inputs())  # leaves what a bare call leaves: transformers keeps hooks of its own
    before = pipeline_footprint(pipe)
    model = DiffusionModel(pipe)
    for end in ENDINGS:
        end(model, kind)
        assert pipeline_footprint(pipe) == before, end.__name__
    assert torch.equal(draw(pipe, kind.inputs()), want)
    assert torch.equal(drawn(model.generate(**kind.inputs(), seed=SEED)), want)


def test_classes_show_themselves_unchanged_in_a_run(sd):
    shown = repr(sd.scheduler)
    with DiffusionModel(sd).generate(**SD(), seed=SEED) as run:
        _ = run.unet.mid_block.output
        assert type(sd.scheduler).__name__ == "DDIMScheduler"
        assert isinstance(sd.scheduler, diffusers.DDIMScheduler)
        assert isinstance(sd, diffusers.StableDiffusionPipeline)
        assert repr(sd.scheduler) == shown
