"""Activations of many prompts, against plain hooks, prompt by prompt."""

import json
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from diffsight import collect_activations, load_activations
from diffsight.errors import InputError
from helpers import refusal
from models import language

PROMPTS = [*language.PROMPTS, "hello king", "in Paris and London"]


def layer_states(net, text, part=None):
    layers = net.transformer.h if part is None else [getattr(layer, part) for layer in net.transformer.h]
    return torch.stack([hidden[0] for hidden in language.hidden_states(net, layers, language.ids(text))])


def test_the_last_token_of_each_prompt(net, model):
    found = collect_activations(model, PROMPTS, batch_size=2, progress=False)
    expected = torch.stack([layer_states(net, text)[:, -1] for text in PROMPTS], 1)
    assert found.values.shape == (4, 5, 32)
    assert torch.allclose(found.values, expected, atol=1e-5)
    assert found.prompts.tolist() == [0, 1, 2, 3, 4]
    assert torch.equal(found[2], found.values[2])


def test_all_tokens(net, model):
    found = collect_activations(model, PROMPTS, layers=[1, 3], positions=None, batch_size=2, progress=False)
    for i, text in enumerate(PROMPTS):
        expected = layer_states(net, text)[[1, 3]]
        assert torch.allclose(found.of_prompt(i), expected, atol=1e-5)
        assert found.positions[found.prompts == i].tolist() == list(range(expected.shape[1]))


def test_prompts_by_number(net, model):
    found = collect_activations(model, PROMPTS, positions=None, batch_size=2, progress=False)
    assert torch.allclose(found.of_prompt(-1), layer_states(net, PROMPTS[-1]), atol=1e-5)
    for prompt in (5, -6, "0", True):
        with pytest.raises(InputError, match="there are 5"):
            found.of_prompt(prompt)


@pytest.mark.parametrize(("of", "part"), [("attentions_output", "attn"), ("mlps_output", "mlp")])
def test_parts_of_layers(net, model, of, part):
    found = collect_activations(model, PROMPTS, of=of, positions=0)
    expected = torch.stack([layer_states(net, text, part)[:, 0] for text in PROMPTS], 1)
    assert torch.allclose(found.values, expected, atol=1e-5)


def test_heads(model):
    found = collect_activations(model, PROMPTS, of="heads_output", layers=0)
    assert found.values.shape == (1, 5, 4, 8)
    assert torch.equal(found.values, collect_activations(model, PROMPTS, of="heads_output", layers=0).values)


def test_a_type_of_its_own(model):
    half = collect_activations(model, PROMPTS, dtype=torch.float16)
    assert torch.equal(half.values, collect_activations(model, PROMPTS).values.half())


def test_a_folder(model, tmp_path):
    options = {"positions": None, "batch_size": 2, "progress": False}
    folder = collect_activations(model, PROMPTS, folder=tmp_path / "states", **options)
    assert folder == tmp_path / "states"
    assert sorted(path.name for path in folder.iterdir()) == [
        "activations.json",
        *(f"activations_{i:05}.safetensors" for i in range(3)),
    ]
    stored, found = load_activations(folder), collect_activations(model, PROMPTS, **options)
    for name in ("values", "prompts", "positions"):
        assert torch.equal(getattr(stored, name), getattr(found, name))
    assert (stored.of, stored.layers, stored.model) == (found.of, found.layers, found.model)
    assert torch.equal(load_activations(folder, layers=2)[2], found[2])
    assert json.loads((folder / "activations.json").read_text())["versions"]["torch"] == version("torch")


@pytest.mark.parametrize("folder", [".", "", Path(), "link", "new/states"])
def test_an_empty_folder_is_filled(model, tmp_path, monkeypatch, folder):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    if folder == "link":
        (tmp_path / "elsewhere").mkdir()
        Path("link").symlink_to("../elsewhere")
    collect_activations(model, PROMPTS, layers=[1], folder=folder)
    assert {path.name for path in Path(folder).iterdir()} == {"activations.json", "activations_00000.safetensors"}
    assert torch.equal(load_activations(folder)[1], collect_activations(model, PROMPTS)[1])
    assert "already exists: choose a new or an empty folder" in refusal(
        collect_activations, model, PROMPTS, folder=folder
    )


def test_a_folder_appears_when_it_is_complete(model, tmp_path, monkeypatch):
    class Broken(Exception):
        pass

    def fail(*_):
        raise Broken

    monkeypatch.setattr(import_module("diffsight.lenses.collect_activations"), "write_record", fail)
    with pytest.raises(Broken):
        collect_activations(model, PROMPTS, folder=tmp_path / "new" / "states")
    assert list(tmp_path.iterdir()) == []


def test_the_model_goes_no_further_than_it_must(net, model):
    calls = []
    hooks = [layer.register_forward_pre_hook(lambda *_: calls.append(1)) for layer in net.transformer.h]
    collect_activations(model, PROMPTS, layers=[0, 1])
    for hook in hooks:
        hook.remove()
    assert len(calls) == 2


def test_bad_input(model, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a.txt").write_text("a")
    for given, words in (
        ({"of": "layer_output"}, r"'layer_output' cannot be collected \(did you mean 'layers_output'"),
        ({"layers": 4}, "there is no layer 4"),
        ({"positions": 5}, r"there is no position 5 in prompt \d: it has \d tokens"),
        ({"prompts": []}, "there is no prompt"),
        ({"prompts": ["a", ""]}, "the prompt is empty"),
        ({"dtype": torch.int8}, "floating point numbers: dtype cannot be torch.int8"),
        ({"folder": tmp_path / "full"}, "already exists"),
        ({"batch_size": -1}, "batch_size must be a positive integer, not -1"),
    ):
        with pytest.raises(InputError, match=words):
            collect_activations(model, **{"prompts": PROMPTS, **given})
    with pytest.raises(InputError, match=r"there is no activations\.json in it"):
        load_activations(tmp_path / "full")
    with pytest.raises(InputError, match="takes a LanguageModel or a DiffusionModel, not GPT2LMHeadModel"):
        collect_activations(language.gpt2(), PROMPTS)
    found = collect_activations(model, PROMPTS, layers=[1, 2])
    with pytest.raises(InputError, match="does not have layer 0: it has 1, 2"):
        found[0]
