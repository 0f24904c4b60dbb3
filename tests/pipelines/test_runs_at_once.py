"""Runs of one pipeline that are open at the same time, and noise that no generator seeds."""

from threading import Event, Thread

import diffusers
import peft
import pytest
import torch

from diffsight import DiffusionModel
from diffsight.errors import InputError
from helpers import SEED, draw
from models import diffusion

CALL = {"prompt": "a red circle above a blue square", "num_inference_steps": 5, "output_type": "pt"}
SCHEDULERS = [
    diffusers.PNDMScheduler,
    diffusers.EulerDiscreteScheduler,
    diffusers.DPMSolverMultistepScheduler,
    diffusers.UniPCMultistepScheduler,
]


@pytest.fixture
def pipe():
    return diffusion.stable_diffusion()


def bare(pipe, seed=0, **more):
    return pipe(**CALL, **more, generator=torch.Generator().manual_seed(seed)).images


@pytest.mark.parametrize("cls", SCHEDULERS)
def test_lockstep(pipe, cls):
    pipe.scheduler = cls.from_config(pipe.scheduler.config)
    want, model = bare(pipe), DiffusionModel(pipe)
    with model.generate(**CALL, seed=0) as x, model.generate(**CALL, seed=0) as y:
        for here, there in zip(x.steps, y.steps):
            assert here.timestep == there.timestep
            y.unet.mid_block.output = x.unet.mid_block.output
    assert torch.equal(x.images, want)
    assert torch.equal(y.images, want)


@pytest.mark.parametrize("cls", SCHEDULERS)
def test_a_run_in_the_body_of_another_with_other_settings(pipe, cls):
    pipe.scheduler = cls.from_config(pipe.scheduler.config)
    want, other = bare(pipe, guidance_scale=7.5), bare(pipe, seed=1, guidance_scale=2.0)
    model, scheduler = DiffusionModel(pipe), pipe.scheduler
    with model.generate(**CALL, guidance_scale=7.5, seed=0) as x:
        for step in x.steps:
            if step.index == 2:
                inner = DiffusionModel(pipe).generate(**CALL, guidance_scale=2.0, seed=1).images
    assert torch.equal(inner, other)
    assert torch.equal(x.images, want)
    assert pipe.scheduler is scheduler


@pytest.mark.parametrize("cls", SCHEDULERS)
def test_a_plain_call_of_the_model_in_the_body_of_a_run(pipe, cls):
    pipe.scheduler = cls.from_config(pipe.scheduler.config)
    want, other, model = bare(pipe), bare(pipe, seed=1, guidance_scale=2.0), DiffusionModel(pipe)
    with model.generate(**CALL, seed=0) as run:
        for step in run.steps:
            if step.index == 2:
                inner = model(**CALL, guidance_scale=2.0, generator=torch.Generator().manual_seed(1)).images
    assert torch.equal(inner, other)
    assert torch.equal(run.images, want)


def in_the_body(model, call):
    with model.generate(**CALL, seed=0) as run:
        for step in run.steps:
            if step.index == 2:
                call()
    return run.images


def in_a_callback(model, call):
    def callback(pipeline, index, timestep, values):
        if index == 2:
            call()
        return values

    return model.generate(**CALL, seed=0, callback_on_step_end=callback).images


def in_an_edit(model, call):
    with model.edit() as edited:
        edited.unet.mid_block.output
        call()
    return edited.generate(**CALL, seed=0).images


def in_a_thread(model, call):
    def call_there():
        thread = Thread(target=call)
        thread.start()
        thread.join()

    return in_the_body(model, call_there)


@pytest.mark.parametrize("where", [in_the_body, in_a_callback, in_an_edit, in_a_thread])
def test_a_call_of_the_pipeline_itself_during_a_run(pipe, where):
    pipe.scheduler = diffusers.PNDMScheduler.from_config(pipe.scheduler.config)
    want, other, model = bare(pipe), bare(pipe, seed=1, guidance_scale=2.0), DiffusionModel(pipe)
    own, inner = (type(pipe).__call__, type(pipe.scheduler).set_timesteps), []
    images = where(model, lambda: inner.append(bare(pipe, seed=1, guidance_scale=2.0)))
    assert torch.equal(images, want)
    assert len(inner) == 1 and torch.equal(inner[0], other)
    assert own == (type(pipe).__call__, type(pipe.scheduler).set_timesteps)


class Twice(diffusers.DiffusionPipeline):
    """Calls a pipeline that it holds, and then calls it again with the latents that it has returned."""

    def __init__(self, vae, text_encoder, tokenizer, unet, scheduler):
        super().__init__()
        parts = dict(vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=scheduler)
        self.register_modules(**parts)
        held = diffusers.StableDiffusionPipeline(**parts, safety_checker=None, feature_extractor=None)
        held.set_progress_bar_config(disable=True)
        self.held = held

    @torch.no_grad()
    def __call__(self, prompt, generator=None, callback=None):
        call = {"prompt": prompt, "num_inference_steps": 2, "output_type": "latent"}
        call["callback_on_step_end"] = callback
        return self.held(**call, latents=self.held(**call, generator=generator).images)


def test_a_pipeline_that_calls_a_pipeline_that_it_holds(pipe):
    pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    twice = Twice(pipe.vae, pipe.text_encoder, pipe.tokenizer, pipe.unet, pipe.scheduler)

    def call(pipeline, seed, **more):
        return pipeline(CALL["prompt"], generator=torch.Generator().manual_seed(seed), **more).images

    few = {"num_inference_steps": 2, "output_type": "latent"}
    want, other, held, inner = call(twice, 0), call(twice, 1), call(twice.held, 1, **few), []
    with DiffusionModel(twice).generate(CALL["prompt"], seed=0) as run:
        for step in run.steps:
            if step.index == 2:
                inner = [call(twice, 1), call(twice.held, 1, **few)]
    assert step.index == 3
    assert torch.equal(run.images, want)
    assert torch.equal(inner[0], other) and torch.equal(inner[1], held)


@pytest.mark.parametrize("in_thread", [False, True])
@pytest.mark.parametrize("is_read", [False, True])
def test_a_call_of_a_held_pipeline_in_a_callback(pipe, is_read, in_thread):
    pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    twice = Twice(pipe.vae, pipe.text_encoder, pipe.tokenizer, pipe.unet, pipe.scheduler)
    few, inner = {"output_type": "latent", "num_inference_steps": 3}, []

    def call():
        inner.append(twice.held(CALL["prompt"], generator=torch.Generator().manual_seed(1), **few).images)

    def callback(pipeline, index, timestep, values):
        if index == 0 and not inner:
            thread = Thread(target=call)
            (thread.start(), thread.join()) if in_thread else call()
        return values

    want = twice(CALL["prompt"], generator=torch.Generator().manual_seed(0)).images
    call()
    other = inner.pop()
    with DiffusionModel(twice).generate(CALL["prompt"], seed=0, callback=callback) as run:
        if is_read:
            run.unet.mid_block.output
    assert torch.equal(inner[0], other)
    assert torch.equal(run.images, want)


def test_a_run_while_another_thread_calls_the_pipeline(pipe):
    pipe.scheduler = diffusers.PNDMScheduler.from_config(pipe.scheduler.config)
    want, model = bare(pipe), DiffusionModel(pipe)
    begun, go_on, images = Event(), Event(), []

    def callback(pipeline, index, timestep, values):
        begun.set()
        go_on.wait(60)
        return values

    thread = Thread(target=lambda: images.append(bare(pipe, callback_on_step_end=callback)))
    thread.start()
    begun.wait(60)
    images.append(model.generate(**CALL, seed=0).images)
    go_on.set()
    thread.join()
    assert len(images) == 2 and all(torch.equal(one, want) for one in images)


def test_runs_in_the_callback_of_a_call_of_the_pipeline(pipe):
    pipe.scheduler = diffusers.PNDMScheduler.from_config(pipe.scheduler.config)
    want, other, model, inner = bare(pipe), bare(pipe, seed=1), DiffusionModel(pipe), []

    def callback(pipeline, index, timestep, values):
        if index == 2:
            inner.append(model.generate(**CALL, seed=1).images)
            inner.append(model(**CALL, generator=torch.Generator().manual_seed(1)).images)
        return values

    assert torch.equal(bare(pipe, callback_on_step_end=callback), want)
    assert len(inner) == 2 and all(torch.equal(images, other) for images in inner)


@pytest.mark.parametrize("scales", [(0.3, 0.9), (0.3, None), (None, 0.3)])
def test_runs_with_a_lora_that_one_of_them_scales(pipe, scales):
    pipe.unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    calls = [{} if scale is None else {"cross_attention_kwargs": {"scale": scale}} for scale in scales]
    want, other = (bare(pipe, **call) for call in calls)
    model = DiffusionModel(pipe)
    with model.generate(**CALL, **calls[0], seed=0) as x:
        x.unet.mid_block.output
        refusal = r"one of the two changes the scale of the LoRA in the unet\. .* pipeline\.set_adapters"
        with pytest.raises(InputError, match=refusal):
            model.generate(**CALL, **calls[1], seed=0).unet.mid_block.output
    assert torch.equal(x.images, want)
    assert torch.equal(model.generate(**CALL, **calls[1], seed=0).images, other)


def test_runs_with_a_lora_that_none_of_them_scales(pipe):
    pipe.unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    want, model, call = bare(pipe), DiffusionModel(pipe), {"cross_attention_kwargs": {"scale": 1.0}}
    with model.generate(**CALL, **call, seed=0) as x, model.generate(**CALL, seed=0) as y:
        for _ in zip(x.steps, y.steps):
            y.unet.mid_block.output = x.unet.mid_block.output
    assert torch.equal(x.images, want)
    assert torch.equal(y.images, want)


@pytest.mark.parametrize("scales", [(3.0, 0.0), (0.0, 3.0), (0.0, 0.0)])
def test_runs_with_perturbed_attention_guidance(pipe, scales):
    pag = diffusers.StableDiffusionPAGPipeline(**pipe.components, requires_safety_checker=False)
    pag.set_progress_bar_config(disable=True)
    want, other = (bare(pag, pag_scale=scale) for scale in scales)
    model, own = DiffusionModel(pag), pag.unet.attn_processors
    with model.generate(**CALL, pag_scale=scales[0], seed=0) as x:
        x.unet.mid_block.output
        run = model.generate(**CALL, pag_scale=scales[1], seed=0)
        if any(scales):
            with pytest.raises(InputError, match="one of the two sets the attention processors of the unet"):
                run.unet.mid_block.output
        else:
            assert torch.equal(run.images, other)
    assert torch.equal(x.images, want)
    assert pag.unet.attn_processors == own


def test_runs_that_convert_their_vae_to_float32():
    kind = diffusion.PIPELINES["stable_diffusion_xl"]
    pipe, call = kind.build().to(torch.float16), kind.inputs() | {"output_type": "pt"}
    pipe.vae.register_to_config(force_upcast=True)
    want, model, dtype = draw(pipe, call), DiffusionModel(pipe), diffusers.ModelMixin.dtype
    with model.generate(**call, seed=SEED) as x, model.generate(**call, seed=SEED) as y:
        for _ in zip(x.steps, y.steps):
            y.unet.mid_block.output = x.unet.mid_block.output
        assert torch.equal(x.vae.decoder.mid_block.output, y.vae.decoder.mid_block.output)
        assert torch.equal(draw(pipe, call), want)
        x.finish()
        assert pipe.vae.dtype == torch.float32  # y is still inside it
        with model.generate(**call, seed=SEED) as z:
            z.vae.decoder.mid_block.output
            z.stop()
    assert torch.equal(x.images, want)
    assert torch.equal(y.images, want)
    assert pipe.vae.dtype == torch.float16
    assert torch.equal(draw(pipe, call), want)
    assert diffusers.ModelMixin.dtype is dtype and "to" not in vars(pipe.vae)


def test_another_pipeline_must_not_change_the_scheduler_of_a_run(pipe):
    want, model = bare(pipe), DiffusionModel(pipe)
    other = diffusers.StableDiffusionPAGPipeline(**pipe.components, requires_safety_checker=False)
    other_image = bare(other, seed=1)
    with model.generate(**CALL, seed=0) as run:
        for step in run.steps:
            if step.index == 2:
                with pytest.raises(InputError, match="PAGPipeline has the same DDIMScheduler as the pipeline of a run"):
                    bare(other)
                assert torch.equal(bare(DiffusionModel(other), seed=1), other_image)
    assert torch.equal(run.images, want)


@pytest.mark.parametrize("call", ["generate", "plainly"])
def test_another_pipeline_must_not_change_the_scheduler_in_a_callback(pipe, call):
    want, model = bare(pipe), DiffusionModel(pipe)
    other = diffusers.StableDiffusionPAGPipeline(**pipe.components, requires_safety_checker=False)

    def callback(pipeline, index, timestep, values):
        if index == 2:
            with pytest.raises(InputError, match="PAGPipeline has the same DDIMScheduler as the pipeline of a run"):
                other(**{**CALL, "num_inference_steps": 3})
        return values

    if call == "generate":
        images = model.generate(**CALL, seed=0, callback_on_step_end=callback).images
    else:
        images = bare(model, callback_on_step_end=callback)
    assert torch.equal(images, want)


def test_what_interrupts_a_run_leaves_the_pipeline_as_it_was(pipe):
    own, model = type(pipe).__call__, DiffusionModel(pipe)
    with pytest.raises(KeyboardInterrupt), model.generate(**CALL, seed=0) as run:
        for step in run.steps:
            bare(pipe)
            assert step.index == 0
            raise KeyboardInterrupt
    assert type(pipe).__call__ is own
    scheduler = pipe.scheduler
    bare(pipe)
    assert pipe.scheduler is scheduler and len(scheduler.timesteps) == CALL["num_inference_steps"]


def test_a_run_in_the_body_of_a_run_with_gradients(pipe):
    pipe.scheduler = diffusers.PNDMScheduler.from_config(pipe.scheduler.config)
    want, model = bare(pipe), DiffusionModel(pipe)
    with model.generate(**CALL, seed=0, grad=True) as run:
        for step in run.steps:
            if step.index == 2:  # the scheduler has values with gradients now
                inner = model.generate(**CALL, seed=0).images
    assert torch.equal(inner, want)
    assert torch.equal(run.images.detach(), want)


def test_each_run_has_the_attributes_of_its_own_scheduler(pipe):
    model, more = DiffusionModel(pipe), {**CALL, "num_inference_steps": 3}
    with model.generate(**CALL, guidance_scale=7.5) as x, model.generate(**more, guidance_scale=2.0) as y:
        next(iter(x.steps)), next(iter(y.steps))
        for run, count, scale in ((x, 5, 7.5), (y, 3, 2.0)):
            assert run.scheduler.num_inference_steps == len(run.scheduler.timesteps) == count
            assert run.guidance_scale == scale
        assert model.scheduler.num_inference_steps == 3  # of the innermost run
    assert pipe.scheduler.num_inference_steps == 5


def test_pipelines_that_share_a_scheduler(pipe):
    pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    want, other = bare(pipe), type(pipe)(**pipe.components, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    with DiffusionModel(pipe).generate(**CALL, seed=0) as x, DiffusionModel(other).generate(**CALL, seed=0) as y:
        for _ in zip(x.steps, y.steps):
            pass
    assert torch.equal(x.images, want)
    assert torch.equal(y.images, want)


def test_after_a_run_the_next_one_uses_the_pipeline_itself(pipe):
    model = DiffusionModel(pipe)
    run = model.generate(**CALL, seed=0)
    run.unet.mid_block.output
    del run
    with model.generate(**CALL, seed=0):
        pass
    assert len(pipe.scheduler.timesteps) == 5


class Noisy(diffusers.EulerDiscreteScheduler):
    """Draws noise without a generator, and has a seed for it, as DPMSolverSDEScheduler does."""

    noise_sampler_seed = None

    def step(self, *args, **kwargs):
        self.seeds_seen = self.noise_sampler_seed
        out = super().step(*args, **kwargs)
        noise = 0.1 * torch.randn_like(out[0])
        return (out[0] + noise, *out[1:]) if isinstance(out, tuple) else type(out)(prev_sample=out.prev_sample + noise)


def test_noise_without_a_generator_has_the_seed_of_the_run(pipe):
    pipe.scheduler = Noisy.from_config(pipe.scheduler.config)
    model, state = DiffusionModel(pipe), torch.get_rng_state()
    first = model.generate(**CALL, seed=0).images
    torch.randn(3)
    assert torch.equal(first, model.generate(**CALL, seed=0).images)
    assert not torch.equal(first, model.generate(**CALL, seed=1).images)
    torch.set_rng_state(state)
    model.generate(**CALL, seed=3, num_images_per_prompt=2).finish()
    assert pipe.scheduler.seeds_seen == [3, 4]
    assert pipe.scheduler.noise_sampler_seed is None
    assert torch.equal(torch.get_rng_state(), state)


def test_a_run_that_its_thread_left_open_uses_nothing(pipe):
    model, left = DiffusionModel(pipe), []

    def leave_open():
        run = model.generate(**CALL, seed=0)
        run.unet.mid_block.output
        left.append(run)

    thread = Thread(target=leave_open)
    thread.start()
    thread.join()
    left.clear()
    pipe(**CALL | {"num_inference_steps": 4})
    assert len(pipe.scheduler.timesteps) == 4  # the pipeline itself was called, not a copy
