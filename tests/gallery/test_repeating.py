"""`repeat`: every lens of the package, made again from its record, bit for bit; and what it says where it is not."""

import json
import shutil
from inspect import isclass, isfunction
from typing import get_type_hints

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from diffsight import diffusion_lens, lenses, logit_lens
from diffsight.errors import InputError
from diffsight.gallery import repeat
from diffsight.gallery.cli import main
from diffsight.lenses.results.result import LensResult
from models import language, lens_results


@pytest.mark.parametrize("name", lens_results.MADE)
def test_every_lens_is_repeated_from_its_record_bit_for_bit(name, saved_models, tmp_path):
    lens_results.make(name, saved_models).save(tmp_path)
    repetition = repeat(tmp_path)
    assert repetition.differences == {}
    assert repetition.is_identical
    kept = {path.name for path in tmp_path.iterdir()} - {"page.html", "thumbnail.jpg", "arguments.safetensors"}
    assert set(repetition.compared) == kept
    assert repetition.notes == ()
    assert repetition.then == repetition.now


def test_every_lens_that_returns_a_result_is_repeated():
    functions = {name: value for name in lenses.__all__ if isfunction(value := getattr(lenses, name))}
    returned = {name: get_type_hints(value).get("return") for name, value in functions.items()}
    results = {name for name, kind in returned.items() if isclass(kind) and issubclass(kind, LensResult)}
    assert results == {name.split()[0] for name in lens_results.MADE}
    wrapped = {name for name, function in functions.items() if hasattr(function, "__wrapped__")}
    assert results == wrapped - {"collect_activations"}  # it runs where the model is, but returns no result


@pytest.fixture
def saved(saved_models, tmp_path):
    lens_results.make("diffusion_lens", saved_models).save(tmp_path / "lens")
    return tmp_path / "lens"


def test_the_command_says_that_it_is_identical(saved, capsys):
    assert main(["repeat", str(saved / "lens.json")]) == 0
    out = capsys.readouterr().out
    assert out.startswith("identical (6 files compared")
    assert "torch" in out


def test_an_image_that_differs_is_named_with_how_far_off_it_is(saved, capsys):
    pixels = np.array(Image.open(saved / "layer_01.png"))
    pixels[0, 0, 0] ^= 4
    Image.fromarray(pixels).save(saved / "layer_01.png")
    (saved / "layer_02.png").unlink()
    Image.new("RGB", (9, 5)).save(saved / "embedding.png")
    assert main(["repeat", str(saved)]) == 1
    out = capsys.readouterr().out
    assert out.startswith("different")
    assert "layer_01.png: up to 4 of 255" in out
    assert "layer_02.png: missing" in out
    assert "embedding.png: a different size: " in out
    assert "instead of 9 x 5" in out


def test_numbers_and_words_that_differ_are_named(saved_models, tmp_path):
    lens_results.make("logit_lens", saved_models).save(tmp_path)
    tensors = load_file(tmp_path / "lens.safetensors")
    tensors["probabilities"][0, 0, 0, 0] += 0.25
    save_file(tensors, tmp_path / "lens.safetensors")
    record = json.loads((tmp_path / "lens.json").read_text())
    record["words"][0][0][0] = "other"
    record["versions"]["torch"] = "1.0"
    (tmp_path / "lens.json").write_text(json.dumps(record))
    repetition = repeat(tmp_path)
    assert repetition.differences == {
        "lens.json": "different words",
        "lens.safetensors": "probabilities by up to 0.25",
    }
    (line,) = [line for line in str(repetition).splitlines() if line.startswith("torch")]
    assert line.split() == ["torch", "1.0", repetition.now["torch"], "changed"]


def test_other_weights_are_noted(saved_models, tmp_path):
    net = language.gpt2()
    net.save_pretrained(tmp_path / "model")
    language.TOKENIZER.save_pretrained(tmp_path / "model")
    logit_lens(lens_results.LanguageModel(tmp_path / "model"), "A cat").save(tmp_path / "lens")
    with torch.no_grad():
        net.transformer.h[0].mlp.c_fc.weight.mul_(2)
    net.save_pretrained(tmp_path / "model")
    repetition = repeat(tmp_path / "lens")
    assert not repetition.is_identical
    (note,) = repetition.notes
    assert note.startswith("the weights of model changed")


def test_a_live_or_edited_model_is_passed(saved_models, tmp_path):
    live = language.model()
    logit_lens(live, "A cat").save(tmp_path / "live")
    with pytest.raises(InputError, match=r"model was a live model: pass it, as in repeat\(path, model=model\)"):
        repeat(tmp_path / "live")
    assert repeat(tmp_path / "live", model=live).is_identical

    @lens_results.load(saved_models / "pipeline").edit
    def edited(run):
        run.text_encoder.layers[0].output[:] *= 0.5

    diffusion_lens(edited, "a red circle", layers=1, **lens_results.FAST).save(tmp_path / "edited")
    with pytest.raises(InputError, match="model had edits, which the record only lists: pass the edited model"):
        repeat(tmp_path / "edited")
    assert repeat(tmp_path / "edited", model=edited).is_identical


@pytest.fixture
def sae():
    torch.manual_seed(2)
    return lenses.SAE(32, 64, k=4, point="layers[1]").eval().requires_grad_(False)


def evaluate(saved_models, sae):
    return lenses.evaluate_sae(lens_results.load(saved_models / "language"), sae, ["A cat"])


def test_an_sae_in_memory_is_passed(saved_models, sae, tmp_path):
    evaluate(saved_models, sae).save(tmp_path)
    with pytest.raises(
        InputError, match=r"sae was an SAE that was not loaded .*: pass it, as in repeat\(path, sae=sae\)"
    ):
        repeat(tmp_path)
    assert repeat(tmp_path, sae=sae).is_identical


def test_another_sae_in_the_same_folder_is_noted(saved_models, sae, tmp_path):
    sae.save(tmp_path / "sae")
    evaluate(saved_models, lenses.SAE.load(tmp_path / "sae")).save(tmp_path / "lens")
    assert repeat(tmp_path / "lens").notes == ()
    sae.encoder *= 2
    sae.save(tmp_path / "sae")
    repetition = repeat(tmp_path / "lens")
    assert not repetition.is_identical
    (note,) = repetition.notes
    assert note.startswith("the weights of sae changed")


def test_a_trained_sae_is_repeated_from_its_folder(saved_models, tmp_path):
    model = lens_results.load(saved_models / "language")
    settings = lenses.SAESettings(updates=2, batch_size=4)
    trained = lenses.train_sae(
        model,
        "layers[1]",
        ["A cat"],
        features=8,
        k=2,
        settings=settings,
        buffer=64,
        folder=tmp_path / "sae",
        progress=False,
    )
    evaluate(saved_models, trained).save(tmp_path / "lens")
    repetition = repeat(tmp_path / "lens")
    assert repetition.is_identical
    assert repetition.notes == ()


def test_an_argument_can_be_replaced(saved):
    assert set(repeat(saved, seed=4).differences) >= {"layer_00.png", "lens.json"}


def test_options_of_the_model_are_used_again(saved_models, tmp_path):
    model = lens_results.LanguageModel(saved_models / "language", dtype=torch.float64)
    result = logit_lens(model, "A cat", layers=0)
    assert result.call.models["model"].options == {"dtype": {"$dtype": "float64"}}
    result.save(tmp_path)
    assert repeat(tmp_path).is_identical


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "has no result"),
        ("{", "has no result"),
        ('{"a": 1}', "has no result"),
        ('{"lens": "diffusion_lens"}', "does not say how the result was made"),
        ('{"lens": "x", "call": {"function": "os.system", "arguments": {}, "models": {}}}', "not a part of diffsight"),
        (
            '{"lens": "x", "call": {"function": "diffsight.lenses.dream_lens", "arguments": {}, "models": {}}}',
            "this version of diffsight has no diffsight.lenses.dream_lens",
        ),
    ],
    ids=str,
)
def test_records_that_cannot_be_repeated(tmp_path, content, message, capsys):
    if content is not None:
        (tmp_path / "lens.json").write_text(content)
    with pytest.raises(InputError, match=message):
        repeat(tmp_path)
    assert main(["repeat", str(tmp_path)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize(
    "place, value, message",
    [
        (["arguments"], {}, r"missing a required argument: 'model'.* It may be damaged or of another version"),
        (["arguments", "model"], {"$model": []}, "damaged: its argument model cannot be read"),
        (["arguments", "model"], {"$dtype": "float99"}, "damaged: its argument model cannot be read"),
        (["arguments", "new_option"], 1, "'new_option'"),
        (["models", "model"], None, "does not say how model was loaded"),
        (["models", "model", "kind"], "os", "model was a 'os', which cannot be loaded"),
    ],
    ids=str,
)
def test_damaged_records_and_those_of_other_versions(saved_models, tmp_path, place, value, message):
    lens_results.make("logit_lens", saved_models).save(tmp_path)
    record = json.loads((tmp_path / "lens.json").read_text())
    inner = record["call"]
    for name in place[:-1]:
        inner = inner[name]
    inner[place[-1]] = value
    (tmp_path / "lens.json").write_text(json.dumps(record))
    with pytest.raises(InputError, match=message):
        repeat(tmp_path)


def test_a_record_of_a_newer_version(saved):
    record = json.loads((saved / "lens.json").read_text())
    record["call"]["arguments"]["new_option"] = 1
    record["versions"]["diffsight"] = "99.0"
    (saved / "lens.json").write_text(json.dumps(record))
    with pytest.raises(InputError, match=r"'new_option'.*The record was written by diffsight 99\.0, and this is"):
        repeat(saved)


def test_a_model_that_is_gone(saved, saved_models):
    record = json.loads((saved / "lens.json").read_text())
    record["call"]["models"]["model"]["source"] = str(saved / "nothing")
    (saved / "lens.json").write_text(json.dumps(record))
    with pytest.raises(InputError, match="nothing"):
        repeat(saved)


def test_several_results_in_one_folder(saved, saved_models):
    lens_results.make("run_prompts", saved_models).save(saved.parent / "other")
    shutil.copytree(saved.parent / "other", saved, dirs_exist_ok=True)
    with pytest.raises(InputError, match=r"several results \(lens\.json, targets\.json\): name one of them"):
        repeat(saved)
    assert repeat(saved / "targets.json").is_identical


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match="there is no"):
        repeat(tmp_path / "nothing.json")


def _set(*path):
    """Return what changes a value of a record: `_set("call", "models", 3)` puts 3 in the place of the models."""

    def change(record):
        *around, name, value = path
        for key in around:
            record = record[key]
        record[name] = value

    return change


NONSENSE = {
    "models is no dictionary": _set("call", "models", 3),
    "a model without a source": _set("call", "models", "model", {"kind": "DiffusionModel"}),
    "a model of another kind": _set("call", "models", "model", "kind", "image_grid"),
    "a source that is no text": _set("call", "models", "model", "source", 3),
    "options that are a list": _set("call", "models", "model", "options", [1]),
    "a function that is no text": _set("call", "function", 3),
    "a function that is no lens": _set("call", "function", "diffsight.gallery.repeat"),
    "an argument that the lens does not have": _set("call", "arguments", "bananas", 3),
    "a model that is not listed": _set("call", "arguments", "model", {"$model": "other"}),
    "a range of texts": _set("call", "arguments", "layers", {"$range": ["a"]}),
    "a slice of nothing": _set("call", "arguments", "layers", {"$slice": None}),
    "a type that PyTorch does not have": _set("call", "arguments", "layers", {"$dtype": "float3"}),
    "a type that is a number": _set("call", "arguments", "layers", {"$dtype": 3}),
    "a device that does not exist": _set("call", "arguments", "layers", {"$device": "fridge"}),
    "pairs of three": _set("call", "arguments", "layers", {"$map": [[1, 2, 3]]}),
    "an object of another package": _set("call", "arguments", "layers", {"$object": ["os.system", {}]}),
    "an object without a name": _set("call", "arguments", "layers", {"$object": [3, {}]}),
    "a tensor that is a list": _set("call", "arguments", "layers", {"$tensor": [1]}),
    "a seed that is a text": _set("call", "arguments", "seed", "x"),
    "versions that are a list": _set("versions", [1]),
}


def test_nonsense_in_a_record_is_named_before_anything_runs(saved, monkeypatch):
    monkeypatch.setattr(torch.nn.Conv2d, "forward", lambda *_: pytest.fail("the denoiser was called"))
    whole = (saved / "lens.json").read_text()
    for what, change in NONSENSE.items():
        record = json.loads(whole)
        change(record)
        (saved / "lens.json").write_text(json.dumps(record))
        try:
            repeat(saved)
        except InputError:
            continue
        pytest.fail(f"nothing was said about {what}")
