"""Target probabilities: first tokens with and without a leading space, and their probabilities."""

import json

import pytest
import torch
import transformers
from matplotlib.figure import Figure

from diffsight import LanguageModel, logit_lens, run_prompts
from diffsight.errors import InputError
from diffsight.lenses.target_probabilities import Prompt, first_tokens
from models import diffusion, language

PROMPTS = language.PROMPTS
TARGETS = {"right": "Paris", "traps": ["London", "Madrid"], "long": "the city of Paris"}


def pieces(model, words):
    return model.tokenizer.convert_ids_to_tokens(first_tokens(words, model))


def test_first_tokens_with_and_without_a_space(model):
    def first(text):
        return language.TOKENIZER(text)["input_ids"][0]

    assert first_tokens("Paris", model) == (first(" Paris"), first("Paris"))
    assert first_tokens(["London", "Madrid", "London"], model) == tuple(
        first(form) for form in (" London", "London", " Madrid", "Madrid")
    )
    assert first_tokens("the city of Paris", model) == first_tokens("the", model)
    assert first_tokens(" Paris", model) == first_tokens("Paris", model)


def test_a_tokenizer_that_adds_a_space_itself():
    """SentencePiece starts every text with a space, so the two forms differ only within a text."""
    tokenizer = diffusion.gemma_tokenizer()
    config = transformers.GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=4)
    model = LanguageModel((language.build(transformers.GPT2LMHeadModel, config), tokenizer))
    found = pieces(model, "circle")
    assert found[0].startswith("▁")
    assert not found[1].startswith("▁")


def test_a_tokenizer_without_spaces():
    words = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]", "paris", "london"]
    tokenizer = transformers.BertTokenizer(vocab={word: i for i, word in enumerate(words)})
    config = transformers.BertConfig(
        vocab_size=7, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
    )
    model = LanguageModel((language.build(transformers.BertForMaskedLM, config), tokenizer))
    assert first_tokens("paris", model) == (5,)


def test_the_output_of_the_model(net, model):
    prompts = [Prompt.from_strings(text, TARGETS, model) for text in PROMPTS]
    result = run_prompts(model, prompts, batch_size=2, progress=False)
    for i, text in enumerate(PROMPTS):
        with torch.no_grad():
            probabilities = net(language.ids(text)).logits[0, -1].softmax(-1)
        for name, tokens in prompts[i].targets.items():
            assert torch.allclose(result[name][i], probabilities[list(tokens)].sum(), atol=1e-6)
    assert list(result) == ["right", "traps", "long"]
    assert result["right"].shape == (3,)
    assert result.layers is None


def test_by_layer(net, model):
    """Targets may differ from prompt to prompt."""
    first, second = Prompt.from_strings(PROMPTS[0], "Paris", model), Prompt(PROMPTS[1], {"target": [5, 9]})
    result = run_prompts(model, [first, second], lens=logit_lens)
    assert result["target"].shape == (2, 4)
    for i, prompt in enumerate((first, second)):
        states = language.hidden_states(net, net.transformer.h, language.ids(prompt.text))
        with torch.no_grad():
            said = torch.stack([net.lm_head(net.transformer.ln_f(h[0, -1])) for h in states]).softmax(-1)
        expected = said[:, list(prompt.targets["target"])].sum(-1)
        assert torch.allclose(result["target"][i], expected, atol=1e-6)
    assert torch.allclose(result["target"][:, -1], run_prompts(model, [first, second])["target"], atol=1e-6)


def test_arguments_go_to_the_lens(model):
    prompt = Prompt.from_strings(PROMPTS[0], "Paris", model)
    result = run_prompts(model, prompt, lens=logit_lens, layers=[0, 2])
    assert result.layers == (0, 2)


def test_the_batch_size_is_that_of_the_lens_unless_given(model):
    given = []

    def lens(model, prompts, **arguments):
        given.append(arguments.get("batch_size"))
        return logit_lens(model, prompts, **arguments)

    prompt = Prompt.from_strings(PROMPTS[0], "Paris", model)
    run_prompts(model, prompt, lens=lens)
    run_prompts(model, prompt, lens=lens, batch_size=2)
    assert given == [None, 2]


def test_tokens_of_two_targets_are_told(model):
    assert Prompt.from_strings("a", {"right": "Paris", "wrong": "London"}, model).shared_tokens == {}
    prompt = Prompt.from_strings("a", {"right": "Paris", "wrong": ["London", "Paris"]}, model)
    assert prompt.shared_tokens == dict.fromkeys(first_tokens("Paris", model), ("right", "wrong"))


@pytest.mark.parametrize("lens", [None, logit_lens])
def test_it_shows_itself(model, tmp_path, lens):
    result = run_prompts(model, [Prompt.from_strings(text, TARGETS, model) for text in PROMPTS], lens=lens)
    assert isinstance(result.plot(), Figure)
    assert result._repr_png_().startswith(b"\x89PNG")
    paths = result.save(tmp_path / "out")
    assert {path.name for path in paths} == {"targets.json", "targets.png", "targets.safetensors", "page.html"}
    record = json.loads((tmp_path / "out" / "targets.json").read_text())
    assert record["prompts"][0]["words"] == TARGETS
    assert record["tokens"]["right"] == [" Paris", "Paris"]


def test_bad_input(net, model):
    prompt = Prompt.from_strings(PROMPTS[0], "Paris", model)
    for given, words in (
        ([], "there is no prompt"),
        (["a text"], "run_prompts takes Prompt objects"),
        ([prompt, Prompt("a", {"other": [1]})], "the same names of targets: target in the first, other in 'a'"),
        ([Prompt("a", {"target": []})], "'a' has no tokens to track under 'target'"),
        ([Prompt("a", {})], "'a' has no tokens to track"),
        ([Prompt("a", {"target": [9999]})], "there is no token 9999"),
        ([Prompt("", {"target": [1]})], "the prompt is empty"),
    ):
        with pytest.raises(InputError, match=words):
            run_prompts(model, given)
    for words, told in (("", "is not empty, not ''"), ([], "no word to track"), ([3], "is not empty, not 3")):
        with pytest.raises(InputError, match=told):
            first_tokens(words, model)
    with pytest.raises(InputError, match="words need a tokenizer"):
        first_tokens("Paris", LanguageModel(net))


def test_names_and_targets_that_do_not_exist(model):
    result = run_prompts(model, Prompt.from_strings(PROMPTS[0], TARGETS, model), progress=False)
    assert "wrong" not in result and result.get("wrong") is None
    with pytest.raises(InputError, match=r"there is no target 'trap'.*the result has right, traps, long"):
        result["trap"]
    for tokens in (17, "Paris"):
        with pytest.raises(InputError, match="must be token ids"):
            run_prompts(model, Prompt(PROMPTS[0], {"right": tokens}))
    with pytest.raises(InputError, match="lens=logit_lens"):
        run_prompts(model, Prompt(PROMPTS[0], {"right": [17]}), lens="logit")
