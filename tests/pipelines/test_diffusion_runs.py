"""Runs of small diffusion pipelines against the bare pipelines, one at a time and several at once."""

import warnings

import pytest
import torch

from diffsight import DiffusionModel
from diffsight.errors import InputError, NoRunError
from helpers import SEED, bare_run, draw, drawn, hooked, pipeline_footprint, recorded
from models import diffusion

SD = diffusion.PIPELINES["stable_diffusion"].inputs


# Unread runs


def test_an_unread_run_gives_the_bits_of_the_bare_pipeline(kind, pipe):
    want = draw(pipe, kind.inputs())
    model = DiffusionModel(pipe)
    assert torch.equal(drawn(model.generate(**kind.inputs(), seed=SEED)), want)
    with model.generate(**kind.inputs(), seed=SEED) as run:
        pass
    assert torch.equal(drawn(run), want)


@pytest.mark.parametrize(("name", "more"), [("callback_on_step_end", {}), ("callback", {"callback_steps": 1})])
def test_a_run_with_a_callback_that_is_dropped_unread(sd, name, more):
    seen = []
    given = {name: lambda *args: seen.append(args) or args[-1], **more}
    with pytest.warns(RuntimeWarning, match=f"a run with a {name} was dropped .*{name}={name}"):
        DiffusionModel(sd).generate(**SD(), **given)
    assert not seen
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        DiffusionModel(sd).generate(**SD(), **given).finish()
        DiffusionModel(sd).generate(**SD())
    assert seen


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


def test_a_given_generator_is_passed_on(sd):
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


def test_images_and_videos_are_told_apart():
    video = diffusion.PIPELINES["ltx"]
    with pytest.raises(InputError, match="no images; it has frames"):
        _ = DiffusionModel(video.build()).generate(**video.inputs(), seed=0).images
    with pytest.raises(InputError, match="no frames; it has images"):
        _ = DiffusionModel(diffusion.stable_diffusion()).generate(**SD(), seed=0).frames


def test_an_error_in_the_pipeline_is_raised_unchanged(sd):
    with pytest.raises(ValueError) as bare:
        sd(**SD(), height=33, width=33)
    with pytest.raises(ValueError) as error:
        _ = DiffusionModel(sd).generate(**SD(), height=33, width=33, seed=0).images
    assert str(error.value) == str(bare.value)


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
