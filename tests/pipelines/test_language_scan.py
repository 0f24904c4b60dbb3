"""Scans of language models: masks that a model makes itself, mixtures of experts, encoders and decoders."""

import pytest
import torch
import transformers

from diffsight import LanguageModel
from diffsight.errors import ScanError
from models import architectures

IDS = architectures.tokens(2, 6)


@pytest.mark.parametrize(
    "kind", ["mixtral", "qwen3_moe", "gpt_oss", "deepseek_v2", "llama4_text", "bart", "roformer", "jamba"]
)
def test_shapes_are_those_of_a_real_run(kind):
    net = architectures.build_causal(kind)
    model = LanguageModel(net)
    with model.scan(IDS) as run:
        found = [run.layers_output[0].shape, run.mlps_output[1].shape, run.logits.shape]
        dtype = run.result.logits.dtype
    with torch.no_grad(), model.trace(IDS) as run:
        assert found == [run.layers_output[0].shape, run.mlps_output[1].shape, run.logits.shape]
        assert dtype == run.logits.dtype


def test_logits_have_no_values():
    model = LanguageModel(architectures.build_causal("llama"))
    with model.scan(IDS) as run:
        best = run.next_token_probs.topk(3)
        assert best.indices.shape == (2, 3)
        with pytest.raises(ScanError):
            best.indices.tolist()
    with pytest.raises(ScanError, match="shapes only"):
        run.result.logits.argmax(-1).tolist()


@pytest.mark.parametrize("kind", ["T5", "Bart", "M2M100"])
def test_an_encoder_and_a_decoder(kind):
    config = architectures.small_config({"M2M100": "m2m_100"}.get(kind, kind.lower()))
    model = LanguageModel(getattr(transformers, f"{kind}ForConditionalGeneration")(config))
    width = config.d_model
    with model.scan(IDS, decoder_input_ids=IDS[:, :3]) as run:
        assert run.encoder.layers[0].output is not None
        assert run.layers_output[1].shape == (2, 3, width)
        assert run.logits.shape == (2, 3, config.vocab_size)


def test_padded_speech():
    """The mask of the frames is made from the mask of the samples, by writing to it."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    convolutions = {"conv_dim": (16, 16), "conv_stride": (5, 4), "conv_kernel": (10, 8), "num_feat_extract_layers": 2}
    places = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
    net = transformers.Wav2Vec2ForCTC(
        transformers.Wav2Vec2Config(vocab_size=32, **sizes, **convolutions, **places)
    ).eval()
    extractor = transformers.Wav2Vec2FeatureExtractor(return_attention_mask=True)
    model = LanguageModel(net)
    sounds = [torch.randn(4000).numpy(), torch.randn(3000).numpy()]
    given = extractor(sounds, sampling_rate=16000, return_tensors="pt", padding=True)
    before = given["attention_mask"].clone()
    with model.scan(dict(given)) as run:
        shape = run.layers_output[1].shape
    with torch.no_grad():
        assert shape == model.trace(dict(given)).layers_output[1].shape
    assert torch.equal(given["attention_mask"], before)
