"""Text and image encoders as models on their own: they load and have the standard names."""

import pytest
import torch
import transformers

from diffsight import LanguageModel, logit_lens
from diffsight.errors import InputError
from models.building import build

pytestmark = pytest.mark.usefixtures("no_gradients")

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
TEXT = {**SIZES, "vocab_size": 64, "max_position_embeddings": 64}
IMAGE = {**SIZES, "image_size": 16, "patch_size": 8}
T5 = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 3, "num_heads": 4}
DISTILBERT = {"vocab_size": 64, "dim": 32, "hidden_dim": 64, "n_layers": 3, "n_heads": 4, "max_position_embeddings": 64}
IDS = torch.arange(12).reshape(2, 6) + 3
PIXELS = torch.linspace(-1, 1, 2 * 3 * 16 * 16).reshape(2, 3, 16, 16)

ENCODERS = {
    "CLIPTextModel": (TEXT, {"input_ids": IDS}),
    "CLIPTextModelWithProjection": (TEXT, {"input_ids": IDS}),
    "SiglipTextModel": (TEXT, {"input_ids": IDS}),
    "T5EncoderModel": (T5, {"input_ids": IDS}),
    "BertModel": (TEXT, {"input_ids": IDS}),
    "DistilBertModel": (DISTILBERT, {"input_ids": IDS}),
    "EsmModel": ({**TEXT, "pad_token_id": 1}, {"input_ids": IDS}),
    "ViTModel": (IMAGE, {"pixel_values": PIXELS}),
    "Dinov2Model": (IMAGE, {"pixel_values": PIXELS}),
    "SiglipVisionModel": (IMAGE, {"pixel_values": PIXELS}),
}
WITHOUT_NORM = {"BertModel", "DistilBertModel"}


def encoder_of(kind, config):
    cls = getattr(transformers, kind)
    return build(cls, cls.config_class(**config))


@pytest.mark.parametrize("kind", ENCODERS)
def test_layers_and_the_final_norm(kind):
    config, given = ENCODERS[kind]
    net = encoder_of(kind, config)
    expected = net(**given, output_hidden_states=True)
    model = LanguageModel(net)
    with model.trace(**given) as run:
        for layer, state in list(zip(run.layers, expected.hidden_states[1:], strict=True))[:-1]:
            hidden = layer.output
            assert torch.equal(hidden if isinstance(hidden, torch.Tensor) else hidden[0], state)
        last = run.layers_output[-1]
        norm = run.ln_final.output if kind not in WITHOUT_NORM else last
    assert torch.equal(norm, expected.last_hidden_state)
    assert hasattr(model, "ln_final") == (kind not in WITHOUT_NORM)
    assert not hasattr(model, "lm_head")  # what stands behind the layers is a pooler, if anything
    with model.trace(given) as run:
        run.layers_output[0] = torch.zeros_like(last)
    assert not torch.equal(run.result.last_hidden_state, expected.last_hidden_state)


@pytest.mark.parametrize("kind", ["CLIPModel", "SiglipModel"])
def test_both_towers(kind):
    config = {"text_config": TEXT, "vision_config": IMAGE}
    net = encoder_of(kind, config)
    model = LanguageModel(net)
    text, vision = net.text_model(input_ids=IDS), net.vision_model(pixel_values=PIXELS)
    with model.trace(input_ids=IDS, pixel_values=PIXELS) as run:
        states = run.record(["text_model.ln_final", "vision_model.layers[*]", "vision_model.ln_final"])
    assert torch.equal(states["text_model.ln_final.output"], text.last_hidden_state)
    assert len([path for path in states if path.startswith("vision_model.layers")]) == 3
    if kind == "SiglipModel":  # CLIP norms its class token alone
        assert torch.equal(states["vision_model.ln_final.output"], vision.last_hidden_state)


def test_a_norm_inside_the_head_is_not_the_final_norm():
    net = encoder_of("DistilBertForMaskedLM", DISTILBERT)
    model = LanguageModel(net)
    assert not hasattr(model, "ln_final")
    with model.trace(IDS) as run:
        hidden, logits = run.layers_output[-1], run.lm_head.output
    assert torch.equal(logits, net(IDS).logits)
    assert torch.allclose(model.project_on_vocab(hidden), logits, atol=1e-6)  # the activation within it, too
    assert torch.allclose(logit_lens(model, IDS[0], keep_logits=True).logits[0, -1], logits[0], atol=1e-6)


def test_a_classifier_is_no_language_head():
    model = LanguageModel(encoder_of("BertForSequenceClassification", TEXT))
    with pytest.raises(InputError, match="no lm_head was found in BertForSequenceClassification"):
        logit_lens(model, IDS[0])
