"""Activations of pipelines, compared with plain hooks; the files that they are written to."""

import json

import numpy as np
import pytest
import torch

from diffsight import DiffusionModel, collect_activations, load_activations
from diffsight.errors import InputError
from helpers import outputs, refusal
from models import diffusion

PROMPTS = ["a red circle", "a blue square", "a green square above the circle"]
CALL = {"num_inference_steps": 3, "guidance_scale": 5.0, "progress": False}
MID, LAYER = "unet.mid_block", "text_encoder.layers[1]"


@pytest.fixture(scope="module")
def pipe():
    return diffusion.stable_diffusion()


@pytest.fixture(scope="module")
def model(pipe):
    return DiffusionModel(pipe)


@pytest.fixture(scope="module")
def hooked(pipe):
    """What the mid block returns for each prompt by itself: (branches, channels, rows, columns) at each step."""
    call = {"num_inference_steps": 3, "guidance_scale": 5.0, "output_type": "latent"}

    def of(number):
        generator = torch.Generator().manual_seed(4 + number)
        return outputs(pipe.unet.mid_block, pipe, PROMPTS[number], generator=generator, **call)

    with torch.no_grad():
        return [of(number) for number in range(len(PROMPTS))]


def expected(hooked, origin):
    prompt, step, position, branch = origin.tolist()
    return hooked[prompt][step][1 - branch].flatten(1)[:, position]  # the unconditional branch comes first


@pytest.mark.parametrize(("branch", "branches"), [(None, {0}), ("uncond", {1}), ("both", {0, 1})])
def test_every_vector_is_where_it_says(model, hooked, branch, branches):
    found = collect_activations(model, PROMPTS, layers=MID, branch=branch, seed=4, batch_size=2, **CALL)
    origins = found.origins[MID]
    assert len(found[MID]) == len(origins) == len(PROMPTS) * 3 * 64 * len(branches)
    assert len(set(map(tuple, origins.tolist()))) == len(origins)
    assert set(origins[:, 3].tolist()) == branches
    wanted = torch.stack([expected(hooked, origin) for origin in origins])
    assert torch.allclose(found[MID], wanted, atol=1e-3, rtol=1e-3)
    assert found.where(MID, prompt=1, step=2).shape == (64 * len(branches), 32)


def test_both_branches_without_guidance_are_the_conditional_one(model):
    call = CALL | {"guidance_scale": 1.0}
    both, cond = (
        collect_activations(model, PROMPTS[0], layers=[MID, LAYER], branch=b, **call) for b in ("both", "cond")
    )
    for point in (MID, LAYER):
        assert torch.equal(both[point], cond[point]) and torch.equal(both.origins[point], cond.origins[point])
    assert len(both[MID]) == 3 * 64


def test_an_iterator_holds_positions_and_steps(model):
    given, lists = (
        collect_activations(model, PROMPTS, layers=MID, positions=kind([0, 5]), steps=kind([0, -1]), **CALL)
        for kind in (iter, list)
    )
    assert torch.equal(given[MID], lists[MID]) and len(given[MID]) == len(PROMPTS) * 2 * 2


def test_sampled_positions_and_chosen_steps(model, hooked):
    options = {"layers": [MID, LAYER], "steps": [0, -1], "sample": 5, "seed": 4, "dtype": torch.float16}
    found = collect_activations(model, PROMPTS, **options, **CALL)
    assert found[MID].shape == (3 * 2 * 5, 32) and found[LAYER].shape == (3 * 5, 32)
    assert found[MID].dtype == torch.float16
    assert set(found.origins[MID][:, 1].tolist()) == {0, 2} and set(found.origins[LAYER][:, 1].tolist()) == {-1}
    wanted = torch.stack([expected(hooked, origin) for origin in found.origins[MID]])
    assert torch.allclose(found[MID].float(), wanted, atol=0.02, rtol=0.02)
    again = collect_activations(model, PROMPTS, **options, batch_size=1, **CALL)
    assert sorted(found.origins[MID].tolist()) == sorted(again.origins[MID].tolist())
    places = found.origins[MID][:, 2].reshape(-1, 5)
    assert len({tuple(row.tolist()) for row in places}) > 1


def test_files_are_loaded_and_continued(model, tmp_path, monkeypatch):
    options = {"layers": [MID, LAYER], "positions": [0, 7], "seed": 4, "batch_size": 1, **CALL}
    whole = collect_activations(model, PROMPTS, **options)
    read, calls = type(model).generate, []

    def interrupted(self, *args, **kwargs):
        calls.append(kwargs["prompt"])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return read(self, *args, **kwargs)

    monkeypatch.setattr(type(model), "generate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        collect_activations(model, PROMPTS, folder=tmp_path / "states", **options)
    names = {path.name for path in (tmp_path / "states").iterdir()}
    assert names == {"unfinished.json", "activations_00000.safetensors", "activations_00001.safetensors"}
    with pytest.raises(InputError, match="has no activations"):
        load_activations(tmp_path / "states")
    assert "differs in positions" in refusal(
        collect_activations, model, PROMPTS, folder=tmp_path / "states", **options | {"positions": [0]}
    )
    unfinished = tmp_path / "states" / "unfinished.json"
    settings = unfinished.read_text()
    unfinished.write_text(settings[:50])
    told = refusal(collect_activations, model, PROMPTS, folder=tmp_path / "states", **options)
    assert "unfinished.json is damaged: remove the folder" in told
    unfinished.write_text(settings)
    collect_activations(model, PROMPTS, folder=tmp_path / "states", **options)
    assert calls[3:] == [[PROMPTS[2]]]
    loaded = load_activations(tmp_path / "states")
    assert list(loaded) == [MID, LAYER]
    for point in loaded:
        assert torch.equal(loaded[point], whole[point]) and torch.equal(loaded.origins[point], whole.origins[point])
    assert list(load_activations(tmp_path / "states", layers=LAYER)) == [LAYER]
    index = json.loads((tmp_path / "states" / "activations.json").read_text())
    assert index["files"]["activations_00000.safetensors"] == {MID: 6, LAYER: 2}
    assert not (tmp_path / "states" / "unfinished.json").exists()
    assert "already exists" in refusal(collect_activations, model, PROMPTS, folder=tmp_path / "states", **options)
    with pytest.raises(InputError, match="no activations of 'unet'"):
        load_activations(tmp_path / "states", layers=["unet"])


def test_numbers_of_another_kind_continue_a_collection(model, tmp_path, monkeypatch):
    numpy = {"positions": np.arange(2), "sample": np.int64(2), "steps": np.arange(2), "batch_size": np.int64(1)}
    plain = {"positions": [0, 1], "sample": 2, "steps": [0, 1], "batch_size": 1}
    with monkeypatch.context() as patch:
        patch.setattr(type(model), "generate", lambda *args, **kwargs: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            collect_activations(model, PROMPTS, layers=MID, folder=tmp_path / "states", **numpy, **CALL)
    collect_activations(model, PROMPTS, layers=MID, folder=tmp_path / "states", **plain, **CALL)
    index = json.loads((tmp_path / "states" / "activations.json").read_text())
    assert index["positions"] == [0, 1] and index["sample"] == 2


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"layers": 4}, "are chosen by path"),
        ({"of": "mlps_output"}, "of is for language models"),
        ({"branch": "left"}, "branch must be one of"),
        ({"layers": "vae.decoder", "branch": "cond"}, "branches of guidance exist in"),
        ({"sample": 0}, "sample must be a positive integer"),
        ({"steps": "x"}, "steps are integers or slices"),
        ({"positions": 1.5}, "positions are integers, not 1.5"),
        ({"prompts": []}, "prompts must be a prompt"),
    ],
)
def test_bad_input(model, given, words):
    assert words in refusal(collect_activations, model, **{"prompts": PROMPTS, "layers": MID, **given})
