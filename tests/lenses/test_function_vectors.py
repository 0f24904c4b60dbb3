"""Function vectors, compared with plain hooks: mean head outputs, the effect of every head, the sum of the best."""

import pytest
import torch

from diffsight import LanguageModel, VisionLanguageModel, evaluate_function_vector, function_vector, steer
from diffsight.lenses import few_shot_prompts, patch_object_attn_lens
from diffsight.lenses.demonstrations.few_shot_prompts import answer_tokens
from helpers import refusal
from models import language, vision_language
from models.lens_results import PAIRS

FEW = {"shots": 2, "progress": False}


def of_heads(projection, heads, edit):
    """Edit the input of an attention's output projection, (batch, tokens, heads, features), with an ordinary hook."""

    def hook(module, args):
        hidden = args[0].clone()
        edit(hidden.unflatten(-1, (heads, -1)))
        return (hidden, *args[1:])

    return projection.register_forward_pre_hook(hook)


def projections(net):
    if hasattr(net, "gpt_neox"):
        return [block.attention.dense for block in net.gpt_neox.layers]
    if hasattr(net, "transformer"):
        return [block.attn.c_proj for block in net.transformer.h]
    if hasattr(net.model, "language_model"):
        return [block.self_attn.o_proj for block in net.model.language_model.layers]
    return [block.self_attn.o_proj for block in net.model.layers]


def result_of(projection, hidden):
    """What one head adds: its features alone through the projection, without the bias."""
    return projection(hidden) - projection(torch.zeros_like(hidden))


def llava():
    net, processor = vision_language.llava()
    return VisionLanguageModel((net, processor))


def reading(build_net):
    return lambda: LanguageModel((build_net(), language.TOKENIZER))


@torch.no_grad()
@pytest.mark.parametrize(
    "build",
    [
        *map(reading, (language.gpt2, language.llama, language.gemma2, language.neox, language.qwen3)),
        reading(language.mixtral),
        llava,
    ],
)
def test_it_equals_a_loop_with_hooks(build):
    model, heads = build(), 4
    net = model.module
    for weight in net.parameters():
        weight *= 5 if weight.ndim > 1 else 1  # else no head matters
    prompts = few_shot_prompts(PAIRS, 2)
    answers = answer_tokens(model, prompts)

    def ids(text):
        return torch.tensor([model.tokenizer(text)["input_ids"]])

    places = projections(net)
    sums, seen = [0.0] * len(places), []

    def keep(hidden):
        seen.append(hidden[0, -1].clone())

    for prompt in prompts:
        seen.clear()
        hooks = [of_heads(place, heads, lambda hidden: seen.append(hidden[0, -1].clone())) for place in places]
        net(ids(prompt.text))
        for hook in hooks:
            hook.remove()
        sums = [total + one for total, one in zip(sums, seen)]
    means = [total / len(prompts) for total in sums]

    def probability(prompt, answer):
        return net(ids(prompt.shuffled)).logits[0, -1].softmax(-1)[answer]

    plain = torch.stack([probability(*pair) for pair in zip(prompts, answers)])
    effects = torch.zeros(len(places), heads)
    for layer, place in enumerate(places):
        for head in range(heads):

            def put(hidden, layer=layer, head=head):
                hidden[0, -1, head] = means[layer][head]

            hook = of_heads(place, heads, put)
            changed = torch.stack([probability(*pair) for pair in zip(prompts, answers)])
            hook.remove()
            effects[layer, head] = (changed - plain).mean()

    found = function_vector(model, PAIRS, heads=3, batch_size=9, **FEW)
    largest = effects.abs().max()
    assert largest > 1e-5
    assert torch.allclose(found.effects / largest, effects / largest, atol=0.01)
    best = effects.flatten().argsort(descending=True)[:3].tolist()
    assert found.heads == tuple(divmod(place, heads) for place in best)
    vector = 0.0
    for layer, head in found.heads:
        alone = torch.zeros_like(means[layer])
        alone[head] = means[layer][head]
        vector = vector + result_of(places[layer], alone.flatten())
    assert torch.allclose(found.vector, vector, atol=1e-5)
    assert found.baseline == pytest.approx(float(plain.mean()), abs=1e-6)
    assert [head for head, _ in found.top(3)] == list(found.heads)


def test_passes_are_counted(model, net):
    calls = []
    handle = net.transformer.register_forward_hook(lambda *_: calls.append(1))
    found = function_vector(model, PAIRS, batch_size=9, **FEW)
    handle.remove()
    stopped = -(-len(PAIRS) // 9)  # the runs of the means end before the last layer
    assert len(calls) <= found.passes <= len(calls) + stopped


def test_heads_of_ones_own(model):
    found = function_vector(model, PAIRS, heads=[(1, 2), (-1, 0)], **FEW)
    assert found.heads == ((1, 2), (3, 0))
    parts = [function_vector(model, PAIRS, heads=[head], **FEW).vector for head in found.heads]
    assert torch.allclose(found.vector, parts[0] + parts[1], atol=1e-6)


@torch.no_grad()
def test_the_evaluation(model):
    vector = torch.randn(32, generator=torch.Generator().manual_seed(0)) * 20
    scores = evaluate_function_vector(model, PAIRS, vector, layer=1, factor=2)
    prompts = few_shot_prompts(PAIRS, 0)
    steered = steer(model, 1, vector, 2, positions=-1)
    for prompt, right, token in zip(prompts, scores.with_vector, scores.without):
        assert right == language.TOKENIZER.decode(steered.trace(prompt.text).next_token_probs.argmax())
        assert token == language.TOKENIZER.decode(model.trace(prompt.text).next_token_probs.argmax())
    assert scores.with_vector != scores.without
    assert 0 <= scores.accuracy <= 1


def test_the_prompts():
    pairs = [(str(i), chr(97 + i)) for i in range(6)]
    for prompt, (question, answer) in zip(few_shot_prompts(pairs, 3, seed=1), pairs):
        *shown, asked = prompt.text.split("\n\n")
        *shuffled, last = prompt.shuffled.split("\n\n")
        assert asked == last == f"Q: {question}\nA:"
        assert prompt.answer == f" {answer}"
        assert len(shown) == 3
        for right, wrong in zip(shown, shuffled):
            assert right.split("\n")[0] == wrong.split("\n")[0]
            assert right != wrong
        assert sorted(text[-1] for text in shown) == sorted(text[-1] for text in shuffled)
        assert f"Q: {question}\n" not in "".join(shown)
    assert few_shot_prompts(pairs, 3) == few_shot_prompts(pairs, 3)
    assert few_shot_prompts(pairs, 0)[0].shuffled is None


@torch.no_grad()
@pytest.mark.parametrize("build_net", [language.gpt2, language.llama])
def test_attending_to_another_prompt(build_net):
    net = build_net()
    model = LanguageModel((net, language.TOKENIZER))
    blocks = net.transformer.h if hasattr(net, "transformer") else net.model.layers
    attentions = [block.attn if hasattr(block, "attn") else block.self_attn for block in blocks]
    source, target = language.PROMPTS[0], language.PROMPTS[1]

    def hidden_of(args, kwargs):
        return args[0] if args else kwargs["hidden_states"]

    seen = []
    hooks = [
        place.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(hidden_of(args, kwargs)[0, -1].clone()), with_kwargs=True
        )
        for place in attentions
    ]
    net(language.ids(source))
    for hook in hooks:
        hook.remove()
    found = patch_object_attn_lens(model, source, target, 1, 2, progress=False)
    for first in range(4):
        hooks = []
        for layer in range(first, min(first + 2, 4)):

            def put(module, args, kwargs, layer=layer):
                hidden_of(args, kwargs)[:, 1] = seen[layer]

            hooks.append(attentions[layer].register_forward_pre_hook(put, with_kwargs=True))
        expected = net(language.ids(target)).logits[0, -1].softmax(-1)
        for hook in hooks:
            hook.remove()
        assert torch.allclose(found[0, first], expected, atol=1e-6)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"pairs": [("a", "b"), ("c", "d")]}, "2 examples and a question need 3 pairs, but there are 2"),
        ({"pairs": ["ab"]}, "each pair must be a question and an answer"),
        ({"pairs": [(str(i), "x") for i in range(5)]}, "all have the answer 'x'"),
        ({"shots": 1}, "shots must be 2 or more"),
        ({"shots": 0}, "needs examples"),
        ({"heads": [(9, 0)]}, "no head (9, 0): the model has 4 layers of 4 heads"),
        ({"heads": 17}, "heads must be an integer from 1 to 16"),
        ({"template": "{}"}, "a template must contain {} twice"),
    ],
)
def test_bad_input(model, given, words):
    assert words in refusal(function_vector, model, **{"pairs": PAIRS, **FEW, **given})
