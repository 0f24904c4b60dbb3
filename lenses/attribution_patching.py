"""Attribution patching: estimate what activation patching would find, for all sites from one backward pass.

    estimate = attribution_patching(model, clean, corrupted, logit_difference(" Paris", " Rome"), sites="heads")
    estimate.plot()
    estimate.compare(activation_patching(model, clean, corrupted, metric, sites="heads")).plot()

    attribution_patching(pipeline, "a red circle", "a blue circle", latent_distance(), sites="unet.**.attn2",
                         steps="each", num_inference_steps=4)

To first order, putting the clean value at a site into the corrupted run changes the metric by (clean - corrupted)
times the gradient of the metric at the site. Two forward passes and one backward pass give this for all sites (Nanda,
"Attribution Patching: Activation Patching At Industrial Scale", 2023; Kramár et al., "AtP*: An efficient and scalable
method for localizing LLM behaviour to components", 2024).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from tqdm.auto import tqdm

from diffsight.errors import InputError
from diffsight.lenses.denoising.inverted_images import takes_inverted
from diffsight.lenses.denoising.step_windows import Windows
from diffsight.lenses.layers import Layers
from diffsight.lenses.metrics.metric import Metric, Outcome
from diffsight.lenses.patching.denoiser_gradients import THROUGH, attribute_denoiser
from diffsight.lenses.patching.denoiser_pairs import DenoiserPairs
from diffsight.lenses.patching.language_gradients import PASSES, attribute_pair, check_correction
from diffsight.lenses.patching.language_pair import run_side
from diffsight.lenses.patching.language_pairs import LanguagePairs
from diffsight.lenses.patching.patching_request import PatchingRequest
from diffsight.lenses.patching.sweep_checks import check_differentiable, check_omitted
from diffsight.lenses.results.calls import repeatable
from diffsight.lenses.results.site_effects import SiteEffects
from diffsight.lenses.sites.find_sites import Sites
from diffsight.lenses.sites.position_pairs import Positions
from diffsight.lenses.sites.regions import Box
from diffsight.lenses.where_models_are import check_is_here
from diffsight.pipelines.diffusion.model import DiffusionModel
from diffsight.pipelines.language.model import LanguageModel


@takes_inverted
@repeatable
def attribution_patching(
    model: LanguageModel | DiffusionModel,
    clean: Any,
    corrupted: Any,
    metric: Metric | Callable[[Outcome], Any],
    *,
    sites: Sites = "layers",
    positions: Positions | Mapping[str, Box] | Sequence[Box] = None,
    steps: Windows = None,
    layers: Layers = None,
    heads: int | Iterable[int] | None = None,
    branch: str | None = None,
    into: str = "corrupted",
    align: str = "each",
    qk_correction: bool = False,
    through: str | None = None,
    seed: int | None = None,
    progress: bool = True,
    **arguments: Any,
) -> SiteEffects:
    """Estimate the effect of each site and position of `activation_patching` from gradients.

        attribution_patching(model, clean, corrupted, logit_difference(" Paris", " Rome"), sites="heads")
        attribution_patching(model, clean, corrupted, metric, sites=["q", "k"], qk_correction=True)
        attribution_patching(pipeline, clean, corrupted, latent_distance(), sites="unet.**.attn2", steps="each")

    Args:
        model: The model or the pipeline.
        clean: As in `activation_patching`, like all arguments that are not listed here.
        corrupted: The other prompt of each pair.
        metric: A metric of tokens, `latent_distance`, or a function of the result (`result.logits`, or for a pipeline
            `result.latents`) that returns a tensor with a gradient.
        sites: The sites to patch, one at a time. The same passes serve all of them.
        positions: The positions that are patched.
        steps: The denoising steps of a pipeline.
        layers: The layers of named sites.
        heads: The heads of sites that have heads.
        branch: The branch of guidance that is patched.
        into: The run that values are put into. The gradient is taken in this run.
        align: What to do if a position has different numbers of tokens.
        qk_correction: Compute the softmax of attention exactly, with the patched query or key, and only the rest to
            first order. For "q" and "k" of language models, whose gradients are nearly 0 where the softmax is
            saturated (AtP*, section 3.1.1).
        through: For a pipeline. "run": the metric measures the finished run, and the gradient goes through all steps
            that follow. Each step is computed again for it, so this takes the memory of one step. "step": both prompts
            are denoised from the same noisy latents in every step, and the metric measures the latents after the step.
            The gradient goes through one step. Default: "run".
        seed: The seed of every image of a pipeline. Default: 0.
        progress: Whether to show a progress bar over pairs.
        inverted: The result of `invert` for an image, to apply the lens to that image. Omit the seed and the number
            of steps, see [inversion](../lenses/inversion.md).
        arguments: Further inputs of the model, for both prompts, or arguments of the pipeline.

    Returns:
        The estimated metric and effect by site and position.

    Raises:
        InputError: In all cases in which `activation_patching` raises it; also if the metric has no gradient, or there
            is nothing for `qk_correction` to correct, or the model is on a server.
        PointNotFoundError: A pattern matches nothing.
    """
    check_is_here(attribution_patching, model)
    request = PatchingRequest(
        attribution_patching, model, clean, corrupted, metric, sites, positions, heads, into, arguments
    )
    if isinstance(model, DiffusionModel):
        check_omitted("a language model", layers=layers, qk_correction=qk_correction or None)
        if through not in (None, *THROUGH):
            raise InputError(f"through must be 'run' or 'step', not {through!r}")
        chosen = DenoiserPairs.of(request, steps=steps, branch=branch, align=align, seed=0 if seed is None else seed)
        check_differentiable(chosen.metric)
        found = [attribute_denoiser(chosen, i, through or "run") for i in _numbers(chosen.pairs, progress)]
        return chosen.effects([swept for swept, _ in found], sum(passes for _, passes in found))
    check_omitted("a pipeline", steps=steps, branch=branch, through=through, seed=seed)
    pairs = LanguagePairs.of(request, layers=layers, align=align)
    check_correction(pairs.sites, qk_correction)
    first = run_side(pairs.pairs[0].source, pairs.metric, pairs.points)
    pairs = pairs.counted(first.values)
    numbers = _numbers(pairs.pairs, progress)
    swept = [attribute_pair(pairs, number, qk_correction, None if number else first) for number in numbers]
    return pairs.effects(swept, PASSES * len(swept))


def _numbers(pairs: Sequence[Any], progress: bool) -> Iterable[int]:
    """Return the numbers of the pairs, with a progress bar over them."""
    return tqdm(range(len(pairs)), desc="attribution", disable=not progress or len(pairs) == 1)
