"""Nothing is left behind on a pipeline, however a run ends."""

import copy

import diffusers
import pytest
import torch

from diffsight import DiffusionModel
from diffsight.errors import RunClosedError
from helpers import SEED, draw, drawn, hooked, module_at, pipeline_footprint
from models import diffusion

SD = diffusion.PIPELINES["stable_diffusion"].inputs


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


@pytest.mark.parametrize("end", [drop_half_way, end_with_an_error, end_with_an_error_of_the_model, end_with_stop])
def test_attention_processors_that_a_pipeline_sets(end):
    kind = diffusion.PIPELINES["stable_diffusion"]
    pipe = diffusion.stable_diffusion_family(diffusers.StableDiffusionPAGPipeline, pag_applied_layers=["mid"])
    before = pipe.unet.attn_processors
    end(DiffusionModel(pipe), kind)
    assert pipe.unet.attn_processors == before


def test_attention_processors_that_the_user_sets(sd):
    """They stay, however the run ends."""
    own = diffusers.models.attention_processor.AttnProcessor()
    with DiffusionModel(sd).generate(**SD(), seed=SEED) as run:
        _ = run.unet.mid_block.output
        sd.unet.set_attn_processor(own)
        run.stop()
    assert {*sd.unet.attn_processors.values()} == {own}


def test_classes_show_themselves_unchanged_in_a_run(sd):
    shown = repr(sd.scheduler)
    with DiffusionModel(sd).generate(**SD(), seed=SEED) as run:
        _ = run.unet.mid_block.output
        assert type(sd.scheduler).__name__ == "DDIMScheduler"
        assert isinstance(sd.scheduler, diffusers.DDIMScheduler)
        assert isinstance(sd, diffusers.StableDiffusionPipeline)
        assert repr(sd.scheduler) == shown
