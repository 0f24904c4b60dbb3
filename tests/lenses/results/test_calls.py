"""The call that a result holds: its arguments and models, as a record stores them, and as code."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from diffsight import diffusion_lens, logit_lens, patchscope_lens
from diffsight.errors import InputError
from diffsight.lenses import TargetPrompt
from diffsight.lenses.results.call_values import ArgumentDecoder, ArgumentEncoder
from helpers import same, same_image
from models import language, lens_results


def there_and_back(value):
    encoder = ArgumentEncoder()
    stored = json.loads(json.dumps(encoder.encode("x", value)))
    return ArgumentDecoder(encoder.tensors, {}).decode(stored)


@pytest.mark.parametrize(
    "value",
    [
        *[
            None,
            True,
            3,
            0.1,
            "a",
            [1, [2.5]],
            (1, "b", (3,)),
            {"a": {"b": (1,)}},
            {"$a": 1},
            {1: "x", (2, 3): slice(4)},
        ],
        *[range(2, 9, 3), slice(None, None, -1), Path("a/b"), torch.float16, torch.device("cpu"), {}, []],
        *[torch.tensor([[1.5, 2]]), torch.tensor(True), TargetPrompt("x", 2), logit_lens],
    ],
    ids=lambda value: getattr(value, "__name__", None) or repr(value),
)
def test_arguments_come_back_as_they_were(value):
    assert same(there_and_back(value), value)


def test_arrays_and_images_come_back_as_they_were():
    array = np.arange(6).reshape(2, 3)
    assert np.array_equal(there_and_back(array), array)
    for mode in ("RGB", "L", "RGBA"):
        image = Image.linear_gradient("L").resize((5, 4)).convert(mode)
        assert same_image(there_and_back([image])[0], image)


def test_arrays_of_strings_come_back_as_lists():
    assert there_and_back(np.array(["red", "circle"])) == ["red", "circle"]


@pytest.mark.parametrize("array", [np.array([1, "a"], object), np.array([1j]), np.array(["2020-01-01"], "M8[D]")])
def test_arrays_that_a_record_cannot_hold_are_named(array):
    with pytest.raises(InputError, match=r"a record cannot hold array\("):
        there_and_back(array)


def test_what_a_record_cannot_hold_is_named():
    with pytest.raises(InputError, match="a record cannot hold <function test_what"):
        there_and_back([test_what_a_record_cannot_hold_is_named])


def test_a_record_is_not_a_way_to_run_other_code():
    for name in ("os.system", "diffsight.nothing", "builtins.eval"):
        with pytest.raises(InputError, match=r"is not a part of diffsight|has no"):
            ArgumentDecoder({}, {}).decode({"$function": name})


def test_a_value_of_a_newer_version_is_named():
    with pytest.raises(InputError, match=r"'\$quaternion': it comes from a newer version"):
        ArgumentDecoder({}, {}).decode({"$quaternion": [1]})


def test_tensors_are_kept_as_they_were_at_the_call():
    states = torch.ones(1, 1, 32)
    result = patchscope_lens(language.model(), states, layers=[0], progress=False)
    states.zero_()
    assert result.call.tensors["prompts"].eq(1).all()


def test_an_iterator_is_recorded_as_a_list():
    result = logit_lens(language.model(), language.PROMPTS[0], layers=iter([0, 2]))
    assert result.layers == (0, 2)
    assert result.call.arguments["layers"] == [0, 2]


def test_progress_is_not_recorded(saved_models):
    result = lens_results.make("diffusion_lens", saved_models)
    assert set(result.call.arguments) == {"model", "prompt", "seed", "num_inference_steps"}


def test_the_model_of_a_record(saved_models):
    model = lens_results.load(saved_models / "pipeline")
    (record,) = lens_results.make("diffusion_lens", saved_models).call.models.values()
    assert (record.kind, record.source) == ("DiffusionModel", str(saved_models / "pipeline"))
    assert record.edits == ()

    @model.edit
    def edited(run):
        run.text_encoder.layers[0].output[:] *= 0.5

    result = diffusion_lens(edited, "a red circle", layers=2, **lens_results.FAST)
    (other,) = result.call.models.values()
    assert other.weights == record.weights
    assert "run.text_encoder.layers[0].output[:] *= 0.5" in other.edits[0]["source"]
    assert __file__ in other.edits[0]["where"]


def test_the_source_of_a_block_is_recorded(saved_models):
    model = lens_results.load(saved_models / "language")
    with model.edit() as edited:
        edited.layers[1].output[:] = 0
    (record,) = logit_lens(edited, "A cat", layers=0).call.models.values()
    assert record.edits[0]["source"] == "with model.edit() as edited:\n    edited.layers[1].output[:] = 0"


def test_other_weights_have_another_fingerprint():
    net = language.gpt2()
    model = language.model(net)

    def weights():
        (record,) = logit_lens(model, "A cat", layers=0).call.models.values()
        return record.weights

    before = weights()
    assert before == weights()
    with torch.no_grad():
        net.transformer.h[1].mlp.c_fc.weight += 1e-3
    assert weights() != before
    with torch.no_grad():
        net.transformer.h[1].mlp.c_fc.weight.copy_(language.gpt2().transformer.h[1].mlp.c_fc.weight)
    assert weights() == before


def test_a_live_model_has_no_source():
    (record,) = logit_lens(language.model(), "A cat", layers=0).call.models.values()
    assert record.source is None


def test_the_code_of_a_call_with_an_sae(saved_models):
    lines = lens_results.make("feature_effect", saved_models).call.code().splitlines()
    folder = json.dumps(str(saved_models / "sae"))
    assert lines[:2] == ["from diffsight import DiffusionModel", "from diffsight.lenses import SAE"]
    assert f'sae = SAE.load({folder}, subfolder="unet.mid_block")' in lines
    assert "    sae," in lines


def test_the_code_of_a_call(saved_models):
    result = lens_results.make("logit_lens", saved_models)
    folder = json.dumps(str(saved_models / "language"))
    assert result.call.code().splitlines() == [
        "from diffsight import LanguageModel",
        "from diffsight.lenses import logit_lens",
        "",
        f"model = LanguageModel({folder})",
        "result = logit_lens(",
        "    model,",
        f"    {json.dumps(language.PROMPTS[:2])},",
        "    layers=range(0, 4, 2),",
        "    top_k=2,",
        '    tokens=" Paris",',
        ")",
    ]


@pytest.mark.filterwarnings("ignore:the names found in GPT2LMHeadModel could not be verified")
def test_weights_of_every_kind_have_a_fingerprint():
    """Made in inference mode, of no element, sparse, on the meta device, of one byte."""
    with torch.inference_mode():
        net = language.gpt2()
        model = language.model(net)
        first = logit_lens(model, "A cat", layers=0).call.models["model"].weights
    assert first == logit_lens(language.model(), "A cat", layers=0).call.models["model"].weights
    net = language.gpt2()
    for name, value in {
        "none": torch.zeros(0),
        "scalar": torch.tensor(2.0),
        "sparse": torch.eye(3).to_sparse(),
        "meta": torch.zeros(3, device="meta"),
        "flags": torch.tensor([True, False]),
    }.items():
        net.register_parameter(name, nn.Parameter(value, requires_grad=False))
    other = logit_lens(language.model(net), "A cat", layers=0).call.models["model"].weights
    assert other != first
