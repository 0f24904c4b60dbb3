"""Scenes of coloured shapes, the reader that turns images back into them, and the pipeline trained on them."""

import itertools
import random
from collections import Counter

import diffusers
import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from diffsight import DiffusionModel
from diffsight.pipelines.packaged import FOLDERS
from diffsight.pipelines.shapes.evaluate import draw_scenes, shares
from diffsight.pipelines.shapes.flux_defaults import CALL
from diffsight.pipelines.shapes.reader import read_scene
from diffsight.pipelines.shapes.scenes import (
    BACKGROUNDS,
    COLORS,
    HELD_OUT,
    NOUNS,
    RELATIONS,
    SHAPES,
    WORDS,
    Scene,
    Thing,
    render,
    sample_scene,
)

RED, BLUE = Thing("red", "circle"), Thing("blue", "square")


def scenes(count, seed=0, **kind):
    rng = random.Random(seed)
    return [sample_scene(rng, **kind) for _ in range(count)]


def middle(image, color):
    """Return the mean row and column of the pixels of a colour."""
    pixels = np.asarray(image).astype(int)
    return np.argwhere(np.abs(pixels - COLORS[color]).max(-1) < 8).mean(0)


# Scenes


@pytest.mark.parametrize(
    "scene, caption",
    [
        (Scene((RED,), None, "black"), "a red circle on a black background"),
        (Scene((RED, BLUE), "below", "gray"), "a red circle below a blue square on a gray background"),
        (Scene((RED, BLUE), "left of", "gray"), "a red circle left of a blue square on a gray background"),
        (
            Scene((Thing("red", "circle", "palu"), BLUE), "above", "gray"),
            "a palu above a blue square on a gray background",
        ),
    ],
)
def test_captions(scene, caption):
    assert scene.caption() == caption
    assert scene.caption(background=False) == caption.split(" on a ")[0]


@pytest.mark.parametrize("relation, opposite", [("below", "above"), ("right of", "left of")])
def test_two_spellings_of_one_scene(relation, opposite):
    assert Scene((RED, BLUE), relation, "gray").canonical() == Scene((BLUE, RED), opposite, "gray")
    assert Scene((BLUE, RED), opposite, "gray").canonical() == Scene((BLUE, RED), opposite, "gray")
    assert Scene((RED,), None, "gray").canonical() == Scene((RED,), None, "gray")


@pytest.mark.parametrize("relation, opposite", [("below", "above"), ("right of", "left of")])
def test_a_scene_is_told_from_either_place(relation, opposite):
    first, second = Scene((BLUE, RED), opposite, "gray"), Scene((RED, BLUE), relation, "gray")
    assert first.told_from(0) == second.told_from(0) == first
    assert first.told_from(1) == second.told_from(1) == second
    assert Scene((RED,), None, "gray").told_from(1) == Scene((RED,), None, "gray")
    assert render(first, random.Random(0)).tobytes() == render(second, random.Random(0)).tobytes()


def test_the_canonical_spelling_has_no_nouns():
    noun, thing = next(iter(NOUNS.items()))
    assert thing.noun == noun
    canonical = Scene((thing, BLUE), "above", "gray").canonical()
    assert canonical.things[0] == Thing(thing.color, thing.shape)


@pytest.mark.parametrize(
    "relation, axis, first", [("above", 0, "red"), ("below", 0, "blue"), ("left of", 1, "red"), ("right of", 1, "blue")]
)
def test_the_image_shows_the_relation(relation, axis, first):
    for seed in range(10):
        image = render(Scene((RED, BLUE), relation, "gray"), random.Random(seed))
        other = "blue" if first == "red" else "red"
        assert middle(image, first)[axis] + 10 < middle(image, other)[axis]


def test_an_image_is_64_by_64_of_the_colours_named():
    image = render(Scene((RED,), None, "gray"), random.Random(0))
    assert (image.size, image.mode) == ((64, 64), "RGB")
    colors = [color for _, color in sorted(image.getcolors(), reverse=True)]
    assert colors[:2] == [BACKGROUNDS["gray"], COLORS["red"]]


def test_a_seed_makes_the_same_scenes_and_images_again():
    assert scenes(50, seed=5, noun_rate=0.3) == scenes(50, seed=5, noun_rate=0.3)
    assert scenes(50, seed=5) != scenes(50, seed=6)
    one, other = (render(Scene((RED, BLUE), "above", "gray"), random.Random(seed)) for seed in (1, 2))
    again = render(Scene((RED, BLUE), "above", "gray"), random.Random(1))
    assert one.tobytes() == again.tobytes()
    assert one.tobytes() != other.tobytes()


def test_training_never_shows_the_held_out_pairs():
    seen = {(thing.color, thing.shape) for scene in scenes(3000, noun_rate=0.35) for thing in scene.things}
    assert seen == set(itertools.product(COLORS, SHAPES)) - set(HELD_OUT)
    assert not {(thing.color, thing.shape) for thing in NOUNS.values()} & set(HELD_OUT)


def test_held_out_scenes_show_one_first():
    for scene in scenes(200, held_out=True):
        assert (scene.things[0].color, scene.things[0].shape) in HELD_OUT
        assert not any((thing.color, thing.shape) in HELD_OUT for thing in scene.things[1:])
    seen = {(thing.color, thing.shape) for scene in scenes(1000, held_out=None) for thing in scene.things}
    assert seen == set(itertools.product(COLORS, SHAPES))


def test_scenes_are_of_all_kinds():
    drawn = scenes(1000)
    assert {scene.relation for scene in drawn} == {None, *RELATIONS}
    assert {scene.background for scene in drawn} == set(BACKGROUNDS)
    assert 0.65 < sum(len(scene.things) == 2 for scene in drawn) / len(drawn) < 0.75
    for scene in drawn:
        assert (scene.relation is None) == (len(scene.things) == 1)
        assert len({(thing.color, thing.shape) for thing in scene.things}) == len(scene.things)
    assert all(len(scene.things) == 2 for scene in scenes(100, two=1.0))


def test_invented_nouns():
    assert len(NOUNS) == 48
    assert not set(NOUNS) & {*COLORS, *SHAPES, *BACKGROUNDS}
    named = Counter(scene.things[0].noun for scene in scenes(5000, two=0.0, noun_rate=1.0))
    assert set(named) == set(NOUNS)
    common, second, *_, rare = (named[noun] for noun in NOUNS)
    assert common > 1.5 * second > 10 * rare  # by Zipf's law 2 and 24 times as often


def test_the_words_are_those_of_the_captions():
    used = {word for scene in scenes(5000, noun_rate=0.5) for word in scene.caption().split()}
    assert used == set(WORDS)


# The reader


def test_the_reader_is_right_on_500_scenes():
    rng = random.Random(7)
    asked = [sample_scene(rng, held_out=None) for _ in range(500)]
    right = sum(read_scene(render(scene, rng)) == scene.canonical() for scene in asked)
    assert right >= 0.99 * len(asked)


@pytest.mark.parametrize("background", BACKGROUNDS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("color", COLORS)
def test_the_reader_knows_each_thing(color, shape, background):
    scene = Scene((Thing(color, shape),), None, background)
    assert read_scene(render(scene, random.Random(1))) == scene


def test_the_reader_reads_other_sizes():
    scene = Scene((RED, BLUE), "left of", "black")
    image = render(scene, random.Random(3))
    assert read_scene(image.resize((128, 128), Image.NEAREST)) == scene


def test_the_reader_sees_nothing_in_an_empty_image_or_a_crowd():
    assert read_scene(Image.new("RGB", (64, 64))) is None
    crowd = Image.new("RGB", (64, 64))
    for corner in ((4, 4), (4, 40), (40, 4)):
        crowd.paste(COLORS["red"], (*corner, corner[0] + 16, corner[1] + 16))
    assert read_scene(crowd) is None


def test_shares_count_each_part():
    asked = [Scene((RED, BLUE), "below", "gray")] * 5
    shown = [
        Scene((RED, BLUE), "below", "gray"),
        Scene((RED, BLUE), "above", "gray"),
        Scene((Thing("green", "circle"), BLUE), "below", "gray"),
        Scene((RED, BLUE), "below", "black"),
        Scene((RED,), None, "gray"),
    ]
    right = shares(asked, [render(scene, random.Random(2)) for scene in shown])
    assert (right["scene"], right["relation"], right["background"]) == (2 / 5, 3 / 5, 4 / 5)
    assert (right["colors"], right["first object"], right["second object"]) == (3 / 5, 4 / 5, 4 / 5)


# The packaged pipelines


ENCODERS = {"diffsight/shapes-clip": transformers.CLIPTextModel, "diffsight/shapes-t5": transformers.T5EncoderModel}
FLUX = "diffsight/shapes-flux"
SETTINGS = {"num_inference_steps": 20, "guidance_scale": 3.0}


@pytest.fixture(scope="module", params=ENCODERS)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def pipe(name):
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(FOLDERS[name])
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def asked():
    """Return 12 captions of two things each, with every relation three times."""
    rng, wanted = random.Random(11), []
    while len(wanted) < 12:
        scene = sample_scene(rng, two=1.0)
        if sum(scene.relation == other.relation for other in wanted) < 3:
            wanted.append(scene)
    return wanted


def faithful(asked, images):
    """Return the share of images whose colours, shapes and relation match the captions."""
    right = 0
    for scene, image in zip(asked, images, strict=True):
        want, seen = scene.canonical(), read_scene(image)
        right += seen is not None and (seen.things, seen.relation) == (want.things, want.relation)
    return right / len(asked)


def test_the_packaged_pipelines_are_small():
    assert FOLDERS.keys() == {*ENCODERS, FLUX}
    for folder in FOLDERS.values():
        assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) <= 16e6


def test_a_packaged_pipeline_is_an_ordinary_one_in_single_precision(name, pipe):
    assert type(pipe) is diffusers.StableDiffusionPipeline
    assert type(pipe.text_encoder) is ENCODERS[name]
    assert type(pipe.unet) is diffusers.UNet2DConditionModel
    assert type(pipe.vae) is diffusers.AutoencoderKL
    for part in (pipe.text_encoder, pipe.unet, pipe.vae):
        assert {parameter.dtype for parameter in part.parameters()} == {torch.float32}
    assert pipe.text_encoder.config.num_hidden_layers == 12
    assert (pipe.vae.config.sample_size, pipe.unet.config.sample_size) == (64, 8)


def test_a_packaged_tokenizer_has_one_token_a_word(pipe):
    longest = max((scene.caption() for scene in scenes(500)), key=lambda caption: len(caption.split()))
    for text in (" ".join(WORDS), longest):
        ids = pipe.tokenizer(text, add_special_tokens=False).input_ids
        assert len(ids) == len(text.split())
        assert pipe.tokenizer.unk_token_id not in ids
        assert pipe.tokenizer.decode(ids) == text
    assert len(pipe.tokenizer(longest).input_ids) <= pipe.tokenizer.model_max_length


def test_a_packaged_pipeline_draws_what_is_asked_for(pipe, asked):
    generators = [torch.Generator().manual_seed(i) for i in range(len(asked))]
    captions = [scene.caption() for scene in asked]
    images = pipe(captions, generator=generators, **SETTINGS).images
    assert {scene.relation for scene in asked} == set(RELATIONS)
    seen = [read_scene(image) for image in images]
    placed = [r is not None and r.relation == a.canonical().relation for a, r in zip(asked, seen)]
    grounds = [r is not None and r.background == a.background for a, r in zip(asked, seen)]
    assert sum(placed) >= 0.9 * len(asked) and sum(grounds) >= 0.9 * len(asked)
    assert faithful(asked, images) >= 0.9


def test_the_first_layer_of_its_text_encoder_does_not_know_everything_yet(pipe, asked):
    captions = [scene.caption() for scene in asked]
    ids = pipe.tokenizer(captions, padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        hidden = pipe.text_encoder(ids, output_hidden_states=True).hidden_states[1]
        norm = getattr(pipe.text_encoder, "final_layer_norm", None) or pipe.text_encoder.encoder.final_layer_norm
        encoded = norm(hidden)
    generators = [torch.Generator().manual_seed(i) for i in range(len(asked))]
    images = pipe(prompt_embeds=encoded, generator=generators, **SETTINGS).images
    assert faithful(asked, images) <= 0.6


@torch.no_grad()
@pytest.mark.parametrize("layer", ["embedding", 0, 4, -2, 11])
def test_layers_of_the_model_card_are_numbered_as_layers_i(pipe, asked, layer):
    """The model card draws from layer *i*: the output of `layers[i]`, here by a hook."""
    encoder, scene = pipe.text_encoder, asked[0]
    stack = encoder.encoder
    modules = list(stack.layers if hasattr(stack, "layers") else stack.block)
    norm = getattr(encoder, "final_layer_norm", None) or stack.final_layer_norm
    seen = []
    if layer == "embedding":
        hook = modules[0].register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        )
    else:
        hook = modules[layer].register_forward_hook(lambda module, args, output: seen.append(output))
    with hook:
        encoder(pipe.tokenizer([scene.caption()], padding="max_length", return_tensors="pt").input_ids)
    hidden = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
    call = {"num_inference_steps": 2, "output_type": "pt"}
    want = pipe(prompt_embeds=norm(hidden), generator=torch.Generator().manual_seed(0), **call).images
    assert torch.equal(draw_scenes(pipe, [scene], layer, **call)[0], want[0])


def test_a_packaged_model_draws_the_bits_of_the_bare_pipeline(name, pipe):
    prompt = "a red circle below a blue square on a gray background"
    call = {"num_inference_steps": 4, "output_type": "pt"}
    want = pipe(prompt, generator=torch.Generator().manual_seed(17), **call).images
    model = DiffusionModel(name)
    model.set_progress_bar_config(disable=True)
    assert torch.equal(model.generate(prompt, seed=17, **call).images, want)
    with model.generate(prompt, seed=17, **call) as run:
        steps = [step.index for step in run.steps]
    assert steps == [0, 1, 2, 3]
    assert torch.equal(run.images, want)


# The packaged FluxPipeline


@pytest.fixture(scope="module")
def flux():
    pipe = diffusers.FluxPipeline.from_pretrained(FOLDERS[FLUX])
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_the_packaged_flux_is_an_ordinary_one_in_single_precision(flux):
    assert type(flux) is diffusers.FluxPipeline
    assert type(flux.text_encoder) is transformers.CLIPTextModel
    assert type(flux.text_encoder_2) is transformers.T5EncoderModel
    assert type(flux.transformer) is diffusers.FluxTransformer2DModel
    assert type(flux.vae) is diffusers.AutoencoderKL
    assert type(flux.scheduler) is diffusers.FlowMatchEulerDiscreteScheduler
    for part in (flux.text_encoder, flux.text_encoder_2, flux.transformer, flux.vae):
        assert {parameter.dtype for parameter in part.parameters()} == {torch.float32}
    assert len(flux.transformer.transformer_blocks) >= 3
    assert len(flux.transformer.single_transformer_blocks) >= 3
    assert flux.vae_scale_factor == 4


def test_the_packaged_flux_pools_clip_at_the_end_token(flux):
    ids = flux.tokenizer(
        ["a red circle", "a white ring above a zuva"], padding="max_length", return_tensors="pt"
    ).input_ids
    with torch.no_grad():
        hidden, pooled = flux.text_encoder(ids)[:2]
    ends = ids.eq(flux.tokenizer.eos_token_id).int().argmax(-1)
    assert ends.tolist() == [4, 7]
    assert torch.equal(pooled, hidden[[0, 1], ends])


def test_the_packaged_flux_draws_what_is_asked_for(flux, asked):
    generators = [torch.Generator().manual_seed(i) for i in range(len(asked))]
    captions = [scene.caption() for scene in asked]
    guidance = {"negative_prompt": [""] * len(asked), "true_cfg_scale": 2.0}
    images = flux(captions, generator=generators, num_inference_steps=20, **guidance, **CALL).images
    assert faithful(asked, images) >= 0.9


def test_a_call_of_the_packaged_flux_needs_no_size_and_no_length(flux):
    prompt = "a red circle below a blue square on a gray background"
    call = {"num_inference_steps": 4, "output_type": "pt"}
    want = flux(prompt, generator=torch.Generator().manual_seed(17), **call, **CALL).images
    model = DiffusionModel(FLUX)
    model.set_progress_bar_config(disable=True)
    assert torch.equal(model.generate(prompt, seed=17, **call).images, want)
    with model.generate(prompt, seed=17, **call) as run:
        tokens = model.text_encoder_2.input.shape[-1]
        steps = [step.index for step in run.steps]
    assert (tokens, steps) == (16, [0, 1, 2, 3])
    assert torch.equal(run.images, want)


def test_the_packaged_flux_can_be_saved_and_loaded_by_diffusers(tmp_path):
    DiffusionModel(FLUX).pipeline.save_pretrained(tmp_path)
    again = diffusers.FluxPipeline.from_pretrained(tmp_path)
    image = again("a red circle", num_inference_steps=1, **CALL).images[0]
    assert image.size == (64, 64)
