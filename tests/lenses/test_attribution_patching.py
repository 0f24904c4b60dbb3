"""Attribution patching, against finite differences and against plain PyTorch's gradients."""

import pytest
import torch
from hook_patching import Parts, kept, run
from matplotlib.figure import Figure

from diffsight import LanguageModel, activation_patching, attribution_patching
from diffsight.errors import InputError
from diffsight.lenses import logit_difference
from helpers import footprint, refusal
from models import architectures, language_kinds

LLAMA = Parts("model.layers", "self_attn", "mlp", "self_attn.o_proj", heads=4)
KINDS = {
    "gpt2": (language_kinds.gpt2, Parts("transformer.h", "attn", "mlp", "attn.c_proj", heads=4)),
    "llama": (language_kinds.llama, LLAMA),
    "gemma2": (lambda: architectures.build_causal("gemma2"), LLAMA),
    "gpt_neox": (
        lambda: architectures.build_causal("gpt_neox"),
        Parts("gpt_neox.layers", "attention", "mlp", "attention.dense", heads=4),
    ),
}
CLEAN, CORRUPTED = torch.tensor([[5, 9, 13, 22, 31, 7]]), torch.tensor([[5, 40, 13, 17, 31, 7]])
METRIC = logit_difference(11, 23)
QUIET = {"progress": False}


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    build, parts = KINDS[request.param]
    return build().double(), parts


def difference(logits):
    return logits[0, -1, 11] - logits[0, -1, 23]


@pytest.mark.parametrize("sites", ["layers", "attentions", "mlps", "heads"])
def test_equals_finite_differences(kind, sites):
    """A thousandth of the patch changes the metric by a thousandth of the estimate."""
    net, parts = kind
    result = attribution_patching(LanguageModel(net), CLEAN, CORRUPTED, METRIC, sites=sites, **QUIET)
    layers, of_input, step = len(net.get_submodule(parts.layers)), sites == "heads", 1e-3
    table = result.values[0].reshape(layers, -1)
    for layer, module in enumerate(parts.modules(net, sites)):
        value = kept(net, {"input_ids": CLEAN}, module, of_input)
        for i in (1, table.shape[1] - 1):

            def moved(given, factor, value=value, i=i):
                changed = given.clone()
                if of_input:
                    a, b = (x.unflatten(-1, (parts.heads, -1))[:, :, i] for x in (changed, value))
                else:
                    a, b = changed[:, i], value[:, i]
                a += factor * (b - a)
                return changed

            ends = [
                difference(run(net, {"input_ids": CORRUPTED}, module, lambda given, f=f: moved(given, f), of_input))
                for f in (-step, step)
            ]
            slope = float(ends[1] - ends[0]) / (2 * step)
            assert float(table[layer, i] - result.corrupted_metric) == pytest.approx(slope, rel=5e-3, abs=1e-5)


def test_all_sites_come_from_the_same_passes(kind):
    net, _ = kind
    model, calls = LanguageModel(net), []
    attribution_patching(model, CLEAN, CORRUPTED, METRIC, **QUIET)
    base = net.base_model
    handle = base.register_forward_hook(lambda *call: calls.append(call))
    sites = ["layers", "attentions", "mlps", "heads", "q", "k", "v"]
    result = attribution_patching(model, CLEAN, CORRUPTED, METRIC, sites=sites, positions="each", layers=[1], **QUIET)
    handle.remove()
    assert result.passes == 2
    for name in ("layers", "heads", "q"):
        one = attribution_patching(model, CLEAN, CORRUPTED, METRIC, sites=name, positions="each", layers=[1], **QUIET)
        rows = [i for i, site in enumerate(result.sites) if site in one.sites]
        assert torch.allclose(result.values[:, rows], one.values, atol=1e-6)


def test_nothing_is_left_behind(kind):
    net, _ = kind
    before = footprint(net)
    attribution_patching(LanguageModel(net), CLEAN, CORRUPTED, METRIC, sites="q", **QUIET)
    assert footprint(net) == before
    assert all(parameter.grad is None for parameter in net.parameters())


def test_weights_without_gradients(kind):
    net, _ = kind
    model = LanguageModel(net)
    plain = attribution_patching(model, CLEAN, CORRUPTED, METRIC, **QUIET)
    net.requires_grad_(False)
    try:
        frozen = attribution_patching(model, CLEAN, CORRUPTED, METRIC, **QUIET)
    finally:
        net.requires_grad_(True)
    assert torch.allclose(plain.values, frozen.values)


@pytest.mark.parametrize("sites", ["q", "k"])
def test_the_correction_is_exact_up_to_the_softmax(kind, sites):
    """If what follows the probabilities is linear, the corrected estimate is what patching finds.

    With the metric taken at the output of the last layer's attention, nothing else follows."""
    net, _ = kind
    if net.config.model_type == "gemma2":
        given = LanguageModel(net), CLEAN, CORRUPTED, METRIC
        assert "as with a cap" in refusal(attribution_patching, *given, sites=sites, qk_correction=True)
        return
    model, last = LanguageModel(net), len(LanguageModel(net).layers) - 1
    with torch.no_grad(), model.trace(CORRUPTED) as trace:
        value = trace.heads_output[last]
    weights = torch.randn_like(value)

    def estimate(**options):
        return attribution_patching(
            probe, CLEAN, CORRUPTED, lambda result: result.logits.sum(), sites=sites, layers=last, positions="each",
            **options, **QUIET,
        )  # fmt: skip

    probe = model.edit(lambda run: setattr(run, "logits", linear(run)))

    def linear(run):
        seen = (run.heads_output[last] * weights).sum((1, 2, 3))
        return run.logits * 0 + seen[:, None, None] / run.logits[0].numel()

    true = activation_patching(
        probe, CLEAN, CORRUPTED, lambda result: result.logits.sum(), sites=sites, layers=last, positions="each", **QUIET
    )
    corrected, plain = estimate(qk_correction=True), estimate()
    assert torch.allclose(corrected.values, true.values, atol=1e-5)
    assert (plain.values - true.values).abs().max() > 1e-6


def test_compare(kind):
    net, _ = kind
    model = LanguageModel(net)
    estimate = attribution_patching(model, CLEAN, CORRUPTED, METRIC, **QUIET)
    compared = estimate.compare(activation_patching(model, CLEAN, CORRUPTED, METRIC, **QUIET))
    assert compared.correlation > 0.5
    assert isinstance(compared.plot(), Figure)


def test_refused(kind):
    model = LanguageModel(kind[0])
    given = (attribution_patching, model, CLEAN, CORRUPTED)
    assert "corrects queries and keys" in refusal(*given, METRIC, qk_correction=True)
    assert "has no gradient" in refusal(*given, lambda result: 1.0, **QUIET)
    with pytest.raises(InputError, match="batch_size"):
        attribution_patching(model, CLEAN, CORRUPTED, METRIC, batch_size=3)
