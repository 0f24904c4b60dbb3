"""Patching between prompts and encoders, against the bare pipelines with PyTorch hooks."""

import contextlib
import json
import warnings

import numpy as np
import pytest
import torch

from diffsight import DiffusionModel, encoder_patching
from diffsight.errors import InputError
from diffsight.lenses.encoders.drawing import LensWarning
from diffsight.lenses.linear_map import LinearMap
from helpers import largest_difference, not_called, refusal
from models import diffusion, text_encoders
from models.text_encoders import SEED, TEXT_PIPELINES, denoiser_of, draw_first

SOURCE, TARGET = "a red circle above a blue square", "a red square above a blue square"
KINDS = [
    ("stable_diffusion", "text_encoder"),
    ("stable_diffusion_xl", "text_encoder"),
    ("stable_diffusion_xl", "text_encoder_2"),
    ("stable_diffusion_3", "text_encoder_3"),
    ("flux", "text_encoder"),
    ("flux", "text_encoder_2"),
    ("sana", "text_encoder"),
    ("qwen_image", "text_encoder"),
]
LAYERS = {
    "CLIPTextModel": "encoder.layers",
    "CLIPTextModelWithProjection": "text_model.encoder.layers",
    "T5EncoderModel": "encoder.block",
    "Gemma2Model": "layers",
    "Qwen2_5_VLForConditionalGeneration": "model.language_model.layers",
}


def layers_of(encoder):
    return encoder.get_submodule(LAYERS[type(encoder).__name__])


@contextlib.contextmanager
def at_layer(encoder, layer, function):
    """Call `function(state, call)` with the output of a layer, or the input of the first for "embedding".

    What it returns, if anything, replaces the state."""
    calls = iter(range(1000))
    if layer != "embedding":

        def after(module, args, output):
            state = output[0] if isinstance(output, tuple) else output
            changed = function(state, next(calls))
            if changed is None:
                return None
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        handle = layers_of(encoder)[layer].register_forward_hook(after, prepend=True)
    else:

        def before(module, args, kwargs):
            state = args[0] if args else kwargs["hidden_states"]
            changed = function(state, next(calls))
            if changed is None:
                return None
            return ((changed, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": changed})

        handle = layers_of(encoder)[0].register_forward_pre_hook(before, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def settings(name):
    arguments = TEXT_PIPELINES[name].inputs()
    del arguments["prompt"]
    return arguments


class Seen(Exception):
    """What a hook was put there for was seen: the rest of the run is not needed."""


def state_of(name, pipe, encoder, layer, prompt):
    """Return the hidden state of the prompt, (1, tokens, features)."""
    states = []

    def keep(state, call):
        states.append(state.clone())
        raise Seen

    with at_layer(getattr(pipe, encoder), layer, keep), contextlib.suppress(Seen):
        draw_first(name, pipe, prompt=prompt)
    return states[0]


def draw_patched(name, pipe, encoder, layer, tokens, state):
    """Draw the target with `state`, (tokens, features), in place of `tokens`."""

    def put(hidden, call):
        if call:
            return None
        hidden = hidden.clone()
        hidden[:, tokens.start : tokens.stop] = state
        return hidden

    with at_layer(getattr(pipe, encoder), layer, put):
        return draw_first(name, pipe, prompt=TARGET)


def place_of(pipe, name, encoder, word, prompt):
    """Return the tokens of a word among those that the encoder reads."""
    seen = []

    def keep(module, args, kwargs):
        seen.append(args[0] if args else kwargs["input_ids"])
        raise Seen

    handle = getattr(pipe, encoder).register_forward_pre_hook(keep, with_kwargs=True)
    with contextlib.suppress(Seen):
        draw_first(name, pipe, prompt=prompt)
    handle.remove()
    tokenizer = getattr(pipe, encoder.replace("text_encoder", "tokenizer"))
    ids = seen[0][0].tolist()
    before = tokenizer(prompt[: prompt.index(word)].rstrip(), add_special_tokens=False).input_ids
    through = tokenizer(prompt[: prompt.index(word) + len(word)], add_special_tokens=False).input_ids
    at = next(i for i in range(len(ids)) if ids[i : i + len(through)] == through)
    return range(at + len(before), at + len(through))


def patch(name, pipe, source=SOURCE, target=TARGET, **given):
    return encoder_patching(DiffusionModel(pipe), source, target, seed=SEED, progress=False, **given, **settings(name))


# Images


@pytest.mark.parametrize(("name", "encoder"), KINDS)
def test_every_layer_as_with_hooks_by_hand(name, encoder):
    pipe = text_encoders.built(name)
    tokens = place_of(pipe, name, encoder, "circle", SOURCE)
    with warnings.catch_warnings():
        warnings.simplefilter("error", LensWarning)
        result = patch(name, pipe, words="circle", encoder=encoder, source_layers=None)
        alone = patch(name, pipe, words="circle", encoder=encoder, layers=0, batch_size=1)
    assert result.source_tokens == result.tokens == (tokens,)
    assert result.layers == ("embedding", *range(len(result.layers) - 1))
    for layer, (image,) in zip(result.layers, result.images, strict=True):
        state = state_of(name, pipe, encoder, layer, SOURCE)[0, tokens.start : tokens.stop]
        wanted = draw_patched(name, pipe, encoder, layer, tokens, state)
        assert largest_difference(image, wanted) <= 2
        if layer == 0:
            assert largest_difference(alone.images[0][0], wanted) == 0
    plain = draw_first(name, pipe, prompt=TARGET)
    assert largest_difference(alone.target_image, plain) == 0
    assert largest_difference(alone.source_image, draw_first(name, pipe, prompt=SOURCE)) == 0
    assert largest_difference(result.images[0][0], plain) > 0


def test_words_and_layers_make_a_table_of_images():
    """With other words, into other words, from other layers."""
    pipe, name = text_encoders.built("stable_diffusion"), "stable_diffusion"
    given = {
        "words": ["red circle", "above"],
        "into": ["blue square", 4],
        "layers": [0, -1],
        "source_layers": [1, "embedding"],
    }
    result = patch(name, pipe, **given, batch_size=3)
    assert result.words == ("red circle → blue square", "above")
    assert (result.layers, result.source_layers) == ((0, 2), (1, "embedding"))
    assert result.source_tokens == (range(2, 4), range(4, 5))
    assert result.tokens == (range(6, 8), range(4, 5))
    for layer, origin, images in zip(result.layers, result.source_layers, result.images, strict=True):
        state = state_of(name, pipe, "text_encoder", origin, SOURCE)[0]
        for taken, tokens, image in zip(result.source_tokens, result.tokens, images, strict=True):
            wanted = draw_patched(name, pipe, "text_encoder", layer, tokens, state[taken.start : taken.stop])
            assert largest_difference(image, wanted) <= 2


def test_every_token_is_a_column():
    result = patch("stable_diffusion", text_encoders.built("stable_diffusion"), layers=["embedding"])
    assert result.words == ("a", "red", "circle → square", "above", "a", "blue", "square")
    assert result.tokens == tuple(range(i, i + 1) for i in range(1, 8))
    plain = result.target_image
    changed = [largest_difference(image, plain) > 2 for image in result.images[0]]
    assert changed == [False, False, True, False, False, False, False]  # the embeddings of the others are the same


def test_spans_of_different_length():
    pipe, name, target = (
        text_encoders.built("stable_diffusion"),
        "stable_diffusion",
        "a red photo above a blue square",
    )
    source = "a red hex above a blue square"  # three tokens
    message = lens_refusal(name, source=source, target=target, words="hex")
    assert "'hex' has 3 tokens in the source, but replaces 1 in the target, 'photo'" in message
    assert 'align="last" or "mean"' in message
    state = state_of(name, pipe, "text_encoder", 0, source)[0, 3:6]
    for align, wanted in (("last", state[-1:]), ("mean", state.mean(0, keepdim=True))):
        result = patch(name, pipe, source, TARGET, words="hex", align=align, layers=0, batch_size=1)
        assert (
            largest_difference(result.images[0][0], draw_patched(name, pipe, "text_encoder", 0, range(3, 4), wanted))
            == 0
        )


def test_the_negative_prompt_is_not_patched():
    pipe = text_encoders.built("stable_diffusion")
    arguments = settings("stable_diffusion") | {"negative_prompt": TARGET}
    model = DiffusionModel(pipe)
    given = {"words": "circle", "layers": [1], "seed": SEED, "batch_size": 1, "progress": False}
    result = encoder_patching(model, SOURCE, TARGET, **given, **arguments)
    state = state_of("stable_diffusion", pipe, "text_encoder", 1, SOURCE)[0, 3]

    def put(hidden, call):
        if call == 0:  # the second call reads the negative prompt
            hidden[:, 3] = state

    with at_layer(pipe.text_encoder, 1, put):
        wanted = pipe(prompt=TARGET, **arguments, generator=text_encoders.generator(SEED))[0][0]
    assert largest_difference(result.images[0][0], wanted) == 0


def test_one_encoder_alone():
    """FLUX's T5 is patched, and its CLIP reads an empty prompt."""
    pipe, name = text_encoders.built("flux"), "flux"
    given = {"words": "circle", "encoder": "text_encoder_2", "layers": [1]}
    result = patch(name, pipe, **given, isolate=True, batch_size=1)
    tokens = result.tokens[0]
    state = state_of(name, pipe, "text_encoder_2", 1, SOURCE)[0, tokens.start : tokens.stop]
    ids = pipe.tokenizer("", padding="max_length", max_length=77, return_tensors="pt").input_ids
    blank = pipe.text_encoder.register_forward_pre_hook(lambda module, args: (ids, *args[1:]))
    try:
        assert (
            largest_difference(result.images[0][0], draw_patched(name, pipe, "text_encoder_2", 1, tokens, state)) == 0
        )
        assert largest_difference(result.target_image, draw_first(name, pipe, prompt=TARGET)) == 0
        assert largest_difference(result.source_image, draw_first(name, pipe, prompt=SOURCE)) == 0
    finally:
        blank.remove()
    assert largest_difference(result.images[0][0], patch(name, pipe, **given).images[0][0]) > 2


# Between encoders


def with_other_text_encoder(name="stable_diffusion"):
    """Return the same pipeline with other weights in its text encoder, like another fine-tuned model."""
    pipe = TEXT_PIPELINES[name].build()
    pipe.text_encoder = diffusion.clip_encoder(pipe.tokenizer, seed=9)
    return pipe


def test_two_fine_tunes_as_two_runs_in_lockstep():
    a, b = DiffusionModel(with_other_text_encoder()), DiffusionModel(text_encoders.built("stable_diffusion"))
    arguments = settings("stable_diffusion")
    given = {"words": "circle", "seed": SEED, "batch_size": 1, "progress": False}
    result = encoder_patching(b, SOURCE, TARGET, source_model=a, **given, **arguments)
    for layer, (image,) in zip(result.layers[1:], result.images[1:], strict=True):
        with a.generate(SOURCE, seed=SEED, **arguments) as x, b.generate(TARGET, seed=SEED, **arguments) as y:
            taken = x.cond.text_encoder.layers[layer].output[:, 3].clone()
            y.cond.text_encoder.layers[layer].output[:, 3] = taken
            x.stop()
        assert largest_difference(image, y.images[0]) == 0
    assert largest_difference(result.source_image, draw_first("stable_diffusion", a.pipeline, prompt=SOURCE)) == 0


def same_width():
    """Return an SDXL pipeline whose text encoders both have 32 features."""
    pipe = TEXT_PIPELINES["stable_diffusion_xl"].build()
    pipe.text_encoder = diffusion.clip_encoder(pipe.tokenizer, width=32, seed=6)
    sizes = {"cross_attention_dim": 64, "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 80}
    kinds = {"transformer_layers_per_block": (1, 2), "addition_embed_type": "text_time", "use_linear_projection": True}
    pipe.unet = diffusion.unet(**sizes, **kinds, seed=2)
    return pipe


def test_one_encoder_into_the_other_of_the_same_width():
    pipe = same_width()
    given = {"words": "circle", "encoder": "text_encoder", "source_encoder": "text_encoder_2"}
    result = patch("stable_diffusion_xl", pipe, **given, layers=[0, 1], source_layers=1, batch_size=1)
    state = state_of("stable_diffusion_xl", pipe, "text_encoder_2", 1, SOURCE)[0, 3]
    for layer, (image,) in zip((0, 1), result.images, strict=True):
        wanted = draw_patched("stable_diffusion_xl", pipe, "text_encoder", layer, range(3, 4), state)
        assert largest_difference(image, wanted) == 0


PROMPTS = [
    f"{a} {c} {shape} {where} {a} {d} {other}"
    for a, c, d in (("a", "red", "blue"), ("the", "green", "red"), ("a", "blue", "green"))
    for shape, other in (("circle", "square"), ("square", "photo"))
    for where in ("above", "below")
]


def fitted(pipe, **given):
    encoders = {"encoder": "text_encoder", "source_encoder": "text_encoder_2"}
    return LinearMap().fit(
        DiffusionModel(pipe), PROMPTS, **{**encoders, **given}, progress=False, **settings("stable_diffusion_xl")
    )


def test_a_linear_map_between_encoders_of_different_width():
    """Compared with NumPy's least squares on the states that hooks see."""
    pipe, name = text_encoders.built("stable_diffusion_xl"), "stable_diffusion_xl"
    mapping = fitted(pipe, layers=[1], source_layers=[-3])
    x = np.concatenate([state_of(name, pipe, "text_encoder_2", 0, p)[0, 1:8].double() for p in PROMPTS])
    y = np.concatenate([state_of(name, pipe, "text_encoder", 1, p)[0, 1:8].double() for p in PROMPTS])
    ones = np.ones((len(x), 1))
    solution = np.linalg.lstsq(np.concatenate([x, ones], 1), y, rcond=None)[0]
    wanted = np.linalg.norm(np.concatenate([x, ones], 1) @ solution - y) / np.linalg.norm(y - y.mean(0))
    assert mapping.error.keys() == {(0, 1)}
    assert mapping.error[0, 1] == pytest.approx(wanted, rel=1e-6)
    assert 0 < mapping.error[0, 1] < mapping.error_unseen[0, 1]
    assert f"error {mapping.error[0, 1]:.3f}" in repr(mapping)

    given = {"words": "circle", "encoder": "text_encoder", "source_encoder": "text_encoder_2", "mapping": mapping}
    result = patch(name, pipe, **given, layers=1, source_layers=0, batch_size=1)
    state = mapping(state_of(name, pipe, "text_encoder_2", 0, SOURCE)[0, 3:4], 0, 1)
    assert np.allclose(
        state, np.append(state_of(name, pipe, "text_encoder_2", 0, SOURCE)[0, 3], 1) @ solution, atol=1e-5
    )
    assert largest_difference(result.images[0][0], draw_patched(name, pipe, "text_encoder", 1, range(3, 4), state)) == 0
    assert result.map_error == mapping.error


def test_maps_between_tokenizers_that_cut_words_differently():
    """T5 and CLIP, word by word."""
    pipe = text_encoders.built("stable_diffusion_3")
    arguments = settings("stable_diffusion_3")
    given = {"encoder": "text_encoder_3", "source_encoder": "text_encoder_2", "layers": [0]}
    mapping = LinearMap().fit(DiffusionModel(pipe), PROMPTS, **given, progress=False, **arguments)
    result = patch("stable_diffusion_3", pipe, source=SOURCE, target=SOURCE, words="circle", mapping=mapping, **given)
    assert (result.source_tokens, result.tokens) == ((range(3, 4),), (range(2, 3),))


# What cannot be patched


def lens_refusal(name, source=SOURCE, target=TARGET, **given):
    """Return the message of an invalid call of the lens, and check that the denoiser has not run."""
    pipe = TEXT_PIPELINES[name].build()
    with not_called(denoiser_of(pipe)):
        return refusal(patch, name, pipe, source, target, **given)


LONG = "a red circle " * 26


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"words": "circel"}, "'circel' does not occur in the prompt 'a red circle above a blue square'"),
        ({"words": "circle", "into": "circle"}, "'circle' does not occur in the prompt 'a red square above"),
        ({"words": "a"}, "'a' occurs 2 times in the prompt 'a red circle above a blue square'"),
        ({"words": "circle", "into": ["red", "blue"]}, "into has 2 items for 1 words"),
        ({"into": "red"}, "`into` says what `words` replace, so pass `words` as well"),
        ({"words": []}, "words is empty"),
        ({"words": [1.5]}, "not 1.5"),
        ({"words": 77}, "there is no token 77: 'a red circle above a blue square' has the tokens 0 to 76"),
        ({"words": range(3, 3)}, "there are no tokens range(3, 3)"),
        ({"target": "a red square"}, "the prompts have 7 and 3 tokens"),
        ({"target": "a red square", "words": "circle"}, "the prompts have 7 and 3 words"),
        ({"layers": 3}, 'there is no layer 3: choose from "embedding" and 0 to 2'),
        ({"layers": [1, 2], "source_layers": [1]}, "source_layers has 1 items for 2 layers"),
        ({"source_layers": 9}, "in the source's text_encoder, there is no layer 9"),
        ({"encoder": "text_encoder_2"}, "no text encoder 'text_encoder_2'"),
        ({"source_encoder": "text_encoder_2"}, "no text encoder 'text_encoder_2'"),
        ({"align": "first"}, "not 'first'"),
        ({"source": ""}, "empty"),
        ({"source": [SOURCE]}, "one prompt, a string, not list"),
        ({"source": LONG}, "too long"),
        ({"target": LONG}, "too long"),
        ({"mapping": LinearMap(), "words": "circle"}, "never fitted"),
        ({"mapping": "text_encoder", "words": "circle"}, "mapping must be a LinearMap or None, not str"),
        ({"batch_size": 0}, "batch_size"),
    ],
    ids=str,
)
def test_invalid_input(given, message):
    assert message in lens_refusal("stable_diffusion", **given)


def test_a_prompt_that_one_encoder_cuts():
    pipe = TEXT_PIPELINES["stable_diffusion_3"].build()
    pipe.tokenizer_3.model_max_length = 512
    arguments = settings("stable_diffusion_3") | {"max_sequence_length": 256}
    with pytest.raises(InputError, match=r"too long for text_encoder, which reads 77 tokens: .*: 'a red circle'"):
        encoder_patching(DiffusionModel(pipe), LONG, TARGET, words=3, encoder="text_encoder", **arguments)


def test_encoders_of_different_width_need_a_map():
    given = {"words": "circle", "encoder": "text_encoder", "source_encoder": "text_encoder_2"}
    assert "text_encoder_2 has 32 features and text_encoder 16" in lens_refusal("stable_diffusion_xl", **given)
    mapping = fitted(text_encoders.built("stable_diffusion_xl"), layers=[0])
    message = lens_refusal("stable_diffusion_xl", **given, mapping=mapping, layers=1)
    assert "fitted for the layers 0 → 0, not 1 → 1" in message
    given |= {"encoder": "text_encoder_2", "source_encoder": "text_encoder", "mapping": mapping, "layers": 0}
    xl = "StableDiffusionXLPipeline"
    message = f"from {xl}, text_encoder_2 to {xl}, text_encoder, not from {xl}, text_encoder to"
    assert message in lens_refusal("stable_diffusion_xl", **given)


def test_a_map_between_encoders_of_other_models(tmp_path):
    """Text encoders of different models can have the same name and width."""
    folder = tmp_path / "fine-tune"
    with_other_text_encoder().save_pretrained(folder)
    other = DiffusionModel(folder)
    model, arguments = DiffusionModel(text_encoders.built("stable_diffusion")), settings("stable_diffusion")
    mapping = LinearMap().fit(model, PROMPTS, source_model=other, layers=[1], progress=False, **arguments)
    given = {"words": "circle", "layers": [1], "mapping": mapping, "progress": False, **arguments}
    with pytest.raises(InputError, match=r"fitted from .*fine-tune, text_encoder to StableDiffusionPipeline, text_enc"):
        encoder_patching(model, SOURCE, TARGET, **given)
    assert encoder_patching(model, SOURCE, TARGET, source_model=other, **given).map_error == mapping.error


def test_a_map_that_was_never_fitted():
    mapping = LinearMap()
    assert "not fitted" in repr(mapping)
    for use in (lambda: mapping.error, lambda: mapping(torch.zeros(2, 4), 1, 1)):
        with pytest.raises(InputError, match="never fitted"):
            use()


def test_a_pipeline_without_a_text_encoder():
    with pytest.raises(InputError, match="needs a text encoder, but DDPMPipeline has none"):
        encoder_patching(DiffusionModel(diffusion.ddpm()), SOURCE, TARGET)


# The result


def test_the_result_says_how_it_was_made(tmp_path):
    result = patch(
        "stable_diffusion",
        text_encoders.built("stable_diffusion"),
        words=["red", "circle"],
        layers=["embedding", 1],
    )
    names = {"grid.png", "source.png", "target.png", "lens.json", "page.html", "thumbnail.jpg"}
    names |= {f"{layer}_{word}.png" for layer in ("embedding", "layer_01") for word in ("01", "02")}
    assert {path.name for path in result.save(tmp_path)} == names
    record = json.loads((tmp_path / "lens.json").read_text(encoding="utf-8"))
    assert (record["source"], record["target"], record["seed"]) == (SOURCE, TARGET, SEED)
    assert (record["layers"], record["words"]) == (["embedding", 1], ["red", "circle → square"])
    assert record["source_tokens"] == [[2], [3]]
    grid = np.asarray(result.grid())
    assert result._repr_png_().startswith(b"\x89PNG")
    image = np.asarray(result.images[1][1].resize((128, 128), 0))
    windows = np.lib.stride_tricks.sliding_window_view(grid[..., 0], (128, 128))
    corners = np.argwhere(windows[:, :, 0, 0] == image[0, 0, 0])
    assert any(np.array_equal(grid[y : y + 128, x : x + 128], image) for y, x in corners)
    with pytest.raises(AttributeError):
        result.seed = 8


def test_a_word_on_the_packaged_pipeline():
    """At the embedding the prompts differ in "circle" only; after the first layer its neighbours know, too."""
    model = DiffusionModel("diffsight/shapes-clip")
    given = {"words": "circle", "layers": ["embedding", 11], "seed": 0, "progress": False, "num_inference_steps": 10}
    result = encoder_patching(model, f"{SOURCE} on a gray background", f"{TARGET} on a gray background", **given)
    assert largest_difference(result.source_image, result.target_image) > 100
    assert largest_difference(result.images[0][0], result.source_image) <= 2
    assert largest_difference(result.images[1][0], result.target_image) < largest_difference(
        result.source_image, result.target_image
    )


def test_the_image_of_the_source_is_a_row_of_the_same_call():
    rows, model = [], DiffusionModel("diffsight/shapes-clip")
    model.pipeline.vae.decoder.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    settings = {"words": "circle", "layers": [0, 3], "num_inference_steps": 2, "progress": False}
    encoder_patching(model, "a red circle", "a blue circle", **settings)
    assert rows == [4]
    rows.clear()
    encoder_patching(model, "a red circle", "a blue circle", batch_size=3, **settings)
    assert rows == [3, 1]
