"""Steering vectors and sweeps, compared with plain hooks and closed forms."""

import pytest
import torch
import torch.nn.functional as F

from diffsight import DiffusionModel, LanguageModel, steer, steering_sweep, steering_vector
from diffsight.errors import InputError, UnknownKeyError
from diffsight.lenses import SteeringVectors
from helpers import outputs, refusal
from models import diffusion, language, language_kinds

POSITIVE = ["A cat sat on the king", "The capital of France is in Paris", "cat hello"]
NEGATIVE = ["A cat sat on the", "The capital of Rome", "hello hello cat"]


def last_states(net, layer, texts, ids=language.ids):
    return torch.stack([first(outputs(layer, net, ids(text))[0])[0, -1] for text in texts])


def first(output):
    return output if isinstance(output, torch.Tensor) else output[0]


@torch.no_grad()
@pytest.mark.parametrize("layer", [0, 3])
def test_the_difference_of_means(net, model, layer):
    found = steering_vector(model, POSITIVE, NEGATIVE, layers=[0, -1], progress=False)
    block = net.transformer.h[layer]
    expected = last_states(net, block, POSITIVE).mean(0) - last_states(net, block, NEGATIVE).mean(0)
    assert torch.allclose(found[layer], expected, atol=1e-5)
    assert list(found) == [0, 3]


@torch.no_grad()
@pytest.mark.parametrize(
    ("build", "layers"),
    [
        ("llama", "model.layers"),
        ("opt", "model.decoder.layers"),
        ("bloom", "transformer.h"),
        ("mamba", "backbone.layers"),
        ("bert", "bert.encoder.layer"),
    ],
)
def test_on_other_architectures(build, layers):
    net = getattr(language_kinds, build)()
    model = LanguageModel((net, language_kinds.TOKENIZER))
    texts = [["a red circle", "the green square"], ["a blue circle above the square", "a photo"]]
    found = steering_vector(model, *texts, layers=[1], progress=False)
    block = net.get_submodule(layers)[1]
    means = [last_states(net, block, side, language_kinds.ids).mean(0) for side in texts]
    assert torch.allclose(found[1], means[0] - means[1], atol=1e-5)


@torch.no_grad()
def test_positions_are_averaged(net, model):
    found = steering_vector(model, POSITIVE, NEGATIVE, layers="layers[2].mlp", positions=[0, -1], progress=False)
    mlp = net.transformer.h[2].mlp
    means = [
        torch.stack([outputs(mlp, net, language.ids(text))[0][0, [0, -1]].mean(0) for text in side]).mean(0)
        for side in (POSITIVE, NEGATIVE)
    ]
    assert torch.allclose(found["layers[2].mlp"], means[0] - means[1], atol=1e-5)


@torch.no_grad()
def test_the_first_component_of_the_differences(net, model):
    found = steering_vector(model, POSITIVE, NEGATIVE, layers=2, method="pca", progress=False)[2]
    states = [last_states(net, net.transformer.h[2], side) for side in (POSITIVE, NEGATIVE)]
    differences = states[0] - states[1]
    vectors = torch.linalg.eigh(differences.T @ differences).eigenvectors
    assert torch.allclose((found @ vectors[:, -1]).abs(), torch.ones(()), atol=1e-4)
    assert found @ differences.mean(0) > 0
    assert not steering_vector(model, POSITIVE, POSITIVE, layers=2, method="pca", progress=False)[2].any()


@torch.no_grad()
def test_a_probe_is_where_the_gradient_of_its_loss_is_zero(net, model):
    found = steering_vector(model, POSITIVE, NEGATIVE, layers=2, method="probe", progress=False)[2]
    states = torch.cat([last_states(net, net.transformer.h[2], side) for side in (POSITIVE, NEGATIVE)])
    states = (states / states.norm(dim=-1).mean()).double()
    labels = torch.tensor([1.0, 1, 1, 0, 0, 0]).double()
    weights, bias = torch.zeros(32).double(), torch.zeros(()).double()
    for _ in range(20000):  # plain gradient descent
        error = labels - torch.sigmoid(states @ weights + bias)
        weights, bias = weights + 0.1 * (states.T @ error - weights), bias + 0.1 * error.sum()
    assert torch.allclose(found, F.normalize(weights, dim=0).float(), atol=1e-4)


INPUTS = {k: v for k, v in diffusion.PIPELINES["stable_diffusion"].inputs().items() if k != "prompt"}
RED, BLUE = ["a red circle", "a red square"], ["a blue circle", "a blue square"]


@pytest.fixture(scope="module")
def pipe():
    return diffusion.stable_diffusion()


@torch.no_grad()
def test_a_vector_for_each_step_and_module_of_a_denoiser(pipe):
    found = steering_vector(
        DiffusionModel(pipe), RED, BLUE, layers="unet.**.attn2", seed=5, progress=False, num_inference_steps=3,
        guidance_scale=5.0,
    )  # fmt: skip
    path = "unet.mid_block.attentions[0].transformer_blocks[0].attn2"
    module = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2
    means = []
    for side in (RED, BLUE):
        states = []
        for i, prompt in enumerate(side):
            generator = torch.Generator().manual_seed(5 + i)
            calls = outputs(module, pipe, prompt, generator=generator, **INPUTS)
            states.append(torch.stack([call[1].mean(0) for call in calls]))
        means.append(torch.stack(states).mean(0))
    assert found[path].shape == (3, 32)
    assert torch.allclose(found[path], F.normalize(means[0] - means[1], dim=-1), atol=2e-3)
    assert len(found) == len([name for name, _ in pipe.unet.named_modules() if name.endswith("attn2")])


@torch.no_grad()
def test_text_encoders_and_saving(pipe, tmp_path):
    model = DiffusionModel(pipe)
    found = steering_vector(model, RED, BLUE, layers="text_encoder.layers[*]", positions=2, progress=False)
    layer = pipe.text_encoder.encoder.layers[1]
    states = [first(outputs(layer, pipe.encode_prompt, text, "cpu", 1, False)[0])[0, 2] for text in RED + BLUE]
    expected = (states[0] + states[1] - states[2] - states[3]) / 2
    assert torch.allclose(found["text_encoder.layers[1]"], expected, atol=1e-5)
    found.save(tmp_path / "vectors")
    loaded = SteeringVectors.load(tmp_path / "vectors")
    assert list(loaded) == list(found)
    assert all(torch.equal(loaded[name], found[name]) for name in found)
    images = [
        steer(model, vector=one, factor=2).generate("a circle", seed=0, **INPUTS).images for one in (found, loaded)
    ]
    assert torch.equal(*images)


def test_vectors_of_other_steps_are_an_error(pipe):
    model = DiffusionModel(pipe)
    found = steering_vector(model, RED, BLUE, layers="unet.mid_block", progress=False, num_inference_steps=3)
    with pytest.raises(InputError, match=r"the vectors were computed for 3 steps at .*, but step 0 of this run"):
        steer(model, vector=found).generate("a circle", seed=0, num_inference_steps=2).result


def test_a_sweep_of_images_equals_single_runs(pipe):
    model, vector = DiffusionModel(pipe), torch.ones(32)
    call = {"num_inference_steps": 2, "guidance_scale": 5.0}
    sweep = steering_sweep(model, RED, "unet.mid_block", vector, factors=[0, 4], seed=3, progress=False, **call)
    assert sweep.grid().width > sweep.grid().height / 3
    for prompt, row in zip(RED, sweep.images):
        for factor, image in zip((0, 4), row):
            expected = steer(model, "unet.mid_block", vector, factor).generate(prompt, seed=3, **call).images[0]
            assert max(abs(a - b) for a, b in zip(image.tobytes(), expected.tobytes())) <= 2


def test_a_sweep_of_texts_equals_single_runs(model):
    call = {"max_new_tokens": 4, "pad_token_id": 0, "do_sample": False}
    vector = torch.randn(32, generator=torch.Generator().manual_seed(0)) * 3
    sweep = steering_sweep(model, language.PROMPTS[:2], 1, vector, factors=[0, 1], progress=False, **call)
    for prompt, texts in zip(language.PROMPTS, sweep.texts):
        assert texts == tuple(steer(model, 1, vector, factor).generate(prompt, **call).text for factor in (0, 1))
    assert sweep.texts[0][0] != sweep.texts[0][1]
    with pytest.raises(InputError, match="are texts, not images"):
        sweep.grid()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"positive": "A cat"}, "positive must be a list of prompts"),
        ({"negative": []}, "negative is empty"),
        ({"method": "svm"}, "method must be one of 'mean', 'pca', 'probe'"),
        ({"method": "pca", "negative": ["A cat"]}, "3 positive and 1 negative"),
        ({"steps": 1}, "steps is for pipelines"),
        ({"seed": 1}, "seed is for pipelines"),
        ({"layers": 9}, "there is no layer 9"),
        ({"temperature": 1.0}, "temperature"),
    ],
)
def test_bad_input(model, given, words):
    call = {"positive": POSITIVE, "negative": NEGATIVE, "progress": False} | given
    assert words in refusal(steering_vector, model, **call)


def test_points_before_and_in_the_steps(pipe):
    layers = ["text_encoder.layers[0]", "unet.mid_block"]
    assert "call steering_vector once for each" in refusal(
        steering_vector, DiffusionModel(pipe), RED, BLUE, layers=layers
    )


def test_a_layer_without_a_vector(model):
    found = steering_vector(model, POSITIVE, NEGATIVE, layers=2, progress=False)
    with pytest.raises(UnknownKeyError, match="there is no vector of 1: the result has 2"):
        steer(model, 1, found)


def test_a_folder_without_vectors(tmp_path):
    assert "there is no vectors.json in it" in refusal(SteeringVectors.load, tmp_path)
