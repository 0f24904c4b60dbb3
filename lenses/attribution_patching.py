"""Attribution patching: estimate what activation patching would find, for all sites from one backward pass.

    estimate = attribution_patching(model, clean, corrupted, logit_difference(" Paris", " Rome"), sites="heads")
    estimate.plot()
    estimate.compare(activation_patching(model, clean, corrupted, metric, sites="heads")).plot()

To first order, putting the clean value at a site into the corrupted run changes the metric by (clean - corrupted)
times the gradient of the metric at the site. Two forward passes and one backward pass give this for all sites (Nanda,
"Attribution Patching: Activation Patching At Industrial Scale", 2023; Kramár et al., "AtP*: An efficient and scalable
method for localizing LLM behaviour to components", 2024).
"""

from collections.abc import Callable, Iterable
from typing import Any

from tqdm.auto import tqdm

from diffsight.lenses.layers import Layers
from diffsight.lenses.metrics.outcome import Metric, Outcome
from diffsight.lenses.patching.language_pairs import LanguagePairs
from diffsight.lenses.patching.site_gradients import PASSES, attribute_pair, check_correction
from diffsight.lenses.results.calls import repeatable
from diffsight.lenses.results.site_effects import SiteEffects
from diffsight.lenses.sites.find_sites import Sites
from diffsight.lenses.sites.positions import Positions
from diffsight.pipelines.language.model import LanguageModel


@repeatable
def attribution_patching(
    model: LanguageModel,
    clean: Any,
    corrupted: Any,
    metric: Metric | Callable[[Outcome], Any],
    *,
    sites: Sites = "layers",
    positions: Positions = None,
    layers: Layers = None,
    heads: int | Iterable[int] | None = None,
    into: str = "corrupted",
    align: str = "each",
    qk_correction: bool = False,
    progress: bool = True,
    **inputs: Any,
) -> SiteEffects:
    """Estimate the effect of each site and position of `activation_patching` from gradients.

        attribution_patching(model, clean, corrupted, logit_difference(" Paris", " Rome"), sites="heads")
        attribution_patching(model, clean, corrupted, metric, sites=["q", "k"], qk_correction=True)

    Args:
        model: The model.
        clean: As in `activation_patching`, like all arguments that are not listed here.
        corrupted: The other prompt of each pair.
        metric: A metric of tokens, or a function of the result that returns a tensor with a gradient.
        sites: What is patched, one thing at a time. All of it comes from the same passes.
        positions: The positions that are patched.
        layers: The layers of named sites.
        heads: The heads of sites that have heads.
        into: The run that gets values, at which the gradient is taken.
        align: What to do if a position has different numbers of tokens.
        qk_correction: Compute the softmax of attention with the patched query or key, and only what follows it to first
            order. For "q" and "k", whose gradients are nearly 0 where the softmax is saturated (AtP*, section 3.1.1).
        progress: Whether to show a progress bar over pairs.
        inputs: Further inputs of the model, for both prompts.

    Returns:
        The estimated metric and effect by site and position.

    Raises:
        InputError: In any case in which `activation_patching` raises it; if the metric has no gradient; or if there is
            nothing to correct.
        PointNotFoundError: A pattern matches nothing.
    """
    pairs = LanguagePairs.of(
        attribution_patching,
        model,
        clean,
        corrupted,
        metric,
        sites=sites,
        positions=positions,
        layers=layers,
        heads=heads,
        into=into,
        align=align,
        inputs=inputs,
    )
    check_correction(pairs.sites, qk_correction)
    numbers = tqdm(range(len(pairs.pairs)), desc="attribution", disable=not progress or len(pairs.pairs) == 1)
    swept = [attribute_pair(pairs, number, qk_correction) for number in numbers]
    return pairs.effects("attribution_patching", swept, PASSES * len(swept))
