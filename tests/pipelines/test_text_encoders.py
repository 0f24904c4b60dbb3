"""What is found about the text encoders of a pipeline, compared with hand-written hooks."""

import pytest
import torch

from diffsight import DiffusionModel
from diffsight.errors import InputError
from diffsight.pipelines.diffusion.encoding import encode_prompt
from diffsight.pipelines.diffusion.text_encoders import find_encoders
from helpers import not_called
from models import diffusion, text_encoders
from models.text_encoders import PROMPT, TEXT_PIPELINES

# For each encoder: the layer whose output the pipeline uses (and whether through the final norm), whether it uses a
# pooled vector, and an argument of the denoiser, or of a component before it, where these end up.
WANTED = {
    "stable_diffusion": {"text_encoder": ((2, True), False, "unet.encoder_hidden_states")},
    "stable_diffusion_2": {"text_encoder": ((3, True), False, "unet.encoder_hidden_states")},
    "clip_skip": {"text_encoder": ((2, True), False, "unet.encoder_hidden_states")},
    "stable_diffusion_xl": {
        "text_encoder": ((1, False), False, "unet.encoder_hidden_states[..., 0:16]"),
        "text_encoder_2": ((1, False), True, "unet.encoder_hidden_states[..., 16:48]"),
    },
    "stable_diffusion_3": {
        "text_encoder": ((1, False), True, "transformer.encoder_hidden_states[..., 0:8]"),
        "text_encoder_2": ((1, False), True, "transformer.encoder_hidden_states[..., 8:24]"),
        "text_encoder_3": ((2, True), False, "transformer.encoder_hidden_states from token 77 on"),
    },
    "flux": {
        "text_encoder": (None, True, "transformer.pooled_projections"),
        "text_encoder_2": ((2, True), False, "transformer.encoder_hidden_states"),
    },
    "deepfloyd_if": {"text_encoder": ((2, True), False, "unet.encoder_hidden_states")},
    "pixart_sigma": {"text_encoder": ((2, True), False, "transformer.encoder_hidden_states")},
    "sana": {"text_encoder": ((2, True), False, "transformer.encoder_hidden_states")},
    "qwen_image": {"text_encoder": ((2, True), False, "transformer.encoder_hidden_states without the first 34 tokens")},
    "kandinsky3": {"text_encoder": ((2, True), False, "unet.encoder_hidden_states")},
    "kandinsky5": {
        "text_encoder": ((2, True), False, "transformer.encoder_hidden_states without the first 40 tokens"),
        "text_encoder_2": (None, True, "transformer.pooled_projections"),
    },
    "kandinsky_prior": {"text_encoder": ((2, True), True, "prior.encoder_hidden_states")},
    "flux2": {"text_encoder": ([(0, False), (2, False)], False, "transformer.encoder_hidden_states[..., 32:64]")},
    "z_image": {"text_encoder": ((2, False), False, "transformer.cap_feats[0]")},
    "lumina": {"text_encoder": ((1, False), False, "transformer.encoder_hidden_states")},
    "wan": {"text_encoder": ((2, True), False, "transformer.encoder_hidden_states")},
    "cogvideox": {"text_encoder": ((2, True), False, "transformer.encoder_hidden_states")},
    "stable_audio": {"text_encoder": ((2, True), False, "projection_model.text_hidden_states")},
    "audioldm2": {
        "text_encoder": (None, True, "projection_model.hidden_states"),
        "text_encoder_2": ((2, True), False, "unet.encoder_hidden_states_1"),
    },
}


def found_in(name):
    """Return what is found about a pipeline in a call with its own arguments."""
    return find_encoders(DiffusionModel(text_encoders.built(name)), **TEXT_PIPELINES[name].inputs())


@pytest.mark.parametrize("name", WANTED)
def test_what_a_pipeline_uses_of_its_encoders(name):
    found = found_in(name)
    assert list(found) == list(WANTED[name])
    for path, (used, pooled, place) in WANTED[name].items():
        encoder = found[path]
        layers = used if isinstance(used, list) else [used] if used else []
        assert [(use.layer, use.normed) for use in encoder.uses if use.layer is not None] == layers
        assert (encoder.pooled is not None) == pooled
        assert place in [place for use in encoder.uses for place in use.places]


def test_every_text_pipeline_is_checked():
    assert set(WANTED) == set(TEXT_PIPELINES)


@pytest.mark.parametrize("name", WANTED)
def test_the_layers_and_the_norm_are_modules_of_the_pipeline(name):
    pipe = text_encoders.built(name)
    for path, encoder in found_in(name).items():
        layers = pipe.components[path].get_submodule(encoder.layers.partition(".")[2])
        assert len(layers) == encoder.count
        if encoder.ln_final is not None:
            norm = pipe.components[path].get_submodule(encoder.ln_final.partition(".")[2])
            assert norm.weight.shape == (encoder.width,)
        suffix = path.removeprefix("text_encoder")
        assert encoder.tokenizer == f"tokenizer{suffix}"


def test_the_used_hidden_state_is_what_encode_prompt_returns():
    """SDXL, by hand: the last but one hidden states side by side, and the projected vector of the second."""
    pipe = text_encoders.built("stable_diffusion_xl")
    embeds, _, pooled, _ = pipe.encode_prompt(PROMPT, device="cpu", do_classifier_free_guidance=False)
    encoded = encode_prompt(DiffusionModel(pipe), PROMPT, num_inference_steps=1, guidance_scale=1.0)
    first, second = encoded["text_encoder"], encoded["text_encoder_2"]
    assert torch.equal(embeds[0], torch.cat([first.hidden(1), second.hidden(-2)], -1))
    assert torch.equal(pooled[0], second.pooled["text_embeds"])


def test_encode_prompt_returns_the_hidden_states_of_the_bare_encoder():
    pipe = text_encoders.built("flux")
    encoded = encode_prompt(DiffusionModel(pipe), PROMPT, max_sequence_length=16)["text_encoder_2"]
    given = pipe.tokenizer_2([PROMPT], padding="max_length", max_length=16, return_tensors="pt")
    with torch.no_grad():
        output = pipe.text_encoder_2(given.input_ids, output_hidden_states=True)
    assert torch.equal(encoded.ids, given.input_ids[0])
    for state, wanted in list(zip(encoded.hidden_states, output.hidden_states, strict=True))[:-1]:
        assert torch.equal(state, wanted[0])
    assert torch.equal(encoded.hidden("embedding"), output.hidden_states[0][0])
    assert torch.equal(encoded.hidden(1), output.hidden_states[2][0])
    assert torch.equal(encoded.normed, output.last_hidden_state[0])
    assert encoded.words[:4] == ("a", "red", "circle", "above")


def test_encode_prompt_takes_one_prompt_and_layers_that_exist():
    model = DiffusionModel(text_encoders.built("stable_diffusion"))
    with pytest.raises(InputError, match="one prompt, a string"):
        encode_prompt(model, ["a red circle", "a blue ring"])
    encoding = encode_prompt(model, "a red circle")["text_encoder"]
    assert torch.equal(encoding.hidden(-1), encoding.hidden(2))
    for layer in (3, -4, "embeddings", None):
        with pytest.raises(InputError, match="text_encoder has no layer"):
            encoding.hidden(layer)


def test_encode_tells_the_prompt_from_the_negative_prompt():
    pipe = text_encoders.built("stable_diffusion")
    encoded = encode_prompt(DiffusionModel(pipe), PROMPT, negative_prompt="a blue photo")["text_encoder"]
    given = pipe.tokenizer([PROMPT], padding="max_length", return_tensors="pt")
    assert torch.equal(encoded.ids, given.input_ids[0])


# Looking them up


def test_print_shows_what_was_found():
    text = str(DiffusionModel(text_encoders.built("stable_diffusion_xl")).encoders)
    assert text.splitlines() == [
        "StableDiffusionXLPipeline",
        "text_encoder: CLIPTextModel, 3 layers, 16 features, tokens from tokenizer",
        "  layers text_encoder.encoder.layers, final norm text_encoder.final_layer_norm",
        "  layer 1 (the last but one), without the final norm",
        "    -> encode_prompt[0][..., 0:16]",
        "    -> unet.encoder_hidden_states[..., 0:16]",
        "text_encoder_2: CLIPTextModelWithProjection, 3 layers, 32 features, tokens from tokenizer_2",
        "  layers text_encoder_2.text_model.encoder.layers, final norm text_encoder_2.text_model.final_layer_norm",
        "  layer 1 (the last but one), without the final norm",
        "    -> encode_prompt[0][..., 16:48]",
        "    -> unet.encoder_hidden_states[..., 16:48]",
        "  pooled vector, text_embeds",
        "    -> encode_prompt[2]",
        "    -> unet.added_cond_kwargs['text_embeds']",
    ]


def test_notebooks_show_a_table():
    shown = DiffusionModel(text_encoders.built("stable_diffusion_xl")).encoders._repr_html_()
    assert shown.count("<tr>") == 4  # a head, and a row for each of three uses
    assert "layer 1 (the last but one)" in shown
    assert "added_cond_kwargs[&#x27;text_embeds&#x27;]" in shown


@pytest.mark.parametrize("name", ["img2img", "inpaint", "controlnet"])
def test_a_pipeline_that_requires_images(name):
    encoder = DiffusionModel(diffusion.PIPELINES[name].build()).encoders["text_encoder"]
    assert encoder.used_layers == (2,)
    assert encoder.used_count == 3


def test_a_pipeline_without_text_has_none():
    found = DiffusionModel(diffusion.ddpm()).encoders
    assert len(found) == 0
    with pytest.raises(InputError, match="DDPMPipeline has no text encoder, so there is nothing to look through"):
        found.choose()


def test_a_pipeline_whose_defaults_fail():
    model = DiffusionModel(text_encoders.built("flux2"))  # it uses layer 27 of four
    with pytest.raises(InputError, match=r"Flux2KleinPipeline cannot be called with a prompt and its defaults alone"):
        model.encoders
    assert find_encoders(model, **TEXT_PIPELINES["flux2"].inputs())["text_encoder"].used_layers == (0, 2)


def test_an_encoder_that_does_not_exist():
    found = DiffusionModel(text_encoders.built("flux")).encoders
    with pytest.raises(InputError, match=r"no text encoder 'text_encoder_3'.*: it has text_encoder, text_encoder_2"):
        found.choose("text_encoder_3")
    assert found.choose("text_encoder").name == "text_encoder"
    assert found.choose().name == "text_encoder_2"  # the first whose hidden states are used


def test_they_are_found_once_until_a_component_is_exchanged():
    model = DiffusionModel(text_encoders.TEXT_PIPELINES["stable_diffusion"].build())
    calls = []
    model.pipeline.text_encoder.register_forward_hook(lambda module, args, output: calls.append(module))
    assert model.encoders is model.encoders
    once = len(calls)
    assert model.encoders.choose().count == 3
    assert len(calls) == once
    model.text_encoder = text_encoders.built("stable_diffusion_2").text_encoder
    assert model.encoders.choose().count == 4


def test_looking_leaves_nothing_behind():
    pipe = text_encoders.TEXT_PIPELINES["stable_diffusion"].build()
    model = DiffusionModel(pipe)

    @model.edit
    def edited(run):
        run.text_encoder.layers[0].output[:] = 0

    torch.manual_seed(5)
    state = torch.get_rng_state()
    assert edited.encoders.choose().used_layers == (2,)
    assert torch.equal(torch.get_rng_state(), state)
    hooks = [h for m in pipe.text_encoder.modules() for h in (*m._forward_hooks, *m._forward_pre_hooks)]
    assert hooks == []


def test_arguments_that_the_pipeline_cannot_take():
    """Diffusers looks for the final norm where transformers 5 no longer has it."""
    model = DiffusionModel(text_encoders.built("stable_diffusion"))
    instead = r"clip_skip=1: .* run.text_encoder.ln_final.input = run.text_encoder.layers\[-2\].output"
    with not_called(model.pipeline.text_encoder), pytest.raises(InputError, match=instead):
        find_encoders(model, "a red circle", clip_skip=1)
    with not_called(model.pipeline.text_encoder), pytest.raises(InputError, match=instead):
        model.generate("a red circle", clip_skip=1)
    with pytest.raises(InputError, match="has no text encoder 'text_encoder_2'"):
        model.encoders["text_encoder_2"]
    assert "text_encoder_2" not in model.encoders
