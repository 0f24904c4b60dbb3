"""The components of a pipeline as parts of a DiffusionModel: exchanged, set, printed, listed, missing."""

import textwrap

import diffusers
import pytest
import torch
from torch import nn

from diffsight import DiffusionModel
from diffsight.errors import PointNotFoundError
from helpers import SEED, draw, module_at, pipeline_footprint, recorded, same
from models import diffusion

SD = diffusion.PIPELINES["stable_diffusion"].inputs


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


@pytest.mark.parametrize("end", [lambda run: run.stop(), lambda run: None])
def test_the_progress_bar_of_a_run_that_is_not_finished_disappears(sd, capsys, end):
    sd.set_progress_bar_config(disable=False)
    run = DiffusionModel(sd).generate(**SD(), seed=SEED)
    run.unet.output
    end(run)
    del run
    shown = capsys.readouterr().err
    assert "0/3" in shown and "\n" not in shown
    assert shown.split("\r")[-2:] == [" " * len(shown.split("\r")[-2]), ""]  # overwritten
    assert "progress_bar" not in vars(sd)


def test_handles_on_a_denoiser_say_that_its_values_hold_both_branches(sd):
    model = DiffusionModel(sd)
    for shown in (repr(model.unet), repr(model.unet.calls[1])):
        assert "run.cond.unet and run.uncond.unet" in shown
    assert "run.cond.unet.mid_block" in repr(model.unet.mid_block)
    assert "branch" not in repr(model.vae) + repr(model.text_encoder.calls[0])
    with model.generate(**SD(), seed=SEED) as run:
        assert len(run.unet.output[0]) == 2 * len(run.cond.unet.output[0]) == 2
        run.stop()
    assert "branch" not in repr(DiffusionModel(diffusion.PIPELINES["ddpm"].build()).unet)


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
