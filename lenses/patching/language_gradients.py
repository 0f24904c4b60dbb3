"""Attribution for one pair of prompts: the first-order effect of patching at every site, from one backward pass.

    attribute_pair(pairs, 0, qk_correction=False)           # Swept: an estimate for each site and column

With x the target's value at a site, y the source's, and m the metric, the estimate is m + (y - x) · dm/dx.

Queries and keys act through a softmax. Where it is saturated, the gradient is nearly 0 although a patch would change
much. With the correction, the softmax is computed with the patched query or key, and only the rest of the model is
linearized: m + (softmax(patched) - softmax) · dm/dprobabilities (Kramár et al., "AtP*", 2024, section 3.1.1).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from diffsight.errors import InputError
from diffsight.lenses.encoders.columns import Column
from diffsight.lenses.metrics.metric import Metric, Outcome
from diffsight.lenses.patching.language_pair import LanguagePair, Passed, check_values, run_side
from diffsight.lenses.patching.language_pairs import LanguagePairs, Swept
from diffsight.lenses.sites.site import Site
from diffsight.pipelines.attention.attention_probabilities import AttentionProduct

_CORRECTED = ("q", "k")
PASSES = 2  # forward passes for each pair


@dataclass(frozen=True)
class Backward:
    """The values kept from the target's run.

    Attributes:
        outcome: The outcome.
        values: The values at points, by their paths.
        gradients: The gradients of the metric, of the same shapes.
        products: The attention products, by the path of the module.
    """

    outcome: Outcome
    values: Mapping[str, torch.Tensor] = field(repr=False)
    gradients: Mapping[str, torch.Tensor] = field(repr=False)
    products: Mapping[str, AttentionProduct] = field(repr=False)


def attribute_pair(pairs: LanguagePairs, number: int, qk_correction: bool, source: Passed | None = None) -> Swept:
    """Return the estimates for the pair with this number.

    Args:
        pairs: The pairs of prompts, the sites and the metric.
        number: The number of the pair.
        qk_correction: Whether queries and keys are corrected.
        source: The run of its source, if it has already run.

    Raises:
        InputError: The model does not reach a site, or the metric has no gradient.
    """
    pair = pairs.pairs[number]
    corrected = {site.module for site in pairs.sites if qk_correction and site.value in _CORRECTED}
    source = source or run_side(pair.source, pairs.metric, pairs.points)
    check_values(pair, source.values, pairs.sites)
    target = _backward(pairs, number, source, corrected)
    ends = pairs.baselines(number, source.outcome, target.outcome)
    values = torch.tensor(
        [[_estimate(site, column, pair, source, target, corrected) for column in pair.columns] for site in pairs.sites]
    )
    return Swept(ends[1] + values, *ends)


def _backward(pairs: LanguagePairs, number: int, source: Passed, corrected: set[str]) -> Backward:
    """Run the target forwards and backwards."""
    pair, metric = pairs.pairs[number], pairs.metric
    probabilities = {module: Site(f"{module}.attention_probs") for module in corrected}
    leaves: dict[str, torch.Tensor] = {}
    products: dict[str, AttentionProduct] = {}
    with torch.enable_grad(), pair.target.open(metric, grad=True) as run:
        for module in corrected:
            run.follow(f"{module}.attention_product", lambda product, m=module: products.setdefault(m, product))
        for point in source.values:
            site = Site(point)
            leaves[point] = site.track(run)
            later = [other for other in source.values if other.startswith(f"{site.module}.") and other not in leaves]
            if site.module in corrected and not any(Site(other).value in _CORRECTED for other in later):
                leaves[f"{site.module}.attention_probs"] = probabilities[site.module].track(run)
        outcome = Outcome(logits=run.result.logits)
        clean = source.outcome if pairs.into == "corrupted" else Outcome(logits=outcome.logits.detach())
        measured = metric.values(outcome, clean, number).sum()
        check_gradient(metric, measured, outcome.logits, "logits")
        gradients = dict(zip(leaves, gradients_of(measured, list(leaves.values()))))
    values = {point: leaf.detach() for point, leaf in leaves.items()}
    again = {module: _computed_again(product, module) for module, product in products.items()}
    return Backward(Outcome(logits=outcome.logits.detach()), values, gradients, again)


def check_gradient(metric: Metric, value: torch.Tensor, outcome: torch.Tensor, reads: str) -> None:
    """Check that a metric has a finite gradient at the outcome of a run.

    Args:
        metric: The metric.
        value: Its value, ().
        outcome: The logits or latents that it was computed from, with a graph.
        reads: Their name in the result that a user's function takes.

    Raises:
        InputError: It has none.
    """
    if not value.requires_grad:
        raise InputError(
            f"the metric {metric.name} has no gradient: compute it from result.{reads} with PyTorch, and return a "
            "tensor"
        )
    (gradient,) = gradients_of(value, [outcome])
    if not gradient.isfinite().all():
        raise InputError(
            f"the gradient of the metric {metric.name} is not finite in the run that values are put into. For "
            'example, a distance from the clean run has none in the clean run itself: pass into="corrupted"'
        )


def gradients_of(value: torch.Tensor, at: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return the gradients of a value, (), at some tensors: 0 where it does not depend on them. The graph is kept."""
    found = torch.autograd.grad(value, list(at), allow_unused=True, retain_graph=True)
    return [torch.zeros_like(tensor) if gradient is None else gradient for tensor, gradient in zip(at, found)]


@torch.no_grad()
def _computed_again(product: AttentionProduct, module: str) -> AttentionProduct:
    """Return a product whose probabilities are computed from its queries and keys.

    Raises:
        InputError: The module computes the probabilities in an unknown way.
    """
    if product.computed is None:
        return product
    again = replace(product, mask=product.computed > 0, computed=None)
    if not torch.allclose(again.probabilities().float(), product.computed.float(), atol=1e-4):
        raise InputError(
            f"qk_correction: {module} changes the scores before the softmax, as with a cap, so the softmax "
            "cannot be computed again: omit qk_correction"
        )
    return again


@torch.no_grad()
def _estimate(
    site: Site, column: Column, pair: LanguagePair, source: Passed, target: Backward, corrected: set[str]
) -> float:
    """Return the estimated change of the metric from a patch."""
    taken, place = pair.spans(column)
    given = site.part(source.values[site.point], taken)
    if pair.align == "mean" and taken is not None:
        given = given.mean(site.token_dim_of_part, keepdim=True)
    own = target.values[site.point]
    if site.module in corrected and site.value in _CORRECTED:
        patched = own.clone()
        site.part(patched, place).copy_(given)
        product = target.products[site.module]
        changed = replace(product, **{site.value: patched.transpose(1, 2)})
        change = changed.probabilities() - product.probabilities()
        return float((change * target.gradients[f"{site.module}.attention_probs"]).float().sum())
    change = given - site.part(own, place)
    return float((change * site.part(target.gradients[site.point], place)).float().sum())


def check_correction(sites: Sequence[Site], qk_correction: bool) -> None:
    """Raise InputError if there is nothing to correct."""
    if qk_correction and not any(site.value in _CORRECTED for site in sites):
        raise InputError('qk_correction corrects queries and keys: choose sites=["q", "k"], or omit it')
