"""Standard names: every text encoder has `layers` and `ln_final`, whatever their real names are."""

import pytest
import torch
import transformers
from torch import nn

from diffsight import DiffusionModel
from diffsight.errors import AssignmentError, InputError
from diffsight.pipelines.standard_names import standard_names
from helpers import first, outputs
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


@pytest.mark.parametrize("kind", TEXT.values(), ids=TEXT)
def test_hidden_states_are_tensors_on_every_text_encoder(kind):
    with DiffusionModel(kind.build()).generate(**kind.inputs(), seed=0) as run:
        embedding = run.text_encoder.layers_input[0]
        hidden = run.text_encoder.layers_output[-1]
        assert hidden is first(run.text_encoder.layers[-1].output)
        assert embedding.shape == hidden.shape
        run.stop()


@pytest.mark.parametrize("name", ["stable_diffusion", "pixart_sigma"])
def test_hidden_states_are_assigned_in_a_row(name):
    """Passing an earlier layer on, as a hand-written hook does: T5's layers return tuples."""
    kind = diffusion.PIPELINES[name]
    pipe, arguments = kind.build(), kind.inputs() | {"prompt": ["a red circle", "a blue square"]}
    layers = standard_names(pipe.text_encoder)["layers"]
    seen = {}

    def keep(module, args, output):
        seen["early"] = first(output)[1].clone()

    def put(module, args, output):
        first(output)[1] = seen["early"]

    with DiffusionModel(pipe).generate(**arguments, seed=0) as run:
        row = run.rows[1]
        row.text_encoder.layers_output[2] = row.text_encoder.layers_output[0]
        embeds = run.text_encoder.output[0]
        run.stop()
    hooks = [
        pipe.text_encoder.get_submodule(f"{layers}.{i}").register_forward_hook(f) for i, f in ((0, keep), (2, put))
    ]
    expected = outputs(pipe.text_encoder, lambda: DiffusionModel(pipe).generate(**arguments, seed=0).result)[0][0]
    for hook in hooks:
        hook.remove()
    assert torch.equal(embeds, expected)


def test_a_layer_that_does_not_exist():
    model = DiffusionModel(diffusion.stable_diffusion())
    assert len(model.text_encoder.layers_output) == 3
    with pytest.raises(InputError, match=r"text_encoder.layers_output\[3\]: there is no layer 3, the model has 3"):
        model.generate("a red circle").text_encoder.layers_output[3]
    with pytest.raises(InputError, match=r"the input of the first layer is layers_input\[0\]"):
        model.generate("a red circle").text_encoder.layers_output["embedding"]


def test_a_tuple_does_not_go_into_the_final_norm():
    kind = diffusion.PIPELINES["pixart_sigma"]
    with pytest.raises(AssignmentError, match=r"read layers_output\[i\]"):
        with DiffusionModel(kind.build()).generate(**kind.inputs()) as run:
            run.text_encoder.ln_final.input = run.text_encoder.layers[0].output


def test_only_encoders_have_the_names():
    model = DiffusionModel(diffusion.stable_diffusion())
    assert "layers" not in dir(model.unet)
    assert not hasattr(model.vae, "layers")
    assert not hasattr(model.unet, "ln_final")
    assert not hasattr(model.unet, "layers_output")


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
