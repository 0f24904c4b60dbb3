"""Commands that patch, trace, ablate and steer: they write what the functions of Python return."""

import json
from pathlib import Path

import pytest
import torch
from command_line import refusal, run
from safetensors.torch import load_file

from diffsight import (
    activation_patching,
    attribution_patching,
    block_ablation,
    causal_tracing,
    function_vector,
    prompt_swap,
    steering_sweep,
    steering_vector,
)
from diffsight.errors import InputError
from diffsight.gallery import repeat
from diffsight.gallery.option_parsing import parse_numbers, parse_positions, parse_windows
from diffsight.gallery.prompt_files import read_pairs
from diffsight.lenses import latent_distance, logit_difference, pixel_distance, shapes_verdict
from models import lens_results

RED, BLUE = "a red circle above a blue square", "a blue circle above a blue square"
PROMPTS = "The capital of France is", "The capital of Paris is"


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def tensors(name, folder="out"):
    return load_file(Path(folder, name))


@pytest.fixture
def model(saved_models):
    return lens_results.load(saved_models / "language")


@pytest.fixture
def pipeline(saved_models):
    return lens_results.load(saved_models / "pipeline")


def test_activation_patching(saved_models, model, capsys):
    prompts = "The capital of France is", "The capital of Paris is"
    options = ("--tokens", " Paris, London", "--sites", "heads", "--layers=0,-1", "--model", saved_models / "language")
    assert run("activation-patching", *prompts, *options, "--out", "out") == 0
    metric = logit_difference(" Paris", " London")
    want = activation_patching(model, *prompts, metric, sites=["heads"], layers=[0, -1], progress=False)
    assert f"{want.top(1)[0].effect:8.3f}  {want.top(1)[0].site}" in capsys.readouterr().out
    assert json.loads(Path("out/lens.json").read_text())["top"] == [list(one) for one in want.top()]
    assert repeat("out").is_identical


def test_attribution_patching(saved_models, model):
    options = ("--tokens", " Paris, London", "--positions", "capital,-1", "--model", saved_models / "language")
    assert run("attribution-patching", *PROMPTS, *options, "--out", "out") == 0
    metric = logit_difference(" Paris", " London")
    want = attribution_patching(model, *PROMPTS, metric, positions=["capital", -1], progress=False)
    assert torch.allclose(tensors("effects.safetensors")["values"], want.values, atol=1e-6)


@pytest.mark.parametrize("lens", [activation_patching, attribution_patching])
def test_patching_a_pipeline(saved_models, pipeline, lens):
    options = ("--metric", "latents", "--sites", "unet.mid_block", "--at", "0,1:3", "--steps", 3, "--seed", 2)
    name = lens.__name__.replace("_", "-")
    assert run(name, RED, BLUE, *options, "--model", saved_models / "pipeline", "--out", "out") == 0
    chosen = {"sites": "unet.mid_block", "steps": [0, slice(1, 3)], "seed": 2, "num_inference_steps": 3}
    want = lens(pipeline, RED, BLUE, latent_distance(), **chosen, progress=False)
    assert torch.allclose(tensors("effects.safetensors")["values"], want.values, atol=1e-6)


def test_causal_tracing(saved_models, model, pipeline):
    options = ("--samples", 2, "--layers", "0,1", "--model", saved_models / "language", "--out", "out")
    assert run("causal-tracing", PROMPTS[0], "France", "--answer", " Paris", *options) == 0
    chosen = {"answer": " Paris", "samples": 2, "layers": [0, 1], "progress": False}
    want = causal_tracing(model, PROMPTS[0], "France", **chosen)
    assert torch.allclose(tensors("trace.safetensors")["values"], want.values, atol=1e-6)
    options = ("--sites", "unet.mid_block", "--steps", 1, "--samples", 1, "--model", saved_models / "pipeline")
    assert run("causal-tracing", RED, "circle", *options, "--out", "image") == 0
    chosen = {"sites": "unet.mid_block", "samples": 1, "num_inference_steps": 1, "progress": False}
    want = causal_tracing(pipeline, RED, "circle", metric=pixel_distance(), **chosen)
    assert torch.allclose(tensors("trace.safetensors", "image")["values"], want.values, atol=1e-6)


def test_block_ablation_and_prompt_swap(saved_models, pipeline):
    options = ("--steps", 1, "--model", saved_models / "pipeline", "--seed", 2)
    chosen = {"num_inference_steps": 1, "seed": 2, "progress": False}
    assert run("block-ablation", RED, "--sites", "unet.**.attn2", "--mode", "zero", *options, "--out", "out") == 0
    want = block_ablation(pipeline, RED, sites="unet.**.attn2", mode="zero", **chosen)
    assert torch.allclose(tensors("effects.safetensors")["values"], want.values, atol=1e-6)
    assert run("prompt-swap", RED, BLUE, "--metric", "blue circle", "--window", 2, *options, "--out", "swap") == 0
    want = prompt_swap(pipeline, RED, BLUE, shapes_verdict("blue circle"), window=2, **chosen)
    assert torch.equal(tensors("values.safetensors", "swap")["values"], want.values)


def test_steering_sweep(saved_models, model):
    Path("a.txt").write_text("A cat sat\nThe king\n")
    Path("b.txt").write_text("The capital\nhello cat\n")
    options = ("--layers", "1", "--factors", "0,4", "--set", "max_new_tokens=3", "--model", saved_models / "language")
    options += ("--set", "do_sample=True", "--seed", 7, "--out", "out")
    assert run("steering-sweep", "A cat", "--positive", "a.txt", "--negative", "b.txt", *options) == 0
    sides = ["A cat sat", "The king"], ["The capital", "hello cat"]
    vector = steering_vector(model, *sides, layers=[1], progress=False)
    more = {"max_new_tokens": 3, "do_sample": True, "seed": 7}
    want = steering_sweep(model, "A cat", vector=vector, factors=[0, 4], progress=False, **more)
    assert json.loads(Path("out/lens.json").read_text())["texts"] == [list(row) for row in want.texts]


def test_function_vector(saved_models, model, capsys):
    Path("pairs.tsv").write_text("".join(f"{question}\t{answer}\n" for question, answer in lens_results.PAIRS))
    options = ("--shots", 2, "--heads", 2, "--model", saved_models / "language", "--out", "out")
    assert run("function-vector", "pairs.tsv", *options) == 0
    want = function_vector(model, lens_results.PAIRS, shots=2, heads=2, progress=False)
    assert torch.allclose(tensors("function_vector.safetensors")["vector"], want.vector, atol=1e-6)
    assert f"layer {want.heads[0][0]} head {want.heads[0][1]}" in capsys.readouterr().out


def test_refused(saved_models, capsys):
    language, pipeline = (("--model", saved_models / name) for name in ("language", "pipeline"))
    patch = ("activation-patching", RED, BLUE)
    assert "one token or two" in refusal(capsys, *patch, "--tokens", "a,b,c")
    assert "pass one of them" in refusal(capsys, *patch, "--tokens", "a", "--metric", "pixels")
    assert "pass --tokens for a language model" in refusal(capsys, *patch, *language)
    assert "--steps are denoising steps" in refusal(capsys, *patch, "--tokens", " Paris", "--steps", 2, *language)
    assert "--tokens is for language models" in refusal(capsys, *patch, "--tokens", "a", *pipeline)
    assert "the reader does not know 'dog'" in refusal(capsys, *patch, "--metric", "red dog", *pipeline)
    assert "--metric is for pipelines" in refusal(capsys, "causal-tracing", RED, "red", "--metric", "red", *language)
    files = ("--positive", "none.txt", "--negative", "none.txt", "--factors", "1")
    assert "the prompts cannot be read" in refusal(capsys, "steering-sweep", RED, *files, *language)
    assert "does not name steps" in refusal(capsys, *patch, "--at", "first")
    assert "is not a list of numbers" in refusal(capsys, "steering-sweep", RED, *files[:4], "--factors", "a")


def test_pairs_in_a_file(tmp_path):
    path = tmp_path / "pairs.tsv"
    path.write_text("hot\tcold\n\nbig \t small\n")
    assert read_pairs(path) == [("hot", "cold"), ("big", "small")]
    for text, said in (("hot cold", "line 1"), ("\n", "has no pairs"), ("a\tb\tc", "line 1")):
        path.write_text(text)
        with pytest.raises(InputError, match=said):
            read_pairs(path)


def test_values_of_options():
    assert parse_windows("0:10,10:20,-1") == [slice(0, 10), slice(10, 20), -1]
    assert parse_windows("each") == "each"
    assert parse_positions("red circle,-1") == ["red circle", -1]
    assert parse_positions("words") == "words"
    assert parse_numbers("0,-2.5") == [0.0, -2.5]
