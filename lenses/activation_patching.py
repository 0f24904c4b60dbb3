"""Activation patching: put one run's values into another run, one site at a time, and measure what changes.

    result = activation_patching(
        model,
        clean="The Eiffel Tower is in the city of",
        corrupted="The Colosseum is in the city of",
        metric=logit_difference(" Paris", " Rome"),
        positions=[("Eiffel Tower", "Colosseum"), -1],
        align="last",
    )
    result.effect                   # (layers, positions): 1 where the patch alone makes the model say Paris
    result.plot()

The clean run's value at a site replaces the corrupted run's value, and the rest of the model continues with it
(Vig et al., "Investigating Gender Bias in Language Models Using Causal Mediation Analysis", NeurIPS 2020; Meng et al.,
"Locating and Editing Factual Associations in GPT", NeurIPS 2022). For one layer and one token, these two runs do it:

    with model.trace(clean) as x, model.trace(corrupted) as y:
        y.layers[4].output[:, 3] = x.layers[4].output[:, 3]
        x.stop()

The lens does this for all sites and positions. Rows that are patched in the same layer share a pass, which starts from
the stored hidden state before that layer.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from tqdm.auto import tqdm

from diffsight.errors import InputError
from diffsight.lenses.denoising.inverted_images import takes_inverted
from diffsight.lenses.denoising.step_windows import Windows, choose_windows
from diffsight.lenses.layers import Layers
from diffsight.lenses.metrics.metric import Metric, Outcome
from diffsight.lenses.patching.denoiser_pairs import DenoiserPairs
from diffsight.lenses.patching.denoiser_patching import patch_pair
from diffsight.lenses.patching.generation_sweep import GenerationSweep, generate_source
from diffsight.lenses.patching.language_pair import run_side
from diffsight.lenses.patching.language_pairs import LanguagePairs
from diffsight.lenses.patching.language_sweep import LanguageSweep
from diffsight.lenses.patching.patching_request import PatchingRequest
from diffsight.lenses.patching.sweep_checks import check_omitted, check_rows
from diffsight.lenses.results.calls import repeatable
from diffsight.lenses.results.site_effects import SiteEffects
from diffsight.lenses.sites.find_sites import Sites
from diffsight.lenses.sites.position_pairs import Positions
from diffsight.lenses.sites.regions import Box
from diffsight.lenses.tokens.choosing import check_count
from diffsight.pipelines.diffusion.model import DiffusionModel
from diffsight.pipelines.language.model import LanguageModel


@takes_inverted
@repeatable
def activation_patching(
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
    batch_size: int = 32,
    max_rows: int = 20_000,
    seed: int | None = None,
    progress: bool = True,
    **arguments: Any,
) -> SiteEffects:
    """Put the clean run's values into the corrupted run, one site and position at a time, and measure the effect.

        activation_patching(model, clean, corrupted, logit_difference(" Paris", " Rome"))       # layers by tokens
        activation_patching(model, clean, corrupted, metric, sites="heads")                     # layers by heads
        activation_patching(model, clean, corrupted, metric, sites="layers[*].mlp.act", positions=["Tower", -1])
        activation_patching(pipeline, "a red circle", "a blue circle", shapes_verdict("red"), sites="unet.**.attn2",
                            steps=[slice(0, 5), slice(5, 20)], seed=3)
        activation_patching(model, clean, corrupted, metric, steps="each", max_new_tokens=5)        # layers by steps

    Args:
        model: The model or the pipeline.
        clean: The prompt whose values are put into the other run: a string, or for a language model also token ids or a
            chat. A list of prompts makes several pairs.
        corrupted: The other prompt of each pair.
        metric: A metric such as `logit_difference`, `kl_divergence`, `latent_distance` or `shapes_verdict`, or a
            function of the result of one row (see `Outcome`) that returns a number.
        sites: The sites to patch, one at a time. In a language model: "layers" (the hidden state after a layer),
            "attentions", "mlps" (their outputs), "heads" (the output of a head before the output projection), "q", "k",
            "v", "attention_probs" (of a head). In any model: paths and patterns of points. For several, pass a list.
        positions: In a language model: "each" token, "words", "all" tokens together, or a list of words, numbers of
            tokens (-1 is the last), ranges of numbers, or pairs of these, one for each prompt. Default: "each" for
            "layers", "attentions" and "mlps", "all" for other sites. In a pipeline: regions of the image, "left",
            "right", "top", "bottom" or boxes (left, top, right, bottom) as shares of width and height, or a mapping
            from names to boxes; or, in text encoders and for "k" and "v" of attention to the text, words of the
            prompt as above. Default: the whole value.
        steps: The denoising steps of a pipeline, or the tokens that a language model generates if `max_new_tokens` is
            passed: "all" together, "each" by itself, or a list whose items are steps, or slices or ranges of steps that
            are patched together. In a step of generation, the last token that the model reads is patched; in step 0,
            this is the prompt's last token. Default: "all".
        layers: The layers of named sites. Default: all.
        heads: The heads of sites that have heads. Default: each of them.
        branch: The branch of guidance that is patched, "cond" or "uncond". Default: both.
        into: "corrupted": the clean run's values go into the corrupted run. "clean": the other way round.
        align: What to do if a position has different numbers of tokens in the two prompts. "each": raise an error;
            "last": patch the last token; "mean": put the mean of one prompt's tokens into each of the other's.
        batch_size: The largest number of rows in a pass.
        max_rows: The largest number of rows in the sweep over a pair. A larger sweep is refused before it starts.
        seed: The seed of every image of a pipeline. Default: 0.
        progress: Whether to show a progress bar.
        inverted: The result of `invert` for an image, to apply the lens to that image. Omit the seed and the number
            of steps, see [inversion](../lenses/inversion.md).
        arguments: Further inputs of the model, for both prompts, or arguments of the pipeline. With `max_new_tokens`, a
            language model continues both prompts greedily by this number of tokens, and metrics read the logits of
            these tokens: their `position` counts the generated tokens.

    Returns:
        The metric and the effect by site and position.

    Raises:
        InputError: Before anything runs: a site, layer, position or token does not exist, prompts have different
            numbers of tokens where tokens are compared, the sweep is too large, or an argument belongs to models of the
            other kind. After the runs without patching: the model does not reach a site, a step or region does not
            exist, or the metric returns no number.
        PointNotFoundError: A pattern matches nothing.
    """
    batch_size = check_count("batch_size", batch_size)
    max_rows = check_count("max_rows", max_rows)
    is_pipeline = isinstance(model, DiffusionModel)
    tokens = None if is_pipeline else _tokens_to_generate(arguments, steps, positions, align)
    request = PatchingRequest(
        activation_patching, model, clean, corrupted, metric, sites, positions, heads, into, arguments
    )
    if is_pipeline:
        check_omitted("a language model", layers=layers)
        chosen = DenoiserPairs.of(request, steps=steps, branch=branch, align=align, seed=0 if seed is None else seed)
        found = [patch_pair(chosen, i, batch_size, max_rows, progress) for i in range(len(chosen.pairs))]
        return chosen.effects([swept for swept, _ in found], sum(passes for _, passes in found))
    check_omitted("a pipeline", branch=branch, seed=seed)
    if steps is not None or tokens is not None:
        return _patch_generation(
            replace(request, positions=[-1]), layers, steps, tokens, batch_size, max_rows, progress
        )
    pairs = LanguagePairs.of(request, layers=layers, align=align)
    check_rows(pairs.rows, max_rows, pairs.has_heads)
    first = run_side(pairs.pairs[0].source, pairs.metric, pairs.points)
    pairs = pairs.counted(first.values)
    check_rows(pairs.rows, max_rows)
    with tqdm(total=pairs.rows * len(pairs.pairs), desc="patching", disable=not progress) as bar:
        sweep = LanguageSweep(pairs, batch_size, bar)
        swept = [sweep.run(number, None if number else first) for number in range(len(pairs.pairs))]
    return pairs.effects(swept, sweep.passes)


def _patch_generation(
    request: PatchingRequest,
    layers: Layers,
    steps: Windows,
    tokens: int | None,
    batch_size: int,
    max_rows: int,
    progress: bool,
) -> SiteEffects:
    """Sweep over the tokens that a language model generates."""
    pairs = LanguagePairs.of(request, layers=layers, align="each")
    windows = choose_windows(steps, tokens)
    check_rows(len(pairs.sites) * len(windows), max_rows, pairs.has_heads)
    first = generate_source(pairs, 0, tokens)
    pairs = pairs.counted(first.values[0])
    rows = len(pairs.sites) * len(windows)
    check_rows(rows, max_rows)
    with tqdm(total=rows * len(pairs.pairs), desc="patching", disable=not progress) as bar:
        sweep = GenerationSweep(pairs, windows, tokens, batch_size, bar)
        swept = [sweep.run(number, None if number else first) for number in range(len(pairs.pairs))]
    return pairs.effects(swept, sweep.passes, list(windows), {"max_new_tokens": tokens})


def _tokens_to_generate(arguments: dict[str, Any], steps: Windows, positions: Any, align: str) -> int | None:
    """Take the number of tokens to generate out of the arguments for a language model.

    Raises:
        InputError: The number is missing or invalid, or positions are passed as well.
    """
    tokens = arguments.pop("max_new_tokens", None)
    if tokens is None and steps is None:
        return None
    if tokens is None:
        raise InputError(
            "the steps of a language model are the tokens that it generates: pass their number as max_new_tokens"
        )
    if positions is not None or align != "each":
        raise InputError("with steps, only the last token of a language model is patched: omit positions and align")
    return check_count("max_new_tokens", tokens)
