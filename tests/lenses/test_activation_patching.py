"""Activation patching of language models, against a loop with ordinary hooks."""

import json

import numpy as np
import pytest
import torch
from hook_patching import Parts, kept, patched_values, run
from matplotlib.figure import Figure
from transformers import LlavaForConditionalGeneration

from diffsight import LanguageModel, VisionLanguageModel, activation_patching
from diffsight.errors import InputError, PointNotFoundError
from diffsight.lenses import kl_divergence, logit_difference, token_probability
from diffsight.pipelines.words import align_words
from helpers import first, footprint, not_called, refusal, with_first
from models import architectures, diffusion, language_kinds, vision_language

LLAMA = Parts("model.layers", "self_attn", "mlp", "self_attn.o_proj", heads=4)
GPT2 = Parts("transformer.h", "attn", "mlp", "attn.c_proj", heads=4)
KINDS = {
    "gpt2": (language_kinds.gpt2, GPT2, ("layers", "attentions", "mlps", "heads")),
    "llama": (language_kinds.llama, LLAMA, ("layers", "attentions", "mlps", "heads")),
    "gpt_neox": (
        lambda: architectures.build_causal("gpt_neox"),
        Parts("gpt_neox.layers", "attention", "mlp", "attention.dense", heads=4),
        ("layers", "attentions", "mlps", "heads"),
    ),
    "gemma2": (lambda: architectures.build_causal("gemma2"), LLAMA, ("layers", "attentions", "mlps", "heads")),
    "qwen3": (lambda: architectures.build_causal("qwen3"), LLAMA, ("layers", "attentions", "mlps", "heads")),
    "qwen3_moe": (lambda: architectures.build_causal("qwen3_moe"), LLAMA, ("layers", "attentions", "mlps", "heads")),
    "bloom": (
        language_kinds.bloom,
        Parts("transformer.h", "self_attention", "mlp", "self_attention.dense", heads=4),
        ("layers", "heads"),
    ),
    "mamba": (language_kinds.mamba, Parts("backbone.layers"), ("layers",)),
    "bert": (
        language_kinds.bert,
        Parts("bert.encoder.layer", "attention", "", "attention.output.dense", heads=4),
        ("layers", "heads"),
    ),
    "gemma3n_text": (lambda: architectures.build_causal("gemma3n_text"), LLAMA, ("mlps", "heads")),
}
CASES = [(kind, sites) for kind, (_, _, known) in KINDS.items() for sites in known]
CLEAN, CORRUPTED = torch.tensor([[5, 9, 13, 22, 31, 7]]), torch.tensor([[5, 40, 13, 17, 31, 7]])
TOKENS = (11, 23)


def difference(logits):
    return logits[0, -1, TOKENS[0]] - logits[0, -1, TOKENS[1]]


@pytest.fixture(scope="module")
def nets():
    return {}


def built(nets, kind):
    if kind not in nets:
        nets[kind] = KINDS[kind][0]()
    return nets[kind]


@pytest.mark.parametrize(("kind", "sites"), CASES)
def test_equals_a_loop_with_hooks(nets, kind, sites):
    net, parts = built(nets, kind), KINDS[kind][1]
    before = footprint(net)
    metric = logit_difference(*TOKENS)
    result = activation_patching(LanguageModel(net), CLEAN, CORRUPTED, metric, sites=sites, progress=False)
    clean, corrupted = ({"input_ids": ids} for ids in (CLEAN, CORRUPTED))
    expected = patched_values(net, parts, sites, clean, corrupted, difference)
    assert torch.allclose(result.values[0].reshape(expected.shape), expected, atol=2e-5)
    with torch.no_grad():
        ends = difference(net(CLEAN).logits), difference(net(CORRUPTED).logits)
    assert torch.allclose(torch.stack(ends), torch.cat([result.clean_metric, result.corrupted_metric]), atol=1e-5)
    assert expected.std() > 1e-5  # the sites make a difference
    assert footprint(net) == before


def test_t5():
    """The decoder's sites at the decoder's tokens, and the encoder's at the encoder's."""
    net = language_kinds.t5()
    begun = torch.tensor([[0, 8, 12]])
    model, metric = LanguageModel(net), logit_difference(*TOKENS)
    clean, corrupted = ({"input_ids": ids, "decoder_input_ids": begun} for ids in (CLEAN, CORRUPTED))
    result = activation_patching(model, CLEAN, CORRUPTED, metric, decoder_input_ids=begun, progress=False)
    expected = patched_values(net, Parts("decoder.block"), "layers", clean, corrupted, difference)
    assert torch.allclose(result.values[0], expected, atol=2e-5)
    sites = {"sites": "encoder.block[*]", "positions": "each"}
    result = activation_patching(model, CLEAN, CORRUPTED, metric, **sites, decoder_input_ids=begun, progress=False)
    expected = patched_values(net, Parts("encoder.block"), "layers", clean, corrupted, difference)
    assert result.values.shape == (1, 3, 6)
    assert torch.allclose(result.values[0], expected, atol=2e-5)


def test_a_vision_language_model():
    net, processor = vision_language.llava()
    assert isinstance(net, LlavaForConditionalGeneration)
    model = VisionLanguageModel((net, processor))
    image = diffusion.IMAGE
    clean, corrupted = "a red circle", "a blue circle"
    sides = [dict(model.trace(text, images=image).model_inputs.values) for text in (clean, corrupted)]
    result = activation_patching(model, clean, corrupted, logit_difference(*TOKENS), images=image, progress=False)
    parts = Parts("model.language_model.layers", "self_attn", "mlp", "self_attn.o_proj", heads=4)
    expected = patched_values(net, parts, "layers", *sides, difference)
    assert torch.allclose(result.values[0], expected, atol=2e-5)


# ---- inside the attention


def patched_gpt2(net, layer, columns, clean, corrupted):
    """Return the logits of the corrupted run with some columns of a layer's `c_attn` patched."""
    module = net.transformer.h[layer].attn.c_attn
    value = kept(net, {"input_ids": clean}, module, False)

    def change(given):
        changed = given.clone()
        changed[..., columns] = value[..., columns]
        return changed

    return run(net, {"input_ids": corrupted}, module, change, False)


@pytest.mark.parametrize(("sites", "number"), [("q", 0), ("k", 1), ("v", 2)])
def test_queries_keys_and_values(nets, sites, number):
    net = built(nets, "gpt2")
    result = activation_patching(
        LanguageModel(net), CLEAN, CORRUPTED, difference_of, sites=sites, layers=[1], progress=False
    )
    for head in range(4):
        start = 32 * number + 8 * head
        expected = difference(patched_gpt2(net, 1, range(start, start + 8), CLEAN, CORRUPTED))
        assert torch.allclose(result.values[0, head, 0], expected, atol=2e-5)


def difference_of(result):
    return difference(result.logits)


def test_attention_probabilities(nets):
    """Patching a head's probabilities changes its output to these probabilities times its own values."""
    net = built(nets, "gpt2")
    metric, sites = logit_difference(*TOKENS), {"sites": "attention_probs", "layers": [0, 2]}
    result = activation_patching(LanguageModel(net), CLEAN, CORRUPTED, metric, **sites, progress=False)
    eager = language_kinds.gpt2(attn_implementation="eager")
    eager.load_state_dict(net.state_dict())
    with torch.no_grad():
        clean = eager(CLEAN, output_attentions=True).attentions
    for row, layer in enumerate((0, 2)):
        attention = eager.transformer.h[layer].attn
        values = kept(eager, {"input_ids": CORRUPTED}, attention.c_attn, False)[..., 64:].unflatten(-1, (4, 8))
        for head in range(4):
            mixed = clean[layer][:, head] @ values[:, :, head]

            def change(given, head=head, mixed=mixed):
                changed = given.clone()
                changed[..., 8 * head : 8 * head + 8] = mixed
                return changed

            expected = difference(run(eager, {"input_ids": CORRUPTED}, attention.c_proj, change, True))
            assert torch.allclose(result.values[0, 4 * row + head, 0], expected, atol=2e-5)


def test_heads_sum_to_the_attention(model):
    """All heads together, with the bias of the projection, are the output of the attention."""
    with torch.no_grad(), model.trace("A cat sat on the") as run:
        heads, whole = run.heads_result[1], run.attentions_output[1]
    bias = next(model.layers[1].self_attn.c_proj.modules()).bias
    assert torch.allclose(heads.sum(2) + bias, whole, atol=1e-5)


# ---- directions, pairs, positions, batches

PAIR = "The capital of France is", "The capital of Paris is"
METRIC = logit_difference(" Paris", " London")
QUIET = {"progress": False}


def test_into_the_clean_run(model):
    there = activation_patching(model, *PAIR, METRIC, **QUIET)
    back = activation_patching(model, *PAIR, METRIC, into="clean", **QUIET)
    swapped = activation_patching(model, *PAIR[::-1], METRIC, **QUIET)
    assert torch.equal(back.values, swapped.values)
    assert torch.equal(back.clean_metric, there.clean_metric)
    assert torch.equal(back.corrupted_metric, there.corrupted_metric)
    assert (back.clean, back.corrupted) == (there.clean, there.corrupted) == tuple((text,) for text in PAIR)


def test_the_divergence_is_from_the_clean_run(model):
    result = activation_patching(model, *PAIR, kl_divergence(), into="clean", **QUIET)
    assert abs(float(result.clean_metric)) < 1e-6
    assert float(result.corrupted_metric) > 1e-5
    assert torch.allclose(result.effect[-1, -1], torch.tensor(1.0), atol=0.05)


def test_all_tokens_of_a_layer_are_the_other_run(model):
    result = activation_patching(model, *PAIR, METRIC, positions="all", **QUIET)
    assert result.values.shape == (1, 4, 1)
    assert torch.allclose(result.effect, torch.ones(4, 1), atol=1e-3)
    result = activation_patching(model, *PAIR, METRIC, layers="embedding", positions="all", **QUIET)
    assert torch.allclose(result.effect, torch.ones(1, 1), atol=1e-3)


def test_several_pairs(model):
    pairs = [PAIR, ("A cat sat on the", "A king sat on the")]
    options = {"positions": [0, -1], "sites": "mlps"}
    both = activation_patching(model, *map(list, zip(*pairs)), METRIC, **options, **QUIET)
    each = [activation_patching(model, *pair, METRIC, **options, **QUIET) for pair in pairs]
    assert torch.equal(both.values, torch.cat([one.values for one in each]))
    effects = torch.stack([one.effect for one in each])
    assert torch.allclose(both.effect, effects.mean(0))
    assert torch.allclose(both.spread, effects.std(0))
    assert both.columns == ("0", "1")


@pytest.mark.parametrize("batch_size", [1, 3, 100])
@pytest.mark.parametrize("sites", ["layers", "heads", ["layers[*].mlp.act", "layers[*].self_attn.q"]])
def test_batches_change_nothing(model, sites, batch_size):
    options = {"positions": "all" if sites == "heads" else "each", **QUIET}
    plain = activation_patching(model, *PAIR, METRIC, sites=sites, **options)
    result = activation_patching(model, *PAIR, METRIC, sites=sites, batch_size=batch_size, **options)
    assert torch.allclose(plain.values, result.values, atol=1e-5)
    assert plain.values.std() > 1e-5


def test_words_of_different_lengths(model):
    """The mean over a word's tokens, or its last token, against the engine itself."""
    clean, corrupted = "The hexagon is in Paris", "The cat is in Paris"
    spans = [align_words(model.tokenizer, text) for text in (clean, corrupted)]
    taken, (place,) = spans[0]["hexagon"], spans[1]["cat"]
    assert len(taken) > 1
    with torch.no_grad(), model.trace(clean) as run:
        hidden = run.layers_output[1][0, taken.start : taken.stop].clone()
    for align, value in (("mean", hidden.mean(0)), ("last", hidden[-1])):
        result = activation_patching(
            model, clean, corrupted, METRIC, layers=1, positions=[("hexagon", "cat")], align=align, **QUIET
        )
        with torch.no_grad(), model.trace(corrupted) as run:
            run.layers_output[1][0, place] = value
            logits = run.result.logits[0, -1]
        right, wrong = model.token_id(" Paris"), model.token_id(" London")
        assert torch.allclose(result.values[0, 0, 0], logits[right] - logits[wrong], atol=1e-5)


def test_passes_are_counted(net, model):
    """Two runs without patching, one check for each layer to start at, and the passes of the rows."""
    calls = []
    handle = net.transformer.register_forward_hook(lambda *call: calls.append(call))
    result = activation_patching(model, *PAIR, METRIC, sites="mlps", batch_size=100, **QUIET)
    handle.remove()
    assert result.passes <= 2 + 4 + 4
    assert len(calls) <= result.passes  # a check ends early


def test_layers_before_the_patch_are_not_computed_again(net, model):
    """Of rows by layer, layer i computes those that are patched before it, two runs, and a check."""
    rows = [0] * 4
    handles = [
        layer.mlp.register_forward_hook(lambda module, args, output, i=i: rows.__setitem__(i, rows[i] + len(output)))
        for i, layer in enumerate(net.transformer.h)
    ]
    tokens = len(model.tokenizer(PAIR[0])["input_ids"])
    activation_patching(model, *PAIR, METRIC, sites="mlps", batch_size=tokens, **QUIET)
    for handle in handles:
        handle.remove()
    assert tokens >= 5
    assert rows == [(i + 1) * tokens + 2 + 2 for i in range(4)]


# ---- the result


def test_what_a_result_shows(model, tmp_path):
    result = activation_patching(model, *PAIR, METRIC, sites="heads", **QUIET)
    effect = (result.values[0] - result.corrupted_metric) / (result.clean_metric - result.corrupted_metric)
    assert torch.allclose(result.effect, effect)
    best = result.top(1)[0]
    assert abs(best.effect) == pytest.approx(float(effect.abs().max()))
    assert "heads_output head" in best.site
    assert isinstance(result.plot(), Figure)
    assert "capital of France" in str(result)
    names = {path.name for path in result.save(tmp_path)}
    assert names == {"lens.json", "page.html", "effects.safetensors", "effects.png"}
    record = json.loads((tmp_path / "lens.json").read_text())
    assert record["passes"] == result.passes
    assert record["call"]["function"] == "diffsight.lenses.activation_patching"


def test_a_metric_that_sees_no_difference(model):
    result = activation_patching(model, *PAIR, lambda result: 1.0, layers=0, **QUIET)
    assert not result.is_normalised
    assert result.effect.tolist() == [[0] * result.values.shape[2]]
    assert isinstance(result.plot(), Figure)


def test_a_comparison(model):
    result = activation_patching(model, *PAIR, METRIC, **QUIET)
    compared = result.compare(activation_patching(model, *PAIR, token_probability(" Paris"), **QUIET))
    pair = torch.stack([compared.first.effect.flatten(), compared.second.effect.flatten()])
    assert compared.correlation == pytest.approx(float(torch.corrcoef(pair)[0, 1]))
    assert isinstance(compared.plot(), Figure)
    other = activation_patching(model, *PAIR, METRIC, layers=0, **QUIET)
    assert "different sites" in refusal(result.compare, other)
    assert "the same kind" in refusal(result.compare, 3)


# ---- bad input


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"corrupted": "The capital of the country is"}, 'positions="words"'),
        ({"corrupted": [PAIR[1], PAIR[1]]}, "1 clean and 2 corrupted"),
        ({"clean": ""}, "empty"),
        ({"metric": logit_difference(" Paris", "Paris and London")}, "is not one token"),
        ({"metric": "logits"}, "a metric is"),
        ({"sites": "layer"}, "did you mean 'layers'"),
        ({"sites": ["layers", "heads"]}, 'pass positions="each" or "all"'),
        ({"layers": 7}, "there is no layer 7"),
        ({"heads": 0}, "none of the sites has heads"),
        ({"positions": ["Rome"]}, "does not occur"),
        ({"into": "both"}, "into must be"),
        ({"align": "first"}, "align must be"),
        ({"batch_size": 0}, "batch_size"),
        ({"max_rows": 3}, "the sweep has 20 rows"),
        ({"sites": "encoder"}, "encoder"),
        ({"steps": 3}, "steps"),
    ],
)
def test_refused_before_anything_runs(net, model, change, said):
    given = {"clean": PAIR[0], "corrupted": PAIR[1], "metric": METRIC, **QUIET, **change}
    with not_called(net.transformer.h[0]), pytest.raises((InputError, PointNotFoundError)) as error:
        activation_patching(model, **given)
    assert said in str(error.value)


def test_sweeps_over_heads_that_are_too_large(net, model):
    """At first, only the number of points is known."""
    given = {"sites": "heads", "max_rows": 3, **QUIET}
    with not_called(net.transformer.h[0]):
        assert "the sweep has at least 4 rows" in refusal(activation_patching, model, *PAIR, METRIC, **given)
    given["max_rows"] = 15
    assert "the sweep has 16 rows" in refusal(activation_patching, model, *PAIR, METRIC, **given)


def test_arrays(model):
    """Positions, layers and heads as arrays and tensors."""
    given = {"sites": "heads", **QUIET}
    result = activation_patching(
        model, *PAIR, METRIC, heads=np.array([0, -1]), layers=np.array([1]), positions=torch.tensor([0, -1]), **given
    )
    expected = activation_patching(model, *PAIR, METRIC, heads=[0, -1], layers=[1], positions=[0, -1], **given)
    assert torch.equal(result.values, expected.values) and result.sites == expected.sites


def test_a_head_that_does_not_exist(model):
    assert "there is no head 9" in refusal(activation_patching, model, *PAIR, METRIC, sites="heads", heads=9, **QUIET)


def test_a_metric_without_a_number(model):
    said = refusal(activation_patching, model, *PAIR, lambda result: result.logits[0, -1], **QUIET)
    assert "a metric must return a number" in said


@pytest.mark.parametrize("options", [{}, {"steps": "each", "max_new_tokens": 2}])
def test_a_metric_that_is_not_finite(model, options):
    """The error names the run: that of a prompt, or a row of the sweep."""
    given, numbers = (activation_patching, model, *PAIR), iter([1.0, 2.0, 3.0, float("inf")])
    said = refusal(*given, lambda result: float("nan"), **options, **QUIET)
    assert f"is nan for the prompt {PAIR[0]!r}" in said
    said = refusal(*given, lambda result: next(numbers, 0.0), **options, **QUIET)
    assert f"is inf for the prompt {PAIR[1]!r} with layers[{1 if options else 0}] changed at" in said


def test_a_site_that_is_never_reached(model, net):
    net.spare = torch.nn.Linear(2, 2)
    try:
        said = refusal(
            activation_patching, LanguageModel((net, model.tokenizer)), *PAIR, METRIC, sites="spare", **QUIET
        )
    finally:
        del net.spare
    assert "the model never reaches spare.output" in said


def test_a_module_that_is_called_several_times(net):
    """A site is one call of a module, and a list may have the same module twice."""
    twice = language_kinds.gpt2()
    twice.transformer.h = torch.nn.ModuleList([twice.transformer.h[0], twice.transformer.h[1], twice.transformer.h[0]])
    said = refusal(activation_patching, LanguageModel(twice), CLEAN, CORRUPTED, logit_difference(11, 23))
    assert "the model reaches layers[0].output 2 times in a pass with this prompt" in said


def test_other_models(sd):
    assert "takes a LanguageModel" in refusal(activation_patching, torch.nn.Linear(2, 2), "a", "b", METRIC)


# ---- steps of generation


def generated(net, parts, module, clean, corrupted, steps, count, heads=None):
    """Return the logits of each token that is generated greedily, with the source's last value in some steps."""
    kept_, logits, number = [], [], -1
    options = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "pad_token_id": 0}
    options |= {"output_logits": True, "return_dict_in_generate": True}

    def keep(_, args, output):
        kept_.append((args[0] if heads is not None else first(output))[:, -1].clone())

    def patch(changed):
        nonlocal number
        number += 1
        changed = changed.clone()
        if number in steps:
            part = slice(None) if heads is None else heads
            changed[:, -1, part] = kept_[number][:, part]
        return changed

    def hook(_, args, output):
        return with_first(output, patch(first(output)))

    handle = module.register_forward_hook(keep)
    net.generate(clean, **options)
    handle.remove()
    if heads is None:
        handle = module.register_forward_hook(hook)
    else:
        handle = module.register_forward_pre_hook(lambda _, args: (patch(args[0]), *args[1:]))
    logits = net.generate(corrupted, **options).logits
    handle.remove()
    return torch.stack(logits, 1)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["gpt2", "llama", "mamba"])
def test_steps_of_generation_equal_a_loop_with_hooks(nets, kind):
    net, parts = built(nets, kind), KINDS[kind][1]
    options = {"steps": [0, slice(1, 3), slice(0, 3)], "max_new_tokens": 3, "progress": False}
    for metric, place in ((logit_difference(*TOKENS), -1), (logit_difference(*TOKENS, position=0), 0)):
        result = activation_patching(LanguageModel(net), CLEAN, CORRUPTED[:, 1:], metric, **options)
        for layer, module in enumerate(parts.modules(net, "layers")):
            for column, steps in enumerate(([0], [1, 2], [0, 1, 2])):
                found = generated(net, parts, module, CLEAN, CORRUPTED[:, 1:], steps, 3)
                expected = difference(found[:, : found.shape[1] if place else 1])
                assert float(result.values[0, layer, column]) == pytest.approx(float(expected), abs=2e-5)
    assert result.columns == ("0", "1-2", "0-2")
    assert result.axis == "step"
    assert result.values[0].std() > 1e-4


@torch.no_grad()
def test_heads_in_steps_of_generation(nets):
    net, parts = built(nets, "gpt2"), KINDS["gpt2"][1]
    metric = logit_difference(*TOKENS)
    options = {"sites": "heads", "layers": [1], "heads": [0, 2], "max_new_tokens": 2, "batch_size": 1}
    result = activation_patching(LanguageModel(net), CLEAN, CORRUPTED, metric, **options, progress=False)
    module = parts.modules(net, "heads")[1]
    for row, head in enumerate((0, 2)):
        found = generated(net, parts, module, CLEAN, CORRUPTED, [0, 1], 2, slice(8 * head, 8 * head + 8))
        assert float(result.values[0, row, 0]) == pytest.approx(float(difference(found)), abs=2e-5)
    assert result.passes == 2 * 2 + 1 + 2 * 2  # both prompts, a trial, and two rows


@torch.no_grad()
@pytest.mark.parametrize("kind", ["gpt2", "mamba"])
def test_steps_before_the_patch_are_not_generated_again(nets, kind):
    """Rows continue from the stored keys and values of the prompt. Mamba cannot take its state back."""
    net, parts = built(nets, kind), KINDS[kind][1]
    seen, options = [], {"max_new_tokens": 4, "steps": [3], "progress": False}
    layer = parts.modules(net, "layers")[0]
    handle = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[:2].numel()))
    result = activation_patching(LanguageModel(net), CLEAN, CORRUPTED, logit_difference(*TOKENS), **options)
    handle.remove()
    rows, plain, shared = len(net.base_model.get_submodule(parts.layers.split(".")[1])), [6, 1, 1, 1], kind == "gpt2"
    assert seen == plain * 2 + ([2, rows] if shared else [rows * count for count in plain])
    assert result.passes == len(seen)


def test_refused_steps(model):
    given = (activation_patching, model, *PAIR, METRIC)
    assert "pass their number as max_new_tokens" in refusal(*given, steps="each")
    assert "omit positions and align" in refusal(*given, steps="each", max_new_tokens=2, positions=[-1])
    assert "there is no step 2" in refusal(*given, steps=[2], max_new_tokens=2)
    assert "max_new_tokens must be a positive integer" in refusal(*given, max_new_tokens=0)
    assert "the sweep has 8 rows" in refusal(*given, steps="each", max_new_tokens=2, max_rows=3)
