"""One numbering of layers: layer i is the output of `layers[i]`, -1 the last, "embedding" the input of the first.

Each lens is compared with a run in which the layer is read, patched or put into the final norm by hand.
"""

import itertools

import numpy as np
import pytest
import torch

from diffsight import (
    DiffusionModel,
    VisionLanguageModel,
    collect_activations,
    compare_encoders,
    diffusion_lens,
    encoder_patching,
    image_token_lens,
    layer_fidelity,
    load_activations,
    logit_lens,
    patchscope_generate,
    patchscope_lens,
    steer,
)
from diffsight.errors import InputError
from diffsight.lenses.layers import choose_layers, find_layer, in_model_order, layer_file, layer_title, state_of
from diffsight.lenses.linear_map import LinearMap
from diffsight.lenses.patchscope import TargetPrompt
from diffsight.pipelines.shapes.reader import read_scene
from diffsight.pipelines.shapes.scenes import Scene, Thing
from helpers import close_image, same_image
from models import diffusion, language, vision_language

SOURCE, TARGET = "a red circle above a blue square", "a red square above a blue square"
CIRCLE = 3  # the token in which they differ
STEPS = {"num_inference_steps": 2}
COUNT = 3  # layers of the small text encoders
LAYERS = [("embedding", "embedding"), (0, 0), (1, 1), (-1, COUNT - 1)]  # as the user writes it, as results name it


@pytest.fixture(scope="module")
def pipe():
    return DiffusionModel(diffusion.stable_diffusion())


def point_of(layers, layer):
    """Return the layer and the name of its value."""
    return (layers[0], "input") if layer == "embedding" else (layers[layer], "output")


def value_of(layers, layer):
    return getattr(*point_of(layers, layer))


def draw_layer(model, layer, prompt=TARGET, seed=3, **arguments):
    """Return the image of a layer drawn by hand: the layer's value goes into the final norm."""
    with model.generate(prompt, seed=seed, **STEPS, **arguments) as run:
        encoder = run.cond.text_encoder
        encoder.ln_final.input = value_of(encoder.layers, layer)
    return run.images[0]


# Text encoders


@pytest.mark.parametrize(("asked", "layer"), LAYERS)
def test_diffusion_lens(pipe, asked, layer):
    result = diffusion_lens(pipe, TARGET, layers=asked, seed=3, progress=False, **STEPS)
    assert result.layers == (layer,)
    assert same_image(result.images[0], draw_layer(pipe, asked))


def test_diffusion_lens_without_layers(pipe):
    result = diffusion_lens(pipe, TARGET, seed=3, progress=False, **STEPS)
    assert result.layers == ("embedding", 0, 1, 2)
    for layer, image in zip(result.layers, result.images, strict=True):
        assert close_image(image, draw_layer(pipe, layer))
    plain = pipe.generate(TARGET, seed=3, **STEPS).images[0]
    assert close_image(result.images[-1], plain)
    one_by_one = diffusion_lens(pipe, TARGET, seed=3, progress=False, batch_size=1, **STEPS)
    assert same_image(one_by_one.images[-1], plain)


def test_the_last_layer_that_sdxl_uses():
    """The last but one of both encoders; the pooled vector of the second needs its last."""
    model = DiffusionModel(diffusion.stable_diffusion_xl())
    plain = model.generate(TARGET, seed=3, **STEPS).images[0]
    count = model.encoders["text_encoder"].count
    result = diffusion_lens(model, TARGET, encoder="text_encoder", seed=3, progress=False, **STEPS)
    assert result.layers == ("embedding", *range(count - 1))
    assert same_image(result.images[-1], plain)
    last = diffusion_lens(model, TARGET, encoder="text_encoder", layers=-2, seed=3, progress=False, **STEPS)
    assert last.layers == (count - 2,)
    with pytest.raises(InputError, match=f'layer -1 has no effect, .*: choose from "embedding" and 0 to {count - 2}'):
        diffusion_lens(model, TARGET, encoder="text_encoder", layers=-1, progress=False, **STEPS)


@pytest.mark.parametrize(("asked", "layer"), LAYERS)
def test_encoder_patching(pipe, asked, layer):
    given = {"words": "circle", "layers": asked, "seed": 3, "batch_size": 1, "progress": False}
    result = encoder_patching(pipe, SOURCE, TARGET, **given, **STEPS)
    assert (result.layers, result.source_layers) == ((layer,), (layer,))
    with pipe.generate(SOURCE, seed=3, **STEPS) as x, pipe.generate(TARGET, seed=3, **STEPS) as y:
        taken = value_of(x.cond.text_encoder.layers, asked)[:, CIRCLE].clone()
        value_of(y.cond.text_encoder.layers, asked)[:, CIRCLE] = taken
        x.stop()
    assert same_image(result.images[0][0], y.images[0])


@pytest.mark.parametrize(("asked", "layer"), LAYERS)
def test_linear_map(pipe, asked, layer):
    """A map from a layer to itself is exact, and one to another layer is that of least squares."""
    prompts = [f"a {c} {s} above a blue square" for c in ("red", "green") for s in ("circle", "square", "photo")]
    states = {}
    for prompt, which in itertools.product(prompts, (asked, 0)):
        with pipe.generate(prompt, seed=0, **STEPS) as run:
            value = value_of(run.cond.text_encoder.layers, which)
            states.setdefault(which, []).append(value[0, 1:8].double().clone())
            run.stop()
    mapping = LinearMap().fit(pipe, prompts, layers=[0], source_layers=[asked], progress=False, **STEPS)
    assert list(mapping.error) == [(layer, 0)]
    x, y = (torch.cat(states[which]) for which in (asked, 0))
    ones = torch.ones(len(x), 1)
    solution = np.linalg.lstsq(torch.cat([x, ones], 1).numpy(), y.numpy(), rcond=None)[0]
    wanted = torch.cat([x, ones], 1) @ torch.from_numpy(solution)
    assert mapping.error[layer, 0] == pytest.approx(float((wanted - y).norm() / (y - y.mean(0)).norm()), abs=1e-6)
    assert torch.allclose(mapping(x, asked, -COUNT), mapping(x, layer, 0))
    assert torch.allclose(mapping(x, asked, 0), wanted, atol=1e-4)


@pytest.mark.parametrize(("asked", "layer"), LAYERS)
def test_compare_encoders(pipe, asked, layer):
    prompts = [SOURCE, TARGET]
    result = compare_encoders([pipe, pipe], prompts, layers=asked, images=1, seed=3, progress=False, **STEPS)
    for encoded in result.values():
        assert encoded.layers == encoded.lens[0].layers == (layer,)
        assert same_image(encoded.lens[0].images[0], draw_layer(pipe, asked, SOURCE))
        for i, prompt in enumerate(prompts):
            with pipe.generate(prompt, seed=0, **STEPS) as run:
                wanted = value_of(run.cond.text_encoder.layers, asked)[0, 1:8].mean(0)
                run.stop()
            assert torch.allclose(encoded.vectors[0, i], wanted, atol=1e-5)


@pytest.mark.parametrize(("asked", "layer"), [("embedding", "embedding"), (5, 5), (-1, 11)])
def test_layer_fidelity(asked, layer):
    model = DiffusionModel("diffsight/shapes-clip")
    model.set_progress_bar_config(disable=True)
    scene = Scene((Thing("red", "circle"), Thing("blue", "square")), "below", "gray")
    result = layer_fidelity(model, [scene], layers=[asked], seed=1, progress=False, num_inference_steps=6)
    assert result.layers == (layer,)
    with model.generate(scene.caption(), seed=1, num_inference_steps=6) as run:
        encoder = run.cond.text_encoder
        encoder.ln_final.input = value_of(encoder.layers, asked)
    assert result.seen[0] == (read_scene(run.images[0]),)
    assert all(first in (layer, None) for first in result.first_layers().values())


# Language models

PROMPTS = language.PROMPTS
TARGET_PROMPT = TargetPrompt("cat -> cat ?")
WRITER_LAYERS = [("embedding", "embedding"), (0, 0), (2, 2), (-1, 3)]


@torch.no_grad()
def hidden_by_hand(model, prompt, layer):
    with model.trace(prompt) as run:
        value = value_of(run.layers, layer)
        hidden = (value[0] if isinstance(value, tuple) else value).clone()
        run.stop()
    return hidden


@pytest.mark.parametrize(("asked", "layer"), WRITER_LAYERS)
@torch.no_grad()
def test_logit_lens(net, model, asked, layer):
    result = logit_lens(model, PROMPTS[0], layers=asked, keep_logits=True)
    assert (result.layers, result.num_layers) == ((layer,), 4)
    wanted = net.lm_head(net.transformer.ln_f(hidden_by_hand(model, PROMPTS[0], asked)))
    assert torch.allclose(result.logits[0, 0], wanted[0], atol=1e-6)


def test_logit_lens_without_layers(model):
    assert logit_lens(model, PROMPTS[0]).layers == (0, 1, 2, 3)
    assert logit_lens(model, PROMPTS[0], layers=[-1, "embedding", 0]).layers == ("embedding", 0, 3)


@pytest.mark.parametrize(("asked", "layer"), WRITER_LAYERS)
@torch.no_grad()
def test_patchscope(model, asked, layer):
    hidden = hidden_by_hand(model, PROMPTS[0], asked)[0, -1]

    def put(run):
        value = value_of(run.layers, asked)
        (value[0] if isinstance(value, tuple) else value)[0, -1] = hidden

    with model.trace(TARGET_PROMPT.text) as run:
        put(run)
    given = {"target": TARGET_PROMPT, "layers": asked}
    result = patchscope_lens(model, PROMPTS[0], keep_logits=True, **given)
    assert result.layers == (layer,)
    assert torch.allclose(result.logits[0, 0, 0], run.result.logits[0, -1], atol=1e-6)
    into = patchscope_lens(model, PROMPTS[0], target=TARGET_PROMPT, layers=[asked], target_layer=asked)
    assert torch.equal(into.ids, result.ids)
    with model.generate(TARGET_PROMPT.text, max_new_tokens=4) as run:
        put(run)
    texts = patchscope_generate(model, PROMPTS[0], max_new_tokens=4, **given)
    assert (texts.layers, texts.texts) == ((layer,), ((run.text,),))
    assert f"{layer}  " in str(texts)


@pytest.mark.parametrize(("asked", "layer"), WRITER_LAYERS)
def test_collect_activations(model, tmp_path, asked, layer):
    found = collect_activations(model, PROMPTS, layers=asked)
    assert (found.layers, found.num_layers) == ((layer,), 4)
    for i, prompt in enumerate(PROMPTS):
        assert torch.allclose(found[asked][i], hidden_by_hand(model, prompt, asked)[0, -1], atol=1e-5)
    assert torch.equal(found[asked], found[layer])
    folder = collect_activations(model, PROMPTS, layers=["embedding", 0, 2, -1], folder=tmp_path / "states")
    stored = load_activations(folder, layers=asked)
    assert stored.layers == (layer,)
    assert torch.equal(stored.values, found.values)
    with pytest.raises(InputError, match="does not have layer 1: it has embedding, 0, 2, 3"):
        load_activations(folder)[1]


def test_other_points_have_no_embedding(model):
    with pytest.raises(InputError, match=r'"embedding" is the input of the first layer, which has no mlps_output'):
        collect_activations(model, PROMPTS, layers="embedding", of="mlps_output")


@pytest.mark.parametrize(("asked", "layer"), WRITER_LAYERS)
@pytest.mark.parametrize("positions", [None, [0, -1]])
@torch.no_grad()
def test_steer(model, asked, layer, positions):
    vector = torch.randn(32, generator=torch.Generator().manual_seed(0))
    with model.trace(PROMPTS[0]) as run:
        value = value_of(run.layers, asked)
        (value[0] if isinstance(value, tuple) else value)[:, slice(None) if positions is None else positions] += (
            vector * 2
        )
    steered = steer(model, asked, vector, factor=2, positions=positions)
    assert torch.allclose(steered.trace(PROMPTS[0]).result.logits, run.result.logits, atol=1e-6)
    assert not torch.allclose(run.result.logits, model.trace(PROMPTS[0]).result.logits, atol=1e-3)


def test_steering_the_embedding_of_several_prompts(model):
    """At positions of each prompt, whatever the padding."""
    vector = torch.randn(32, generator=torch.Generator().manual_seed(0))
    steered = steer(model, "embedding", vector, positions=0)
    with torch.no_grad():
        for row, prompt in zip(steered.trace(PROMPTS).result.logits, PROMPTS):
            alone = steered.trace(prompt).result.logits[0]
            assert torch.allclose(row[-len(alone) :], alone, atol=1e-5)


@pytest.mark.parametrize(("asked", "layer"), [("embedding", "embedding"), (0, 0), (-1, 2)])
@torch.no_grad()
def test_image_token_lens(tmp_path, asked, layer):
    from PIL import Image

    model, image = (
        VisionLanguageModel(vision_language.MODELS["llava"]()),
        Image.linear_gradient("L").convert("RGB"),
    )
    result = image_token_lens(model, "a red circle", image, layers=[asked, 1], tokens=[7])
    assert layer in result.layers
    with model.trace("a red circle", images=image) as run:
        value = run.layers_input[0] if asked == "embedding" else run.layers_output[asked]
        said = model.project_on_vocab(value[0, run.image_grids[0][0]]).softmax(-1)
    place = result.layers.index(layer)
    assert torch.allclose(result.probabilities(0)[place], said[..., 7], atol=1e-6)
    assert result.words(asked) == result.words(layer)
    assert result.plot(asked).get_suptitle().endswith(f"({layer_title(layer)})")
    titles = [axes.get_title() for axes in result.maps([asked]).axes]
    assert titles[0] == layer_title(layer)
    assert f"{layer_file(layer)}.png" in {path.name for path in result.save(tmp_path)}
    with pytest.raises(InputError, match="does not have layer"):
        result.words(-1 if layer == 0 else "embedding" if layer == 2 else 0)


# Choosing


def test_layers_are_chosen_in_the_order_given():
    assert choose_layers(None, 3) == ("embedding", 0, 1, 2)
    assert choose_layers([-1, "embedding", 0, 2], 3) == (2, "embedding", 0)
    assert choose_layers(["embedding", slice(0, 4, 2), -1], 12) == ("embedding", 0, 2, 11)
    assert choose_layers(slice(-2, None), 12, used=11) == (10,)
    assert in_model_order([2, "embedding", 0]) == ("embedding", 0, 2)
    assert [state_of(layer) for layer in ("embedding", 0, 11)] == [0, 1, 12]
    assert [layer_file(layer) for layer in ("embedding", 4)] == ["embedding", "layer_04"]
    assert choose_layers(torch.tensor([2, 0]), 3) == (2, 0)
    assert choose_layers(None, 3, used=0) == ("embedding",)


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        (3, 'there is no layer 3: choose from "embedding" and 0 to 2'),
        (-4, "there is no layer -4"),
        ("last", "there is no layer 'last'"),
        (True, "there is no layer True"),
        ([0, 1.0], "there is no layer 1.0"),
        ([], "no layers are chosen"),
        (slice(0, 9), "the slice goes past the last layer, up to 9"),
        (slice(0, 3, 0), "step of a slice"),
    ],
)
def test_layers_that_do_not_exist(layers, words):
    with pytest.raises(InputError, match=words):
        choose_layers(layers, 3)


def test_layers_of_a_result():
    assert find_layer("embedding", ("embedding", 0, 2), 3) == 0
    assert find_layer(-1, ("embedding", 0, 2), 3) == 2
    for layer in (1, -2, True, "last", None):
        with pytest.raises(InputError, match="does not have layer"):
            find_layer(layer, ("embedding", 0, 2), 3)
