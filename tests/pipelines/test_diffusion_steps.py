"""The steps of a run: one for every call of a scheduler, whoever calls it."""

import copy

import diffusers
import pytest
import torch
from diffusers.utils.torch_utils import randn_tensor

from diffsight import DiffusionModel
from diffsight.errors import InputError
from diffsight.pipelines.diffusion.denoising_clock import count_of_steps
from helpers import SEED, bare_run, draw, drawn, first, not_called, recorded, same, with_first
from models import diffusion

SD = diffusion.PIPELINES["stable_diffusion"].inputs
STEPS = diffusion.PIPELINES["stable_diffusion"].steps


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
def test_timesteps_near_the_end_of_the_schedule(sigmas):
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


def test_there_are_no_more_steps_than_are_counted_in_the_first_one(kind, pipe):
    draw(pipe, kind.inputs())
    count = count_of_steps(pipe)
    assert count is None or count >= kind.steps  # image-to-image pipelines leave the first ones out


def test_steps_that_the_run_does_not_have_are_refused_before_the_denoiser_is_called(sd):
    few = rf"run.steps\[50:60\] has no steps: the run has {STEPS}"
    with not_called(sd.unet), pytest.raises(InputError, match=few), DiffusionModel(sd).generate(**SD(), seed=0) as run:
        for _ in run.steps[50:60]:
            pass
    assert count_of_steps(sd) == STEPS
    with DiffusionModel(sd).generate(**SD(), seed=SEED) as run:
        assert [step.index for step in run.steps[STEPS - 1 : 60]] == [STEPS - 1]
    assert torch.equal(draw(sd, SD()), run.images)


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


def test_what_comes_after_the_last_step_can_be_read_and_edited():
    pipe, kwargs = diffusion.PIPELINES["stable_diffusion"].build(), SD(output_type="pt")
    bare = pipe(**kwargs, generator=torch.Generator().manual_seed(0)).images
    model = DiffusionModel(pipe)
    with model.generate(**kwargs, seed=0) as run:
        indices = [step.index for step in run.steps]
        latents = run.vae.decode.input
    assert indices == [*range(STEPS)]
    assert torch.equal(run.images, bare)
    with torch.no_grad():
        flipped = pipe.vae.decode(-latents, return_dict=False)[0]
    with model.generate(**kwargs, seed=0) as run:
        for _ in run.steps:
            pass
        run.vae.decode.input = -run.vae.decode.input
    assert torch.equal(run.images, (flipped / 2 + 0.5).clamp(0, 1))


def interrupt(pipeline, index, timestep, values):
    pipeline._interrupt = index == 1
    return values


@pytest.mark.parametrize(("more", "count"), [({"denoising_end": 0.5}, 1), ({"callback_on_step_end": interrupt}, 2)])
def test_a_loop_that_ends_before_the_last_timestep(more, count):
    kind = diffusion.PIPELINES["stable_diffusion_xl"]
    pipe, inputs = kind.build(), {**kind.inputs(), **more, "num_inference_steps": 3, "output_type": "pt"}
    with recorded(pipe.vae, "decode") as calls:
        want = draw(pipe, inputs)
    with DiffusionModel(pipe).generate(**inputs, seed=SEED) as x, DiffusionModel(pipe).generate(**inputs, seed=4) as y:
        assert len([*zip(x.steps, y.steps)]) == count
        assert torch.equal(x.vae.decode.input, calls[0][0][0][0])
        assert x.vae.decode.input.shape == y.vae.decode.input.shape
    assert torch.equal(x.images, want)


def test_previews_do_not_end_a_loop():
    """A preview of each step is decoded by a callback, which is not the end of the steps."""
    pipe, kwargs = diffusion.PIPELINES["stable_diffusion"].build(), SD(output_type="pt")
    previews = []

    def preview(pipeline, index, timestep, values):
        previews.append(pipeline.vae.decode(values["latents"], return_dict=False)[0])
        return values

    with DiffusionModel(pipe).generate(**kwargs, seed=0, callback_on_step_end=preview) as run:
        indices = [step.index for step in run.steps]
    assert indices == [*range(STEPS)]
    assert len(previews) == STEPS


def test_edits_and_a_loop_end_together():
    pipe, kwargs = diffusion.PIPELINES["stable_diffusion"].build(), SD(output_type="pt")
    seen = []

    def edit(run):
        for step in run.steps:
            seen.append(step.index)
        run.vae.decode.input = run.vae.decode.input * 0

    edited = DiffusionModel(pipe).edit(edit)
    with edited.generate(**kwargs, seed=0) as run:
        for _ in run.steps:
            pass
        assert not run.vae.decode.input.any()
    assert seen == [*range(STEPS)]


def test_a_denoiser_whose_forward_was_replaced():
    pipe, kwargs = diffusion.PIPELINES["stable_diffusion"].build(), SD(output_type="pt")
    own, norms, seen = pipe.unet.forward, [], []
    pipe.unet.forward = lambda *args, **kwargs: own(*args, **kwargs)
    with DiffusionModel(pipe).generate(**kwargs, seed=0) as run:
        run.follow("unet.mid_block", lambda output: seen.append(output.norm()))
        for step in run.steps:
            assert step.timestep is not None
            norms.append(run.unet.mid_block.output.norm())
    assert len(norms) == STEPS
    assert torch.equal(torch.stack(norms), torch.stack(seen)[:: len(seen) // STEPS])


def test_a_loop_over_steps_that_the_bodies_of_rows_have_gone_through(sd):
    with DiffusionModel(sd).generate(**SD() | {"prompt": ["a", "b"]}, seed=SEED) as run:
        seen = []
        with pytest.warns(RuntimeWarning, match="ended after 1 step, because something else"):
            for step in run.steps:
                seen.append((step.index, run.each(lambda row: [step.index for step in row.steps])))
    assert seen == [(0, [[*range(1, STEPS)]] * 2)]
