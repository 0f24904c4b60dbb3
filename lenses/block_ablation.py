"""Block ablation: leave parts of a denoiser out, one at a time, and measure how much the image changes.

    result = block_ablation(model, "a red circle above a blue square", sites="transformer.transformer_blocks[*]")
    result.effect                   # (sites, windows of steps): pixel distance from the plain image
    result.plot()

If the image stays the same without a part, the part is not needed. Avrahami et al. ("Stable Flow: Vital Layers for
Training-Free Image Editing", CVPR 2025, section 3.2) call one minus the similarity of the images the vitality of a
layer.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from diffsight.errors import InputError
from diffsight.lenses.denoising.inverted_images import takes_inverted
from diffsight.lenses.denoising.step_windows import Windows, check_windows
from diffsight.lenses.encoders.checks import check_call
from diffsight.lenses.metrics.image_metrics import pixel_distance
from diffsight.lenses.metrics.metric import Metric, Outcome, as_metric
from diffsight.lenses.options import check_options
from diffsight.lenses.patching.denoiser_pairs import axis_of, changes_of
from diffsight.lenses.patching.denoiser_sweep import Change, DenoiserRows
from diffsight.lenses.patching.sweep_checks import check_branch, check_rows
from diffsight.lenses.results.calls import repeatable
from diffsight.lenses.results.site_effects import SiteEffects
from diffsight.lenses.sites.find_sites import Sites, find_sites
from diffsight.lenses.sites.pipeline_positions import WholeValue
from diffsight.lenses.tokens.batches import as_prompts
from diffsight.lenses.tokens.choosing import check_count
from diffsight.pipelines.diffusion.model import DiffusionModel

MODES = ("skip", "zero", "mean")


@takes_inverted
@repeatable
def block_ablation(
    model: DiffusionModel,
    prompts: str | Sequence[str],
    metric: Metric | Callable[[Outcome], Any] | None = None,
    *,
    sites: Sites,
    mode: str = "skip",
    steps: Windows = None,
    branch: str | None = None,
    batch_size: int = 32,
    max_rows: int = 20_000,
    seed: int = 0,
    progress: bool = True,
    **arguments: Any,
) -> SiteEffects:
    """Leave out one part of the denoiser in one window of steps at a time, and measure the image.

        block_ablation(model, prompt, sites="unet.**.attentions[*]")
        block_ablation(model, prompt, shapes_verdict("red circle"), sites="unet.**.attn2", mode="zero",
                       steps=[slice(0, 5), slice(5, 20)])

    Args:
        model: The pipeline.
        prompts: One prompt or several.
        metric: A metric of images, or a function of the result of one row that returns a number. Distances are from the
            image that is drawn without ablation. Default: `pixel_distance()`.
        sites: Paths and patterns of modules.
        mode: "skip": the module returns its input, so a block of a residual stream adds nothing. "zero": it
            returns zeros, so a part that is added to the stream, such as an attention, adds nothing. "mean": it returns
            the mean of its output over positions.
        steps: The denoising steps: "all" together, "each" by itself, or a list whose items are steps, or slices or
            ranges of steps in which the part is left out. Default: "all".
        branch: The branch of guidance, "cond" or "uncond". Default: both.
        batch_size: The largest number of rows in a call of the pipeline.
        max_rows: The largest number of rows in the sweep over a prompt. A larger sweep is refused.
        seed: The seed of every image.
        progress: Whether to show a progress bar.
        inverted: The result of `invert` for an image, to apply the lens to that image. Omit the seed and the number
            of steps, see [inversion](../lenses/inversion.md).
        arguments: Arguments of the pipeline.

    Returns:
        The metric by prompt, site and window. The effect is its difference from the image without ablation.

    Raises:
        InputError: An argument is invalid; the model does not reach a site; or a module cannot be skipped, because its
            output does not have the shape of its input or, with `branch`, because one of its inputs cannot be divided
            into branches.
        PointNotFoundError: A pattern matches nothing.
    """
    texts = as_prompts(prompts)
    for prompt in texts:
        check_call("block_ablation", model, prompt, seed, batch_size, arguments)
        check_options(block_ablation, model, arguments)
        model.check(prompt=prompt, seed=seed, **arguments)
    if mode not in MODES:
        raise InputError(f"mode must be one of {', '.join(map(repr, MODES))}, not {mode!r}")
    check_branch(branch)
    max_rows = check_count("max_rows", max_rows)
    metric = as_metric(pixel_distance() if metric is None else metric).bound(model, len(texts))
    points = find_sites(model, sites)
    wrong = next((site.point for site in points if site.value != "output"), None)
    if wrong is not None:
        raise InputError(f"to leave out a module, pass its path, not the path of one of its values: {wrong}")
    check_windows(steps)
    values, targets, passes = [], [], 0
    for number, prompt in enumerate(texts):
        rows = DenoiserRows(model, [prompt], seed, arguments, metric.reads, branch)
        plain = rows.run_plain([site.point for site in points])
        changes = changes_of(plain, points, None, steps, [("", WholeValue())])
        check_rows(len(changes.rows), max_rows)
        measure, name = partial(metric.measure, clean=plain.outcome, pair=number), f"the prompt {prompt!r}"
        targets.append(measure(plain.outcome, rows=[name]).item())
        apply, named = partial(_ablate, mode), partial(changes.named, name)
        found = torch.full((len(changes.sites), len(changes.columns)), torch.nan)
        for apart in _without_nesting(changes.rows) if mode == "skip" else [changes.rows]:
            swept = rows.sweep(plain, apart, apply, measure, named, batch_size, progress)
            for change in apart:
                found[change.place] = swept[change.place]
        values.append(found)
        passes += rows.passes
    return SiteEffects(
        lens="block_ablation",
        model=model.source,
        clean=tuple(texts),
        corrupted=(),
        into="clean",
        metric=metric.name,
        sites=changes.sites,
        columns=changes.columns,
        axis=axis_of(steps, None),
        values=torch.stack(values),
        source=torch.zeros(len(texts)),
        target=torch.tensor(targets),
        passes=passes,
        arguments={"mode": mode, "seed": int(seed), **arguments},
    )


def _without_nesting(changes: Sequence[Change]) -> list[list[Change]]:
    """Return changes in groups without modules inside one another.

    A pass cannot skip both, since it reads the input of the outer one once it has left the inner one."""
    modules = {change.site.module for change in changes}
    groups: dict[int, list[Change]] = {}
    for change in changes:
        depth = sum(change.site.module.startswith((f"{outer}.", f"{outer}[")) for outer in modules)
        groups.setdefault(depth, []).append(change)
    return list(groups.values())


def _ablate(mode: str, run: Any, leading: Sequence[Any], row: Any, change: Change, call: int) -> None:
    """Replace the output of a module in one row."""
    path = change.site.module
    of_all, of_row = (part[path].calls[call] if call else part[path] for part in (run, row))
    if mode == "skip":
        of_row.output = _skipped(path, of_all, of_row)
    else:
        of_row.output = _mapped(of_row.output, torch.zeros_like if mode == "zero" else _mean)


def _skipped(path: str, of_all: Any, of_row: Any) -> Any:
    """Return what a module returns in a row if it is skipped.

    The inputs are those of all rows: they may hold values that have no rows, such as rotary embeddings. All rows skip
    the module for a moment, which shows the part of the row.

    Raises:
        InputError: The module cannot be skipped.
    """
    try:
        inputs = of_all.inputs
    except InputError as error:
        raise InputError(
            f'{path} cannot be skipped in one branch ({error}). Omit branch, or pass mode="zero"'
        ) from error
    given = _tensors(inputs)
    output = of_all.output
    returned = _tensors(output)
    if given and len(returned) == 1 and _fits(given[0], returned[0]):  # rotary embeddings may have this shape too
        given = given[:1]
    of_all.output = _mapped(output, partial(_given_for, path, given))
    skipped = of_row.output
    of_all.output = output
    return skipped


def _tensors(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def _fits(given: torch.Tensor, output: torch.Tensor) -> bool:
    return given.shape == output.shape and given.dtype == output.dtype


def _mapped(output: Any, function: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Return a module's output with a function applied to each tensor that the module returned directly."""
    if isinstance(output, torch.Tensor):
        return function(output)
    if isinstance(output, Mapping):
        return type(output)(**{name: _mapped(item, function) for name, item in output.items()})
    if isinstance(output, (tuple, list)):
        return type(output)(_mapped(item, function) if isinstance(item, torch.Tensor) else item for item in output)
    return output


def _given_for(path: str, given: Sequence[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
    """Return the input that has the same shape as an output.

    Raises:
        InputError: No input has this shape, or several inputs have it.
    """
    fitting = [tensor for tensor in given if _fits(tensor, output)]
    if len(fitting) != 1:
        found = "none of its inputs has" if not fitting else f"{len(fitting)} of its inputs have"
        raise InputError(
            f"{path} cannot be skipped: it returns a tensor of the shape {tuple(output.shape)}, and {found} this "
            'shape. Choose modules inside it, or pass mode="zero"'
        )
    return fitting[0]


def _mean(output: torch.Tensor) -> torch.Tensor:
    """Return a feature map or sequence (batch, tokens, features) with the mean over positions at every position."""
    dims = (2, 3) if output.ndim == 4 else (1,)
    return output.mean(dims, keepdim=True).expand_as(output) if output.ndim > 2 else output
