"""The diffusion lens on every family of text encoder, against the bare pipeline with PyTorch hooks."""

import contextlib
import json
import warnings
import wave

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

from diffsight import DiffusionModel, diffusion_lens
from diffsight.errors import InputError
from diffsight.lenses.encoders.drawing import LensWarning
from helpers import first, largest_difference, not_called, refusal
from models import diffusion, text_encoders
from models.text_encoders import PROMPT, SEED, TEXT_PIPELINES, denoiser_of, draw_first

ENCODERS = [
    ("stable_diffusion_2", "text_encoder"),
    ("clip_skip", "text_encoder"),
    ("stable_diffusion_xl", "text_encoder"),
    ("stable_diffusion_xl", "text_encoder_2"),
    ("stable_diffusion_3", "text_encoder"),
    ("stable_diffusion_3", "text_encoder_2"),
    ("stable_diffusion_3", "text_encoder_3"),
    ("flux", "text_encoder"),
    ("flux", "text_encoder_2"),
    ("deepfloyd_if", "text_encoder"),
    ("pixart_sigma", "text_encoder"),
    ("sana", "text_encoder"),
    ("qwen_image", "text_encoder"),
    ("kandinsky3", "text_encoder"),
    ("kandinsky5", "text_encoder"),
    ("kandinsky5", "text_encoder_2"),
    ("flux2", "text_encoder"),
    ("z_image", "text_encoder"),
    ("lumina", "text_encoder"),
    ("wan", "text_encoder"),
    ("cogvideox", "text_encoder"),
    ("stable_audio", "text_encoder"),
    ("audioldm2", "text_encoder"),
    ("audioldm2", "text_encoder_2"),
]


def parts(pipe, name):
    """Return the layers and the final norm of an encoder."""
    encoder = getattr(pipe, name)
    lists = {"CLIPTextModel": ("encoder.layers", "final_layer_norm")}
    lists |= {"CLIPTextModelWithProjection": ("text_model.encoder.layers", "text_model.final_layer_norm")}
    lists |= dict.fromkeys(("T5EncoderModel", "UMT5EncoderModel"), ("encoder.block", "encoder.final_layer_norm"))
    lists["Qwen3ForCausalLM"] = ("model.layers", "model.norm")
    lists["Gemma2Model"] = ("layers", "norm")
    lists["Qwen2_5_VLForConditionalGeneration"] = ("model.language_model.layers", "model.language_model.norm")
    lists["ClapModel"] = ("text_model.encoder.layer", "")
    return [encoder.get_submodule(path) for path in lists[type(encoder).__name__]]


def hook(module, function, before=False):
    """Call `function(value, n)` at the n-th call. What it returns, if anything, replaces the value."""
    count = iter(range(1000))
    if before:
        return module.register_forward_pre_hook(
            lambda m, args, kwargs: function(args[0] if args else kwargs["hidden_states"], next(count)),
            with_kwargs=True,
        )
    return module.register_forward_hook(lambda m, args, output: function(output, next(count)), prepend=True)


@contextlib.contextmanager
def leaving(layers, layer):
    """Make all layers after `layer` return the output of `layer` in the first call of the encoder."""
    taken = []

    def take(value, call):
        if call == 0:
            taken.append(first(value))

    def put(output, call):
        if call == 0:
            return (taken[0], *output[1:]) if isinstance(output, tuple) else taken[0]
        return None

    is_embedding = layer == "embedding"
    handles = [hook(layers[0], take, before=True)] if is_embedding else [hook(layers[layer], take)]
    handles += [hook(later, put) for later in layers[0 if is_embedding else layer + 1 :]]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def lens(name, pipe, **settings):
    arguments = TEXT_PIPELINES[name].inputs()
    arguments.pop("prompt")
    prompt = settings.pop("prompt", PROMPT)
    return diffusion_lens(DiffusionModel(pipe), prompt, seed=SEED, progress=False, **settings, **arguments)


def close(a, b):
    return largest_difference(a, b) <= (2 if np.asarray(a).dtype == np.uint8 else 1e-4)


# Every encoder


@pytest.mark.parametrize(("name", "encoder"), ENCODERS)
def test_every_layer_as_with_hooks_by_hand(name, encoder):
    pipe = text_encoders.built(name)
    layers, _ = parts(pipe, encoder)
    with warnings.catch_warnings():
        warnings.simplefilter("error", LensWarning)
        together = lens(name, pipe, encoder=encoder)
        alone = lens(name, pipe, encoder=encoder, layers=0, batch_size=1)
    assert together.layers == ("embedding", *range(len(together.layers) - 1))
    assert len(together.layers) in (len(layers), len(layers) + 1)
    plain = draw_first(name, pipe)
    for layer, output in zip(together.layers, together.outputs, strict=True):
        with leaving(layers, layer):
            wanted = draw_first(name, pipe)
        assert close(output, wanted)
        if layer == 0:
            assert largest_difference(alone.outputs[0], wanted) == 0
            assert largest_difference(wanted, plain) > 0  # the layer makes a difference
    assert close(together.outputs[-1], plain)


@pytest.mark.parametrize("name", ["stable_diffusion", "stable_diffusion_xl", "stable_diffusion_3", "qwen_image"])
def test_the_encoders_run_once_for_all_layers(name):
    pipe = TEXT_PIPELINES[name].build()
    counts = {}
    for path in (path for path in pipe.components if path.startswith("text_encoder")):
        layer = parts(pipe, path)[0][0].self_attn if path != "text_encoder_3" else parts(pipe, path)[0][0].layer[0]
        layer.register_forward_hook(lambda module, args, output, path=path: counts.setdefault(path, []).append(1))
    draw_first(name, pipe)
    plain = {path: len(calls) for path, calls in counts.items()}
    counts.clear()
    lens(name, pipe, batch_size=2)
    assert {path: len(calls) for path, calls in counts.items()} == plain  # the prompt, and the negative prompt


@pytest.mark.parametrize(("size", "rows"), [(None, [4]), (4, [4]), (3, [3, 1]), (2, [2, 2]), (1, [1, 1, 1, 1])])
def test_batch_size_bounds_the_rows_of_a_call(size, rows):
    pipe = TEXT_PIPELINES["stable_diffusion"].build()
    seen = []
    pipe.vae.decoder.register_forward_hook(lambda module, args, output: seen.append(len(output)))
    lens("stable_diffusion", pipe, batch_size=size)
    assert seen == rows


@pytest.mark.parametrize("given", ["a photo of the blue", ["a photo of the blue"]], ids=["text", "list"])
def test_a_negative_prompt_keeps_its_effect(given):
    pipe = text_encoders.built("stable_diffusion_xl")
    arguments = TEXT_PIPELINES["stable_diffusion_xl"].inputs(negative_prompt=given)
    del arguments["prompt"]
    with warnings.catch_warnings():
        warnings.simplefilter("error", LensWarning)
        result = diffusion_lens(
            DiffusionModel(pipe), PROMPT, seed=SEED, layers=["embedding", 0], progress=False, **arguments
        )
    for layer, image in zip(result.layers, result.images, strict=True):
        with leaving(parts(pipe, "text_encoder")[0], layer):
            assert close(image, draw_first("stable_diffusion_xl", pipe, negative_prompt="a photo of the blue"))
    assert not close(result.images[0], lens("stable_diffusion_xl", pipe, layers="embedding").images[0])


def test_a_negative_prompt_that_is_the_prompt():
    pipe = text_encoders.built("stable_diffusion")
    arguments = TEXT_PIPELINES["stable_diffusion"].inputs(negative_prompt=PROMPT)
    del arguments["prompt"]
    result = diffusion_lens(DiffusionModel(pipe), PROMPT, seed=SEED, layers=[0, -1], progress=False, **arguments)
    with leaving(parts(pipe, "text_encoder")[0], 0):
        assert close(result.images[0], draw_first("stable_diffusion", pipe, negative_prompt=PROMPT))
    assert close(result.images[1], draw_first("stable_diffusion", pipe, negative_prompt=PROMPT))


# The tutorial's settings


def token_ids(tokenizer, text, **settings):
    settings = {"padding": "max_length", "max_length": 77, "truncation": True, "return_tensors": "pt"} | settings
    return tokenizer([text], **settings).input_ids


@contextlib.contextmanager
def empty_prompt_for(pipe, name, **settings):
    """Pass the tokens of an empty prompt to the first call of an encoder."""
    ids = token_ids(getattr(pipe, name.replace("text_encoder", "tokenizer")), "", **settings)
    count = iter(range(1000))

    def put(module, args, kwargs):
        return ((ids, *args[1:]), kwargs) if next(count) == 0 else None

    handle = getattr(pipe, name).register_forward_pre_hook(put, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize("norm", [False, True])
def test_the_second_encoder_of_sdxl_alone(norm):
    """As in the tutorial: the layer replaces the last but one, and the pooled vector stays."""
    pipe = text_encoders.built("stable_diffusion_xl")
    layers, final = parts(pipe, "text_encoder_2")
    result = lens(
        "stable_diffusion_xl", pipe, encoder="text_encoder_2", isolate=True, norm=norm, pooled="full", layers=[0, 1]
    )
    for layer, image in zip(result.layers, result.images, strict=True):
        taken = []

        def take(output, call, taken=taken):
            taken.append(final(output) if norm else output)

        handles = [
            hook(layers[layer], take),
            hook(pipe.text_encoder_2, lambda output, call, taken=taken: put_state(output, call, taken[0])),
        ]
        with empty_prompt_for(pipe, "text_encoder"), torch.no_grad():
            wanted = draw_first("stable_diffusion_xl", pipe)
        for handle in handles:
            handle.remove()
        assert close(image, wanted)
        assert not close(image, lens("stable_diffusion_xl", pipe, encoder="text_encoder_2", layers=layer).images[0])


def put_state(output, call, state):
    """Replace the last but one hidden state in what an encoder returns for the prompt."""
    if call == 0:
        states = output.hidden_states
        output.hidden_states = (*states[:-2], state, states[-1])
    return output if call == 0 else None


def test_t5_of_flux_alone():
    pipe = text_encoders.built("flux")
    result = lens("flux", pipe, encoder="text_encoder_2", isolate=True)
    for layer, image in zip(result.layers, result.images, strict=True):
        with empty_prompt_for(pipe, "text_encoder"), leaving(parts(pipe, "text_encoder_2")[0], layer):
            assert close(image, draw_first("flux", pipe))
    assert not close(result.images[-1], draw_first("flux", pipe))


def test_isolating_the_only_encoder_changes_nothing():
    pipe = text_encoders.built("stable_diffusion")
    both = [lens("stable_diffusion", pipe, layers=0, isolate=isolate).images[0] for isolate in (False, True)]
    assert largest_difference(*both) == 0


def test_isolating_leaves_the_templates_of_others():
    """Kandinsky 5's language model reads the prompt in a template, and only the template if CLIP is isolated."""
    pipe = TEXT_PIPELINES["kandinsky5"].build()
    texts = []
    pipe.text_encoder.register_forward_pre_hook(
        lambda module, args, kwargs: texts.append(pipe.tokenizer.decode(kwargs["input_ids"][0])), with_kwargs=True
    )
    lens("kandinsky5", pipe, encoder="text_encoder_2", layers="embedding", isolate=True)
    blank = [text for text in texts if "<|im_start|>" in text and PROMPT not in text]
    assert any(PROMPT in text for text in texts)
    assert pipe.prompt_template.format("") in [text.replace("<|endoftext|>", "") for text in blank]


def test_a_tokenizer_that_two_encoders_share():
    pipe = TEXT_PIPELINES["stable_diffusion_xl"].build()
    pipe.tokenizer_2 = pipe.tokenizer
    with pytest.raises(InputError, match=r"isolate: text_encoder_2 .* share tokenizer"):
        lens("stable_diffusion_xl", pipe, encoder="text_encoder", isolate=True)


@pytest.mark.parametrize("name", ["stable_diffusion_xl", "lumina"])
def test_norm_where_the_pipeline_takes_states_without_it(name):
    pipe = text_encoders.built(name)
    layers, final = parts(pipe, "text_encoder")
    result = lens(name, pipe, norm=True, layers=[0, 1])
    for layer, image in zip(result.layers, result.images, strict=True):
        normed = hook(pipe.text_encoder, lambda output, call: put_state(output, call, final(output.hidden_states[-2])))
        with leaving(layers, layer), torch.no_grad():
            wanted = draw_first(name, pipe)
        normed.remove()
        assert close(image, wanted)
    assert not close(result.images[1], lens(name, pipe, layers=1).images[0])


def test_norm_where_the_pipeline_applies_it():
    pipe = text_encoders.built("stable_diffusion")
    both = [lens("stable_diffusion", pipe, layers=0, norm=norm).images[0] for norm in (False, True)]
    assert largest_difference(*both) == 0


def test_the_pooled_vector_of_the_layer_or_of_all():
    pipe = text_encoders.built("flux")
    of_layer, full = (
        lens("flux", pipe, encoder="text_encoder", layers=0, pooled=p).images[0] for p in ("layer", "full")
    )
    with leaving(parts(pipe, "text_encoder")[0], 0):
        assert largest_difference(of_layer, draw_first("flux", pipe)) == 0
    assert largest_difference(full, draw_first("flux", pipe)) == 0  # CLIP's layers only affect its pooled vector
    assert not close(of_layer, full)


# Edits


def test_edits_of_the_model_are_kept():
    pipe = text_encoders.built("stable_diffusion")

    @DiffusionModel(pipe).edit
    def edited(run):
        run.text_encoder.layers[0].output[:] *= 0.5
        for _ in run.steps:
            run.unet.mid_block.output[:] *= 0.5

    arguments = TEXT_PIPELINES["stable_diffusion"].inputs()
    del arguments["prompt"]
    result = diffusion_lens(edited, PROMPT, seed=SEED, progress=False, **arguments)
    layers, _ = parts(pipe, "text_encoder")
    for layer, image in zip(result.layers[1:], result.images[1:], strict=True):
        with contextlib.ExitStack() as stack:
            stack.enter_context(leaving(layers, layer))
            halved = hook(layers[0], lambda output, call: output * 0.5 if call == 0 else None)  # before it is taken
            halved_again = hook(pipe.unet.mid_block, lambda output, call: output * 0.5)
            stack.callback(halved.remove)
            stack.callback(halved_again.remove)
            assert close(image, draw_first("stable_diffusion", pipe))


# Where a pipeline cannot draw them together


class OneByOne(diffusion.diffusers.StableDiffusionPipeline):
    """Accepts a single prompt only."""

    def check_inputs(self, prompt, *args, **kwargs):
        if not isinstance(prompt, str):
            raise ValueError("one prompt at a time")
        super().check_inputs(prompt, *args, **kwargs)


class Loops(diffusion.diffusers.StableDiffusionPipeline):
    """Encodes one prompt after the other."""

    def encode_prompt(self, prompt, *args, **kwargs):
        if isinstance(prompt, str):
            return super().encode_prompt(prompt, *args, **kwargs)
        made = [super(Loops, self).encode_prompt(text, *args, **kwargs) for text in prompt]
        return tuple(torch.cat(embeds) for embeds in zip(*made, strict=True))


@pytest.mark.parametrize("cls", [OneByOne, Loops])
def test_a_pipeline_that_takes_one_prompt_at_a_time(cls):
    whole = TEXT_PIPELINES["stable_diffusion"].build()
    pipe = cls(**whole.components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    arguments = TEXT_PIPELINES["stable_diffusion"].inputs()
    del arguments["prompt"]
    with pytest.warns(LensWarning, match=f"{cls.__name__} cannot draw 4 layers in one call") as seen:
        result = diffusion_lens(DiffusionModel(pipe), PROMPT, seed=SEED, progress=False, **arguments)
    assert [warning.filename for warning in seen if warning.category is LensWarning] == [__file__]
    wanted = lens("stable_diffusion", whole, batch_size=1)
    assert [largest_difference(a, b) for a, b in zip(result.images, wanted.images, strict=True)] == [0] * 4


def test_an_error_of_the_pipeline_is_its_own():
    pipe = TEXT_PIPELINES["stable_diffusion"].build()
    pipe.vae.decode = None
    with pytest.raises(TypeError), pytest.warns(LensWarning):
        lens("stable_diffusion", pipe)


# What cannot be drawn


def lens_refusal(name, **settings):
    """Return the message of an invalid call of the lens, and check that the denoiser has not run."""
    pipe = TEXT_PIPELINES[name].build()
    with not_called(denoiser_of(pipe)):
        return refusal(lens, name, pipe, **settings)


def test_an_encoder_that_does_not_exist():
    message = lens_refusal("flux", encoder="text_encoder_3")
    assert "no text encoder 'text_encoder_3'" in message
    assert "it has text_encoder, text_encoder_2" in message


def test_layers_that_the_pipeline_does_not_use():
    message = lens_refusal("lumina", layers=-1)
    assert "layer -1 has no effect" in message
    assert 'choose from "embedding" and 0 to 1' in message


def test_a_prompt_that_this_encoder_cuts():
    """CLIP reads 77 tokens; T5 would read more."""
    prompt = "a red circle " * 26
    pipe = TEXT_PIPELINES["stable_diffusion_3"].build()
    pipe.tokenizer_3.model_max_length = 512
    arguments = TEXT_PIPELINES["stable_diffusion_3"].inputs(max_sequence_length=256)
    del arguments["prompt"]
    model = DiffusionModel(pipe)
    with pytest.raises(InputError, match=r"too long for text_encoder, which reads 77 tokens: .*: 'a red circle'"):
        diffusion_lens(model, prompt, encoder="text_encoder", progress=False, **arguments)
    kept = diffusion_lens(model, prompt, encoder="text_encoder_3", layers="embedding", progress=False, **arguments)
    assert kept.layers == ("embedding",)


@pytest.mark.parametrize("name", ["audioldm2", "stable_diffusion", "sana"])
def test_a_prompt_that_ends_as_it_begins_is_not_truncated(name):
    result = lens(name, text_encoders.built(name), prompt="a red circle a red", layers=0)
    assert result.layers == (0,)


def test_an_encoder_without_a_final_norm():
    message = lens_refusal("audioldm2", encoder="text_encoder", norm=True)
    assert "text_encoder has no final norm" in message


@pytest.mark.parametrize("size", [0, -1, 2.0, True, "2"], ids=repr)
def test_an_invalid_batch_size(size):
    assert "batch_size" in lens_refusal("stable_diffusion", batch_size=size)


def test_a_pooled_vector_of_another_kind():
    assert '"layer" or "full", not \'empty\'' in lens_refusal("flux", pooled="empty")


def test_a_pipeline_that_makes_no_images():
    with pytest.raises(InputError, match="KandinskyV22PriorPipeline returns image_embeds: there is no image"):
        lens("kandinsky_prior", text_encoders.built("kandinsky_prior"))


def test_an_encoder_whose_use_is_not_found():
    pipe = TEXT_PIPELINES["stable_diffusion"].build()
    encode = pipe.encode_prompt
    pipe.encode_prompt = lambda *args, **kwargs: tuple(2 * embeds for embeds in encode(*args, **kwargs))
    with pytest.raises(
        InputError, match="StableDiffusionPipeline does not seem to use any output of text_encoder unchanged"
    ):
        lens("stable_diffusion", pipe)


# The result


def test_the_result_says_how_it_was_made(tmp_path):
    settings = {
        "encoder": "text_encoder_2",
        "isolate": True,
        "norm": True,
        "pooled": "full",
        "layers": ["embedding", 1],
    }
    result = lens("stable_diffusion_xl", text_encoders.built("stable_diffusion_xl"), **settings)
    assert {name: getattr(result, name) for name in settings} == settings | {"layers": ("embedding", 1)}
    result.save(tmp_path)
    record = json.loads((tmp_path / "lens.json").read_text(encoding="utf-8"))
    assert {name: record[name] for name in settings} == settings


def test_a_video_is_shown_by_its_middle_frame_and_saved_whole(tmp_path):
    result = lens("cogvideox", text_encoders.built("cogvideox"), layers=[0, -1])
    assert [len(frames) for frames in result.outputs] == [9, 9]
    assert all(
        largest_difference(image, frames[4]) == 0 for image, frames in zip(result.images, result.outputs, strict=True)
    )
    names = {path.name for path in result.save(tmp_path)}
    assert names == {
        "grid.png",
        "thumbnail.jpg",
        "layer_00.png",
        "layer_00.gif",
        "layer_02.png",
        "layer_02.gif",
        "lens.json",
        "page.html",
    }
    with Image.open(tmp_path / "layer_02.gif") as film:
        assert len(list(ImageSequence.Iterator(film))) == 9


def test_a_video_of_numbers_becomes_images():
    result = lens("wan", text_encoders.built("wan"), layers=-1)
    frames = result.outputs[0]
    assert frames.shape == (5, 32, 32, 3)
    assert np.array_equal(np.asarray(result.images[0]), (frames[2] * 255).round().astype(np.uint8))


def test_a_sound_is_shown_as_a_wave_and_saved_as_one(tmp_path):
    result = lens("audioldm2", text_encoders.built("audioldm2"), layers=["embedding"])
    assert result.rate == 16000
    assert result.outputs[0].shape == (256,)
    assert isinstance(result.images[0], Image.Image)
    assert {path.name for path in result.save(tmp_path)} == {
        "grid.png",
        "thumbnail.jpg",
        "embedding.png",
        "embedding.wav",
        "lens.json",
        "page.html",
    }
    with wave.open(str(tmp_path / "embedding.wav")) as file:
        assert (file.getframerate(), file.getnchannels(), file.getnframes()) == (16000, 1, 256)
