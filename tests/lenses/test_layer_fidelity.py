"""Fidelity by layer, against the reader and plain diffusers on images made by hand."""

import json
import random
from dataclasses import replace

import pytest
import torch
from PIL import Image

from diffsight import DiffusionModel, diffusion_lens, layer_fidelity
from diffsight.errors import InputError
from diffsight.lenses.encoders.layer_drawing import draw_layers, read_layers
from diffsight.lenses.layer_fidelity import LayerFidelity, sample_prompts
from diffsight.pipelines.shapes.reader import read_scene
from diffsight.pipelines.shapes.scenes import HELD_OUT, NOUNS, Scene, Thing, render
from diffsight.pipelines.shapes.scoring import score
from helpers import close_image, same_image
from models import diffusion, text_encoders

RED, BLUE, GREEN = Thing("red", "circle"), Thing("blue", "square"), Thing("green", "circle")
BELOW = Scene((RED, BLUE), "below", "gray")
PARTS = ("first object", "second object", "colors", "relation", "background", "scene")
FEW_STEPS = {"num_inference_steps": 4, "guidance_scale": 3.0}


@pytest.fixture(scope="module")
def model():
    return DiffusionModel("diffsight/shapes-clip")


@pytest.fixture(scope="module")
def fidelity(model):
    return layer_fidelity(model, 4, layers=[11, "embedding"], seed=3, progress=False, **FEW_STEPS)


@torch.no_grad()
def draw_layer(pipe, scene, layer, seed):
    """Draw a scene's caption from a layer, with plain diffusers."""
    encoder = pipe.text_encoder
    ids = pipe.tokenizer([scene.caption()], padding="max_length", return_tensors="pt").input_ids
    if layer == 11:  # the last
        embeds = encoder(ids)[0]
    else:
        states = encoder(ids, output_hidden_states=True).hidden_states  # the embedding, layer 0, layer 1 …
        embeds = encoder.final_layer_norm(states[0 if layer == "embedding" else layer + 1])
    return pipe(prompt_embeds=embeds, generator=torch.Generator().manual_seed(seed), **FEW_STEPS).images[0]


def seen_in(scene):
    return read_scene(render(scene, random.Random(4)))


def of(*cells, layers=(0, 4, 8)):
    """Return a result from `cells`: for each prompt the scene that was asked for, and what is seen by layer."""
    scenes, seen = zip(*((asked, tuple(by_layer)) for asked, *by_layer in cells))
    return LayerFidelity("a model", "text_encoder", layers, scenes, seen, 0, {})


# Scores


@pytest.mark.parametrize(
    "shown, wrong",
    [
        (BELOW, ()),
        (Scene((BLUE, RED), "above", "gray"), ()),  # the same in other words
        (Scene((RED, BLUE), "below", "black"), ("background",)),
        (Scene((RED, BLUE), "above", "gray"), ("relation", "scene")),
        (Scene((RED, BLUE), "right of", "gray"), ("relation", "scene")),
        (Scene((GREEN, BLUE), "below", "gray"), ("first object", "colors", "scene")),
        (Scene((RED, Thing("blue", "ring")), "below", "gray"), ("second object", "relation", "scene")),
        (
            Scene((Thing("blue", "circle"), Thing("red", "square")), "below", "gray"),
            ("first object", "second object", "scene"),
        ),
        (Scene((RED,), None, "gray"), ("second object", "colors", "relation", "scene")),
    ],
    ids=str,
)
def test_each_part_is_scored(shown, wrong):
    found = score(BELOW, seen_in(shown))
    assert {name for name, right in found.items() if not right} == set(wrong)
    assert set(found) == set(PARTS)


def test_an_image_without_a_scene_is_wrong():
    assert score(BELOW, None) == dict.fromkeys(PARTS, False)
    assert set(score(Scene((RED,), None, "gray"), None)) == set(PARTS) - {"second object", "relation"}


def test_similar_objects_are_told_apart():
    asked = Scene((RED, GREEN), "left of", "gray")  # two circles
    assert all(score(asked, seen_in(asked)).values())
    swapped = score(asked, seen_in(Scene((GREEN, RED), "left of", "gray")))
    assert {name for name, right in swapped.items() if not right} == {"relation", "scene"}
    twice = score(Scene((RED, RED), "above", "gray"), Scene((RED,), None, "gray"))
    assert (twice["first object"], twice["second object"]) == (True, False)  # one thing is not two


def test_an_invented_noun_is_the_thing_that_it_names():
    noun = next(iter(NOUNS.values()))
    assert all(score(Scene((noun,), None, "gray"), seen_in(Scene((noun,), None, "gray"))).values())


# Results


def test_shares_of_prompts():
    one, swapped = Scene((RED,), None, "gray"), Scene((BLUE, RED), "below", "gray").canonical()
    right = BELOW.canonical()
    half = Scene((BLUE, GREEN), "above", "gray")
    result = of(
        (one, None, one, one), (BELOW, None, half, right), (BELOW, half, right, right), (BELOW, None, swapped, swapped)
    )
    found = {name: values.tolist() for name, values in result.shares.items()}
    assert list(found) == ["simple", "compound", "first object", "second object", "colors", "relation"]
    assert found["simple"] == [0, 1, 1]
    assert found["compound"] == pytest.approx([0, 1 / 3, 2 / 3])
    assert found["first object"] == pytest.approx([0, 2 / 3, 1])
    assert found["second object"] == pytest.approx([1 / 3, 1, 1])
    assert found["colors"] == pytest.approx([0, 2 / 3, 1])
    assert found["relation"] == pytest.approx([1 / 3, 2 / 3, 2 / 3])
    firsts = result.first_layers()
    assert (firsts["simple"], firsts["first object"], firsts["compound"]) == (4, 4, 8)
    assert result.first_layers(0.3)["second object"] == 0
    assert result.first_layers(1)["compound"] is None
    assert result.order == {"first object": 0, "second object": 2, "same layer": 1, "neither": 0}
    table = str(result)
    assert "1 simple and 3 compound prompts" in table
    assert "second object 2, same layer 1" in table
    assert [line.split() for line in table.splitlines()][3] == ["compound", "0", "33", "67", "layer", "8"]
    with pytest.raises(InputError, match="above 0 and up to 1"):
        result.first_layers(50)


def test_one_kind_of_prompt_has_only_its_own_shares():
    assert list(of((Scene((RED,), None, "gray"), None, None, None)).shares) == ["simple"]
    assert "simple" not in of((BELOW, None, None, None)).shares


def test_plots_stand_side_by_side():
    one = of((BELOW, None, BELOW.canonical(), BELOW.canonical()))
    deep = of((BELOW, *[None] * 4, BELOW.canonical()), layers=(0, 6, 12, 18, 24))
    left, right = one.plot(deep).axes
    assert left.get_title() != right.get_title()
    for axes, layers, shares in ((left, [0, 4, 8], [0, 1, 1]), (right, [0, 6, 12, 18, 24], [0, 0, 0, 0, 1])):
        lines = {line.get_label(): line for line in axes.lines}
        assert lines["first object"].get_xdata().tolist() == layers
        assert lines["first object"].get_ydata().tolist() == shares
        rings = {line.get_xdata()[0] for line in axes.lines if line.get_fillstyle() == "none"}
        assert rings == {layers[shares.index(1)]}
    assert one._repr_png_().startswith(b"\x89PNG")


def test_sampled_prompts_tell_every_word_apart():
    scenes = sample_prompts(64)
    assert [len(scene.things) for scene in scenes] == [1, 2] * 32
    for scene in scenes:
        assert len({thing.color for thing in scene.things}) == len({t.shape for t in scene.things}) == len(scene.things)
        assert not any((thing.color, thing.shape) in HELD_OUT or thing.noun for thing in scene.things)
    assert sample_prompts(64) == scenes != sample_prompts(64, seed=1)
    assert len({scene.relation for scene in scenes}) == 5


def test_layers_in_any_order():
    right, only_blue, only_red = BELOW.canonical(), Scene((BLUE,), None, "gray"), Scene((RED,), None, "gray")
    result = of((BELOW, right, only_red), (BELOW, only_blue, None), (BELOW, None, None), layers=(8, 2))
    assert result.order == {"first object": 1, "second object": 1, "same layer": 0, "neither": 1}
    assert result.first_layers(0.3) == {
        "compound": 8,
        "first object": 2,
        "second object": 8,
        "colors": 8,
        "relation": 8,
    }


# On the packaged pipeline


def test_images_are_those_of_plain_diffusers(model, fidelity):
    asked = sample_prompts(4)
    assert fidelity.scenes == asked
    assert (fidelity.layers, fidelity.encoder, fidelity.model) == (
        (11, "embedding"),
        "text_encoder",
        "diffsight/shapes-clip",
    )
    model.pipeline.set_progress_bar_config(disable=True)
    for column, layer in enumerate(fidelity.layers):
        for i, scene in enumerate(asked):
            image = draw_layer(model.pipeline, scene, layer, seed=3 + i)
            assert fidelity.seen[i][column] == read_scene(image)
            if len(scene.things) == 2:
                seen = fidelity.seen[i][column]
                is_right = seen is not None and replace(seen, background=scene.background) == scene.canonical()
                assert score(scene, seen)["scene"] == is_right


def test_save_records_scenes_and_what_was_seen(fidelity, tmp_path):
    paths = fidelity.save(tmp_path)
    record = json.loads((tmp_path / "fidelity.json").read_text())
    assert [path.name for path in paths] == ["fidelity.json", "page.html", "fidelity.png"]
    assert [one["prompt"] for one in record["prompts"]] == [scene.caption() for scene in fidelity.scenes]
    assert record["shares"]["compound"] == fidelity.shares["compound"].tolist()
    assert (record["first_layers"], record["order"]) == (fidelity.first_layers(), fidelity.order)
    assert (record["layers"], record["seed"]) == ([11, "embedding"], 3)
    Image.open(tmp_path / "fidelity.png").verify()


def test_any_encoder_of_a_pipeline():
    """A T5 with fewer layers and random weights is read as well, and everything is wrong."""
    result = layer_fidelity(
        DiffusionModel(diffusion.deepfloyd_if()),
        [BELOW],
        progress=False,
        num_inference_steps=1,
        guidance_scale=1.0,
    )
    assert result.layers == ("embedding", 0, 1, 2)
    assert torch.equal(result.shares["compound"], torch.zeros(4).double())


@pytest.mark.parametrize(
    "scenes, changes, message",
    [
        (0, {}, "a number of prompts, 1 or more"),
        (-3, {}, "a number of prompts, 1 or more"),
        (True, {}, "a number of prompts, 1 or more"),
        ("a red circle", {}, "or a list of Scenes"),
        (["a red circle"], {}, "a scene must be a Scene"),
        ([], {}, "the list is empty"),
        (2, {"encoder": "text_encoder_2"}, "it has text_encoder"),
        (2, {"layers": [12]}, "no layer 12"),
        ([Scene((RED,), None, "gray"), Scene((RED,) * 9, "above", "gray")], {}, "words would be dropped"),
    ],
    ids=str,
)
def test_bad_input_is_refused_before_images(model, scenes, changes, message):
    ran = []
    handle = model.pipeline.vae.decoder.register_forward_hook(lambda *_: ran.append(1))
    with pytest.raises(InputError, match=message):
        layer_fidelity(model, scenes, progress=False, **FEW_STEPS, **changes)
    handle.remove()
    assert not ran


def test_an_invalid_model():
    with pytest.raises(InputError, match="takes a DiffusionModel, not str"):
        layer_fidelity("diffsight/shapes-clip")


def test_several_prompts_share_a_call(model, fidelity):
    """The images are those of the diffusion lens, up to rounding."""
    rows, options = [], {"layers": [11, "embedding"], "progress": False, **FEW_STEPS}
    handle = model.pipeline.vae.decoder.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    try:
        for size, wanted in ((None, [8]), (5, [4, 4]), (1, [1] * 8)):
            rows.clear()
            result = layer_fidelity(model, 4, seed=3, batch_size=size, **options)
            assert (rows, result.seen) == (wanted, fidelity.seen)
    finally:
        handle.remove()
    readings = [
        read_layers(model, p, s, FEW_STEPS, layers=[3, 11]) for p, s in (("a red circle", 1), ("a blue square", 5))
    ]
    for size, alike in ((None, close_image), (3, close_image), (1, same_image)):
        for reading, images in zip(readings, draw_layers(readings, batch_size=size), strict=True):
            alone = diffusion_lens(
                model, reading.prompt, seed=reading.seed, layers=[3, 11], batch_size=1, progress=False, **FEW_STEPS
            )
            assert all(map(alike, images, alone.images))


def test_prompts_with_different_numbers_of_tokens_have_calls_of_their_own():
    """Qwen-Image pads to the longest prompt of a call."""
    model = DiffusionModel(text_encoders.built("qwen_image"))
    inputs, rows = text_encoders.TEXT_PIPELINES["qwen_image"].inputs(), []
    del inputs["prompt"]
    inputs["output_type"] = "pil"
    model.pipeline.vae.decoder.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    result = layer_fidelity(model, [BELOW, Scene((RED,), None, "gray")], layers=[0, 1], progress=False, **inputs)
    assert rows == [2, 2]
    assert len(result.seen) == 2
