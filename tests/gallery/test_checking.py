"""`check_model` and `diffsight check`: what they find, and that they notice what is wrong."""

import itertools
import json

import pytest
import torch

from diffsight import DiffusionModel, LanguageModel, Model, VisionLanguageModel, logit_lens
from diffsight.errors import InputError
from diffsight.gallery import check_model
from diffsight.gallery.cli import main
from helpers import refusal
from models import architectures, diffusion, language, lens_results, vision_language

FAST = {"num_inference_steps": 2}


def states(check):
    return {row.name: row.status for row in check.rows}


def details(check):
    return {row.name: row.detail for row in check.rows}


def test_a_pipeline_passes_every_check():
    check = check_model(DiffusionModel(diffusion.stable_diffusion()), **FAST)
    assert set(states(check).values()) == {"ok"}
    assert check.is_ok
    found = details(check)
    assert found["steps"] == "2, as many as calls of scheduler.step"
    assert found["components"] == "text_encoder (calls: 2), unet (calls: 2); not called: vae"
    assert found["attention"] == "4 cross, 4 self"
    assert found["guidance"] == "conditional and unconditional, 1 and 1 of 2 rows"


def test_every_call_has_the_arguments_of_the_check():
    pipe, widths = diffusion.stable_diffusion(), set()
    with pipe.unet.register_forward_pre_hook(lambda module, args: widths.add(args[0].shape[-1])):
        check = check_model(DiffusionModel(pipe), **FAST, width=32)
        assert check.is_ok
    assert widths == {32 // pipe.vae_scale_factor}


def test_what_a_pipeline_does_not_have_is_none():
    check = check_model(DiffusionModel(diffusion.ddpm()), **FAST)
    assert states(check) == {
        **dict.fromkeys(("unread run", "components", "steps", "seeds"), "ok"),
        **dict.fromkeys(("guidance", "text encoders", "diffusion lens"), "none"),
        "attention": "ok",
    }
    assert check.is_ok


def test_a_language_model_passes_every_check():
    check = check_model(language.model(), prompt=language.PROMPTS[0])
    assert {name for name, status in states(check).items() if status == "ok"} >= {
        *("unread run", "layers", "steps", "logit lens", "seeds")
    }
    assert check.is_ok
    assert details(check)["layers"].startswith("4, each with the bits")


@pytest.mark.parametrize(
    "kind, names, told",
    [
        ("inkling2_text", None, "come from several layers"),
        ("blt", None, "come from several layers"),  # the layers of its decoder run after those that are named
        ("reformer", None, "do not return one hidden state for each token"),
        ("blt", {"layers": "model.global_transformer.layers"}, "do not return one hidden state for each token"),
    ],
)
def test_a_model_that_has_no_logit_lens(kind, names, told):
    net = architectures.build_causal(kind)
    model, ids = LanguageModel(net, names=names), architectures.inputs_of(net)
    assert told in refusal(logit_lens, model, ids)
    check = check_model(model, prompt=ids)
    assert check.is_ok
    assert (states(check)["layers"], states(check)["logit lens"]) == ("ok", "none")
    assert told in details(check)["logit lens"]


def test_a_prompt_from_which_the_bare_model_does_not_generate():
    net = architectures.build_causal("musicgen")
    check = check_model(LanguageModel(net), prompt=architectures.inputs_of(net))
    assert (states(check)["unread run"], states(check)["steps"], states(check)["seeds"]) == ("ok", "none", "none")
    assert "the bare model does not generate from this prompt" in details(check)["seeds"]


def test_a_vision_language_model_shows_its_image_tokens():
    model = VisionLanguageModel(vision_language.llava())
    check = check_model(model, prompt="what is this", images=diffusion.IMAGE)
    assert check.is_ok
    assert details(check)["image tokens"] == "1 grid, the first (4, 4)"


def test_a_pipeline_that_does_not_repeat_fails():
    pipe = diffusion.stable_diffusion()
    calls = itertools.count()
    pipe.unet.register_forward_pre_hook(lambda module, args: (args[0] + next(calls), *args[1:]))
    check = check_model(DiffusionModel(pipe), **FAST)
    assert not check.is_ok
    assert details(check)["unread run"] == "a run in which nothing is read differs from the bare call"
    assert details(check)["components"] == "values of unet differ from those of hooks"
    assert details(check)["seeds"] == "the same seed gave another result"


def test_an_error_in_a_model_is_what_the_check_found():
    pipe = diffusion.stable_diffusion()

    def broken(*args, **kwargs):
        raise RuntimeError("the device is on fire")

    pipe.unet.forward = broken
    check = check_model(DiffusionModel(pipe), **FAST)
    assert states(check)["unread run"] == "failed"
    assert details(check)["unread run"] == "RuntimeError: the device is on fire"


def test_nothing_is_left_behind():
    pipe = diffusion.stable_diffusion()
    step, bar = type(pipe.scheduler).step, dict(getattr(pipe, "_progress_bar_config", {}))
    check_model(DiffusionModel(pipe), **FAST)
    assert type(pipe.scheduler).step is step
    assert dict(getattr(pipe, "_progress_bar_config", {})) == bar
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in pipe.unet.modules())


def test_the_command_prints_a_table_and_writes_it(saved_models, tmp_path, capsys):
    out = tmp_path / "deep" / "check.json"
    assert main(["check", str(saved_models / "pipeline"), "num_inference_steps=2", "--out", str(out)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "unread run" in "\n".join(lines)
    assert lines[-1] == str(out)
    record = json.loads(out.read_text())
    assert record["ok"] is True
    assert record["kind"] == "StableDiffusionPipeline"
    assert {row["status"] for row in record["rows"]} == {"ok"}
    assert "torch" in record["versions"]


@pytest.mark.parametrize("folder", ["language", "vision"])
def test_the_command_opens_models_of_every_kind(saved_models, folder, capsys):
    assert main(["check", str(saved_models / folder), "prompt=A cat"]) == 0
    kinds = {"language": "GPT2LMHeadModel", "vision": "LlavaForConditionalGeneration"}
    assert kinds[folder] in capsys.readouterr().out


def test_a_check_that_fails_has_exit_status_1(saved_models, capsys):
    assert main(["check", str(saved_models / "pipeline"), "num_inference_steps=2", "prompt_embeds=3"]) == 1
    assert "failed" in capsys.readouterr().out


def test_bad_input(saved_models, tmp_path, capsys):
    pipeline = str(saved_models / "pipeline")
    for argv, message in [
        (["check", str(tmp_path)], "there is no model in"),
        (["check", "diffsight/nothing"], "diffsight/nothing"),
        (["check", pipeline, "steps"], "NAME=VALUE"),
        (["check", str(saved_models / "language"), "height=3"], "takes prompt"),
    ]:
        try:
            status = main(argv)
        except SystemExit as end:
            status = end.code
        assert status == 2, argv
        assert message in capsys.readouterr().err
    with pytest.raises(InputError, match="check_model takes a DiffusionModel or a LanguageModel, not Model"):
        check_model(Model(torch.nn.Linear(2, 2)))


def test_a_misspelled_argument_is_refused_before_anything_is_checked(saved_models):
    told = refusal(check_model, lens_results.load(saved_models / "pipeline"), num_inference_step=2)
    assert "has no argument 'num_inference_step' (did you mean 'num_inference_steps'" in told
