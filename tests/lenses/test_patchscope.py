"""Patchscopes, compared with a plain PyTorch hook that puts a hidden state into another prompt."""

import json

import numpy as np
import pytest
import torch
import transformers

from diffsight import patchscope_generate, patchscope_lens, run_prompts
from diffsight.errors import InputError
from diffsight.lenses.patchscope import DESCRIPTION, IDENTITY, TargetPrompt, repeat_prompt
from diffsight.lenses.target_probabilities import Prompt
from models import language

PROMPTS = language.PROMPTS
SHORT = TargetPrompt("cat -> cat ?")


@torch.no_grad()
def logits_by_hand(net, hidden, layer, target):
    """Return the logits after the target prompt, (vocabulary,), with `hidden` put into it."""

    def put(module, args, output):
        output[0, target.position] = hidden
        return output

    hook = net.transformer.h[layer].register_forward_hook(put)
    logits = net(language.ids(target.text)).logits[0, -1]
    hook.remove()
    return logits


def states_at(net, text, position=-1):
    return [hidden[0, position] for hidden in language.hidden_states(net, net.transformer.h, language.ids(text))]


def test_words_to_repeat():
    assert repeat_prompt("cat") == repeat_prompt(["cat"]) == TargetPrompt("cat cat\n?")
    with pytest.raises(InputError, match="at least one word"):
        repeat_prompt([])


@pytest.mark.parametrize("batch_size", [32, 3])
def test_every_prompt_at_every_layer(net, model, batch_size):
    result = patchscope_lens(model, PROMPTS, target=SHORT, keep_logits=True, batch_size=batch_size, progress=False)
    assert result.logits.shape == (3, 4, 1, len(language.TOKENIZER))
    for i, text in enumerate(PROMPTS):
        for layer, hidden in enumerate(states_at(net, text)):
            expected = logits_by_hand(net, hidden, layer, SHORT)
            assert torch.allclose(result.logits[i, layer, 0], expected, atol=1e-5)
    assert result.prompts == tuple(PROMPTS)
    assert result.lens == "patchscope_lens"


def test_another_layer_position_and_target(net, model):
    targets = [TargetPrompt("A cat sat", 1), SHORT, TargetPrompt("hello hello king ?", -2)]
    options = {"target": targets, "target_layer": 0, "positions": [0, 2, -2], "layers": [1, 3]}
    result = patchscope_lens(model, PROMPTS, keep_logits=True, **options)
    for i, (text, position) in enumerate(zip(PROMPTS, (0, 2, -2))):
        for j, layer in enumerate((1, 3)):
            expected = logits_by_hand(net, states_at(net, text, position)[layer], 0, targets[i])
            assert torch.allclose(result.logits[i, j, 0], expected, atol=1e-5)
    assert [words[0] for words in result.inputs][:2] == ["T" if len(result.inputs[0][0]) == 1 else "The", " sat"]


@pytest.mark.parametrize("kind", [np.array, torch.tensor])
def test_positions_in_an_array(model, kind):
    for places in ([0, 2, -2], 0):
        given, plain = (
            patchscope_lens(model, PROMPTS, positions=one, keep_logits=True) for one in (kind(places), places)
        )
        assert torch.equal(given.logits, plain.logits)


def test_hidden_states_in_the_place_of_prompts(net, model):
    given = torch.stack(states_at(net, PROMPTS[0]))[:, None]
    result = patchscope_lens(model, given, target=SHORT, keep_logits=True)
    expected = patchscope_lens(model, PROMPTS[0], target=SHORT, keep_logits=True)
    assert torch.allclose(result.logits, expected.logits, atol=1e-6)
    assert result.prompts == ("hidden state 0",)


def test_a_model_that_caps_its_logits():
    net = language.gemma2()
    result = patchscope_lens(language.model(net), PROMPTS[1], target=SHORT, layers=-1, keep_logits=True)
    assert 0.1 < result.logits.abs().max() < 0.5
    # In the last layer the hidden state decides alone: the model predicts what it predicts after the prompt.
    with torch.no_grad():
        assert torch.allclose(result.logits[0, 0, 0], net(language.ids(PROMPTS[1])).logits[0, -1], atol=1e-5)


def test_generation(net, model):
    result = patchscope_generate(model, PROMPTS[:2], target=SHORT, layers=[0, 2], max_new_tokens=4, progress=False)
    assert result.layers == (0, 2)
    for i, text in enumerate(PROMPTS[:2]):
        for j, layer in enumerate((0, 2)):
            hidden = states_at(net, text)[layer]
            first = logits_by_hand(net, hidden, layer, SHORT).argmax()
            assert result.texts[i][j].startswith(language.TOKENIZER.decode(first))
    assert str(result).splitlines()[0] == PROMPTS[0]
    assert str(result).splitlines()[2] == f"   2  {result.texts[0][1]!r}"


def test_generation_goes_through_the_layers_that_were_patched(net, model):
    hidden = torch.zeros(1, 2, 32)
    hidden[0, 0], hidden[0, 1] = states_at(net, PROMPTS[0])[1], states_at(net, PROMPTS[1])[1]
    result = patchscope_generate(model, hidden, target=SHORT, layers=1, max_new_tokens=5)
    with model.generate(SHORT.text, max_new_tokens=5) as run:
        run.layers_output[1][0, -1] = hidden[0, 1]
    assert result.texts[1] == (run.text,)


def test_seeded_generation_and_its_record(model, tmp_path):
    options = {"target": SHORT, "layers": [0, 1], "do_sample": True, "max_new_tokens": 3, "seed": 3}
    result = patchscope_generate(model, PROMPTS[0], **options)
    assert result.texts == patchscope_generate(model, PROMPTS[0], **options).texts
    path, page = result.save(tmp_path / "out")
    assert page.name == "page.html"
    record = json.loads(path.read_text())
    assert record["texts"] == [list(result.texts[0])]
    assert record["targets"] == [{"text": SHORT.text, "position": -1}]


def test_the_target_prompts_of_the_paper():
    assert repeat_prompt(["cat", "1135", "hello"], between=" -> ") == IDENTITY
    assert repeat_prompt().text == "king king\n1135 1135\nhello hello\n?"
    assert DESCRIPTION.text.startswith("Syria: Country in the Middle East, Leonardo DiCaprio: American actor,")
    assert DESCRIPTION.text.endswith(", x")


def test_tokens_are_tracked_through_it(model):
    prompt = Prompt.from_strings(PROMPTS[0], "Paris", model)
    tracked = run_prompts(model, prompt, lens=patchscope_lens, target=SHORT)
    result = patchscope_lens(model, PROMPTS[0], target=SHORT, tokens=prompt.targets["target"])
    assert torch.allclose(tracked["target"][0], result.token_probabilities[0, :, 0].sum(-1))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"target": "a text"}, r"a target must be a TargetPrompt: TargetPrompt\('a text', position=-1\)"),
        ({"target": [SHORT, SHORT]}, "there are 2 target prompts for 1 prompts"),
        ({"target": TargetPrompt("a cat", 7)}, "there is no position 7 in prompt 0"),
        ({"target": TargetPrompt("", 0)}, "the prompt is empty"),
        ({"target_layer": 9}, "there is no layer 9"),
        ({"layers": 9}, "there is no layer 9"),
        ({"positions": 99}, "there is no position 99 in prompt 0"),
        ({"prompts": torch.zeros(3, 1, 32)}, r"here \(4, n, features\), not \(3, 1, 32\)"),
        ({"prompts": ""}, "the prompt is empty"),
    ],
)
def test_bad_input_is_an_error_before_anything_runs(net, model, given, words):
    def fail(*_):
        raise AssertionError("the model ran")

    hook = net.register_forward_pre_hook(fail)
    try:
        for lens in (patchscope_lens, patchscope_generate):
            with pytest.raises(InputError, match=words):
                lens(model, **{"prompts": PROMPTS[0], "target": SHORT, **given})
    finally:
        hook.remove()


def test_a_model_that_does_not_write():
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    bert = language.build(transformers.BertForMaskedLM, transformers.BertConfig(vocab_size=330, **sizes))
    with pytest.raises(
        InputError, match="a patchscope needs a decoder that generates text, but BertForMaskedLM is not one"
    ):
        patchscope_lens(language.model(bert), PROMPTS[0])


def test_nothing_stays_behind(net, model):
    before = {name: value.clone() for name, value in net.state_dict().items()}
    patchscope_lens(model, PROMPTS, target=SHORT)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert torch.is_grad_enabled()
