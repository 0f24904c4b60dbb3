"""Standard names: every text encoder has `layers` and `ln_final`, whatever their real names are."""

import pytest
import torch
import transformers
from torch import nn

from diffsight import DiffusionModel
from diffsight.pipelines.standard_names import standard_names
from models import diffusion

TOKENS = torch.arange(5)[None] + 3


def encoders():
    clip, t5, gemma = (
        diffusion.clip_tokenizer(),
        diffusion.t5_tokenizer(),
        diffusion.gemma_tokenizer(),
    )
    return {
        "clip": diffusion.clip_encoder(clip),
        "clip_with_projection": diffusion.clip_encoder(clip, projection=True),
        "t5": diffusion.t5_encoder(t5),
        "umt5": diffusion.t5_encoder(t5, family="UMT5"),
        "gemma": diffusion.gemma_encoder(gemma),
    }


ENCODERS = encoders()


@pytest.fixture(params=ENCODERS)
def encoder(request):
    return ENCODERS[request.param]


def test_the_layers_are_those_that_give_the_hidden_states(encoder):
    names = standard_names(encoder)
    layers = encoder.get_submodule(names["layers"])
    seen = []
    hooks = [layer.register_forward_hook(lambda m, args, output: seen.append(output)) for layer in layers]
    with torch.no_grad():
        states = encoder(TOKENS, output_hidden_states=True).hidden_states
    for hook in hooks:
        hook.remove()
    seen = [output[0] if isinstance(output, tuple) else output for output in seen]
    assert len(seen) == len(layers) == len(states) - 1 == 3
    for output, state in list(zip(seen, states[1:], strict=True))[:-1]:  # some put the last through the norm
        assert torch.equal(output, state)


def test_the_final_norm_gives_the_last_hidden_state(encoder):
    names = standard_names(encoder)
    norm, seen = encoder.get_submodule(names["ln_final"]), []
    hook = norm.register_forward_hook(lambda m, args, output: seen.append(output))
    with torch.no_grad():
        last = encoder(TOKENS).last_hidden_state
    hook.remove()
    assert len(seen) == 1
    assert torch.equal(seen[0], last)


TEXT = {name: kind for name, kind in diffusion.PIPELINES.items() if kind.text_encoder_layer}


@pytest.mark.parametrize("kind", TEXT.values(), ids=TEXT)
def test_every_text_encoder_of_a_pipeline_has_the_names(kind):
    pipe = kind.build()
    model = DiffusionModel(pipe)
    for name, encoder in pipe.components.items():
        if name.startswith("text_encoder"):
            assert len(model[name].layers) == 3
            paths = {id(module): path for path, module in encoder.named_modules()}
            for index, layer in enumerate(model[name].layers):
                assert layer.path == f"{name}.layers[{index}]"
                assert paths[id(layer._owner)].endswith(f".{index}") or paths[id(layer._owner)] == f"layers.{index}"
            assert "norm" in paths[id(model[name].ln_final._owner)]


@pytest.mark.parametrize("kind", TEXT.values(), ids=TEXT)
def test_a_standard_name_and_the_real_one_are_the_same_point(kind):
    pipe = kind.build()
    with DiffusionModel(pipe).generate(**kind.inputs(), seed=0) as run:
        by_name = run.text_encoder.layers[1].output
        assert run[kind.text_encoder_layer].output is by_name
        run.stop()


def test_only_encoders_have_the_names():
    model = DiffusionModel(diffusion.stable_diffusion())
    assert "layers" not in dir(model.unet)
    assert not hasattr(model.vae, "layers")
    assert not hasattr(model.unet, "ln_final")


def test_a_model_without_layers_has_no_names():
    assert standard_names(nn.Linear(2, 2)) == {}
    assert standard_names(nn.ModuleList([nn.Linear(2, 2), nn.ReLU()])) == {}


def test_an_encoder_without_a_final_norm_has_layers_only():
    config = transformers.BertConfig(
        vocab_size=32, hidden_size=8, num_hidden_layers=3, num_attention_heads=2, intermediate_size=16
    )
    assert standard_names(transformers.BertModel(config)) == {"layers": "encoder.layer"}


def test_one_layer_is_enough():
    config = transformers.CLIPTextConfig(
        vocab_size=32, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    names = standard_names(transformers.CLIPTextModel(config))
    assert names == {"layers": "encoder.layers", "ln_final": "final_layer_norm"}


def test_layers_of_a_vision_language_model_are_those_of_its_language_model():
    """Qwen-Image's text encoder has more layers for images (32) than for words (28)."""
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    rope = {"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}}
    text = {"vocab_size": 32, "num_key_value_heads": 1, **sizes, **rope}
    vision = {"depth": 3, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 16}
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    encoder = transformers.Qwen2_5_VLForConditionalGeneration(config)
    names = standard_names(encoder)
    assert names == {"layers": "model.language_model.layers", "ln_final": "model.language_model.norm"}
