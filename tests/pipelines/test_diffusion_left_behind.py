"""Nothing is left behind on a pipeline, however a run ends."""

import contextlib
import copy

import diffusers
import peft
import pytest
import torch

from diffsight import DiffusionModel
from diffsight.errors import RunClosedError
from helpers import SEED, draw, drawn, hooked, module_at, pipeline_footprint, same
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


def stop(run):
    run.stop()


def fail(run):
    raise ZeroDivisionError


def end_behind(model, call, read, end):
    """End a run that has run to a value."""
    with contextlib.suppress(ZeroDivisionError), model.generate(**call, seed=SEED) as run:
        read(run)
        end(run)


def with_lora(pipe):
    for part, names in ((pipe.text_encoder, "q_proj"), (pipe.unet, "to_q")):
        part.add_adapter(peft.LoraConfig(r=2, target_modules=[names], init_lora_weights=False))
    return pipe


def lora_scales(pipe):
    modules = [*pipe.text_encoder.modules(), *pipe.unet.modules()]
    return [dict(module.scaling) for module in modules if hasattr(module, "scale_layer")]


@pytest.mark.parametrize("end", [stop, fail])
@pytest.mark.parametrize("point", ["text_encoder.layers[0]", "unet.mid_block"])
def test_the_scale_of_a_lora(sd, point, end):
    own = lora_scales(with_lora(sd))
    call = SD(cross_attention_kwargs={"scale": 0.3})
    end_behind(DiffusionModel(sd), call, lambda run: run[point].output, end)
    assert own == lora_scales(sd) != []


def test_the_scale_of_a_lora_that_the_user_sets(sd):
    """It stays, however the run ends."""

    chosen = []

    def choose(run):
        _ = run.text_encoder.layers[0].output
        for module in sd.text_encoder.modules():
            if hasattr(module, "scale_layer"):
                module.set_scale("default", 0.7)
        chosen.extend(lora_scales(sd))

    with_lora(sd)
    end_behind(DiffusionModel(sd), SD(cross_attention_kwargs={"scale": 0.3}), choose, stop)
    assert lora_scales(sd) == chosen != []


def half_sdxl():
    pipe = diffusion.PIPELINES["stable_diffusion_xl"].build().to(torch.float16)
    pipe.vae.register_to_config(force_upcast=True)
    return pipe


@pytest.mark.parametrize("end", [stop, fail])
def test_a_vae_that_a_pipeline_converts_to_float32(end):
    pipe, call = half_sdxl(), diffusion.PIPELINES["stable_diffusion_xl"].inputs()
    own = {name: tensor.clone() for name, tensor in pipe.vae.state_dict().items()}
    seen = []
    end_behind(DiffusionModel(pipe), call, lambda run: seen.append(run.vae.decoder.mid_block.output), end)
    assert seen[0].dtype == torch.float32
    assert same(own, dict(pipe.vae.state_dict()))
    assert "to" not in vars(pipe.vae)


def test_a_vae_that_the_user_converts():
    """It stays, however the run ends."""
    pipe, call = half_sdxl(), diffusion.PIPELINES["stable_diffusion_xl"].inputs()
    end_behind(DiffusionModel(pipe), call, lambda run: (run.unet.mid_block.output, pipe.vae.to(torch.float32)), stop)
    assert pipe.vae.dtype == torch.float32


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
