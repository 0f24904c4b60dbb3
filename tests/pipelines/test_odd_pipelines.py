"""Unusual pipelines: no scheduler step, methods set on the object, a timestep per token."""

import functools
import json
from pathlib import Path

import pytest
import torch
from diffusers import BriaPipeline, BriaTransformer2DModel, DDPMPipeline

import diffsight
from diffsight import DiffusionModel
from diffsight.errors import InputError, NoRunError, WrongThreadError
from diffsight.pipelines import shapes
from models import diffusion


class Unstepped(DDPMPipeline):
    """Draws without ever stepping its scheduler; calls the denoiser `calls` times at each moment."""

    calls = 1

    @torch.no_grad()
    def __call__(self, generator=None, num_inference_steps=3):
        self.scheduler.set_timesteps(num_inference_steps)
        sample = torch.randn(1, 3, 32, 32, generator=generator)
        for t in self.scheduler.timesteps:
            for _ in range(self.calls):
                sample = sample - 0.1 * self.unet(sample, t).sample
        return (sample,)


def unstepped(calls=1):
    whole = diffusion.PIPELINES["ddpm"].build()
    pipe = Unstepped(unet=whole.unet, scheduler=whole.scheduler)
    pipe.calls = calls
    return pipe


@pytest.mark.parametrize("calls", [1, 2])
def test_without_a_scheduler_step_a_step_is_a_moment(calls):
    pipe = unstepped(calls)
    with DiffusionModel(pipe).generate(seed=0) as run:
        seen = [(step.index, step.timestep) for step in run.steps]
    assert seen == list(enumerate(pipe.scheduler.timesteps.tolist()))


def test_a_denoiser_that_calls_the_time_t():
    pipe = diffusion.PIPELINES["stable_diffusion"].build()
    forward = pipe.unet.forward
    pipe.unet.forward = lambda sample, t, **given: forward(sample, t, **given)
    with DiffusionModel(pipe).generate(**diffusion.PIPELINES["stable_diffusion"].inputs(), seed=0) as run:
        seen = [step.timestep for step in run.steps]
    assert seen == pipe.scheduler.timesteps.tolist()


def put_on(pipe, path, halve_call=None):
    """Puts another function in the place of the method, on the object itself; it may halve the input of one call."""
    part, name = path.split(".")
    owner, count = getattr(pipe, part), []
    plain = getattr(owner, name)

    @functools.wraps(plain)
    def mine(first, *args, **given):
        count.append(first)
        return plain(first * 0.5 if len(count) - 1 == halve_call else first, *args, **given)

    setattr(owner, name, mine)
    return owner, name, mine


@pytest.mark.parametrize(("path", "call"), [("vae.decode", 0), ("scheduler.step", 1)])
def test_a_method_that_was_put_on_the_object(path, call):
    tested = diffusion.PIPELINES["stable_diffusion"]
    pipe, reference = tested.build(), tested.build()
    owner, name, mine = put_on(pipe, path)
    with DiffusionModel(pipe).generate(**tested.inputs(), seed=0) as run:
        run[path].calls[call].input = run[path].calls[call].input * 0.5
    assert vars(owner)[name] is mine
    put_on(reference, path, halve_call=call)
    images = reference(**tested.inputs(), generator=torch.Generator().manual_seed(0)).images
    assert torch.equal(run.images, images)
    with DiffusionModel(pipe).generate(**tested.inputs(), seed=0) as run:
        assert len(list(run.steps)) == tested.steps


def test_each_token_with_a_time_of_its_own():
    tested = diffusion.PIPELINES["wan"]
    model = DiffusionModel(tested.build())
    with model.generate(**tested.inputs(), seed=0) as run:
        for step in run.steps[1:2]:
            whole = step.timestep
            _, kwargs = step._call
            kwargs["timestep"] = torch.tensor([[0.0, whole, whole]])
            assert step.timestep == whole
        run.stop()


def test_an_attribute_error_of_the_pipeline_is_seen():
    class Broken(Unstepped):
        def __call__(self, generator=None):
            return self.unet.nothing

    pipe = unstepped()
    model = DiffusionModel(Broken(unet=pipe.unet, scheduler=pipe.scheduler))
    for name in ("images", "frames", "result"):
        with pytest.raises(AttributeError, match="nothing"):
            getattr(model.generate(seed=0), name)


def test_a_result_without_names():
    class Plain(Unstepped):
        def __call__(self, generator=None):
            return torch.zeros(1, 3, 8, 8)

    pipe = unstepped()
    run = DiffusionModel(Plain(unet=pipe.unet, scheduler=pipe.scheduler)).generate(seed=0)
    with pytest.raises(InputError, match="Plain returns Tensor, which has no names"):
        run.images
    assert run.result.shape == (1, 3, 8, 8)


def test_the_packaged_settings_name_no_folder():
    folder = Path(shapes.__file__).parent
    for file in folder.rglob("*.json"):
        assert "_name_or_path" not in json.loads(file.read_text()), file.name


def test_model_paths_mean_the_run_that_was_entered():
    net = torch.nn.Linear(2, 2)
    model = diffsight.Model(net)
    a, b = torch.zeros(1, 2), torch.ones(1, 2)
    first, second = model.trace(a), model.trace(b)
    with first:
        assert model.input is a
        model.trace(b)
        future = model.trace(b)
        assert model.input is a
    with second:
        assert model.input is b
    assert torch.equal(future.result, net(b))


def test_an_optional_input_can_be_given():
    class Optional(torch.nn.Module):
        def forward(self, x=None):
            return torch.zeros(1) if x is None else x

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.part = Optional()

        def forward(self):
            return self.part(None)

    with diffsight.Model(Net()).trace() as run:
        run.part.input = torch.ones(1)
    assert torch.equal(run.result, torch.ones(1))


def test_results_can_be_read_in_any_thread_and_values_only_in_their_own():
    from threading import Thread

    net = torch.nn.Linear(2, 2)
    model, seen = diffsight.Model(net), {}

    def work():
        seen["run"] = model.trace(torch.ones(1, 2))
        seen["run"].finish()
        try:
            model.output
        except Exception as error:
            seen["error"] = error

    with model.trace(torch.zeros(1, 2)):
        model.input
        thread = Thread(target=work)
        thread.start()
        thread.join()
    assert torch.equal(seen["run"].result, net(torch.ones(1, 2)))
    assert isinstance(seen["error"], WrongThreadError)
    with pytest.raises(NoRunError):
        model.output


@pytest.mark.parametrize("seed", [None, [0], 1.5, True])
def test_the_lens_takes_one_seed(seed):
    model = DiffusionModel(diffusion.PIPELINES["stable_diffusion"].build())
    with pytest.raises(InputError, match="one seed"):
        diffsight.diffusion_lens(model, "a red circle", seed=seed)


def test_a_pipeline_that_compares_the_class_of_its_scheduler():
    """Bria does, at every step."""
    sizes = {"in_channels": 16, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 8}
    sizes |= {"num_attention_heads": 2, "joint_attention_dim": diffusion.WIDTH, "axes_dims_rope": [0, 4, 4]}
    pipe = diffusion.quiet_pipeline(
        BriaPipeline,
        **diffusion.text_parts(diffusion.t5_encoder, diffusion.t5_tokenizer()),
        vae=diffusion.vae(seed=1, shift_factor=0.0),
        transformer=diffusion.model(BriaTransformer2DModel, **sizes, pooled_projection_dim=None, seed=2),
        scheduler=diffusion.flow_scheduler(),
    )
    inputs = {"prompt": "a red circle", "height": 64, "width": 64, "num_inference_steps": 3, "output_type": "np"}
    inputs |= {"guidance_scale": 3.0, "max_sequence_length": 32}
    expected = pipe(**inputs, generator=torch.Generator().manual_seed(0)).images
    latents = []
    with DiffusionModel(pipe).generate(**inputs, seed=0) as run:
        for _ in run.steps:
            latents.append(run.scheduler.step.output[0])
            assert type(pipe.scheduler) == type(diffusion.flow_scheduler()), "in the middle of the run"  # noqa: E721
    assert len(latents) == 3
    assert (run.images == expected).all()
    assert type(pipe.scheduler) is type(diffusion.flow_scheduler())
