"""Activation patching of a pipeline: the rows of a sweep over sites, windows of steps and regions of the image."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import product
from typing import Any

import torch

from diffsight.lenses.denoising.step_windows import Windows, check_windows, choose_windows
from diffsight.lenses.encoders.checks import check_call, check_prompt
from diffsight.lenses.metrics.outcome import Metric, Outcome, as_metric
from diffsight.lenses.options import check_options
from diffsight.lenses.patching.denoiser_sweep import Change, DenoiserRows, PlainRun
from diffsight.lenses.patching.language_pairs import Swept
from diffsight.lenses.patching.sweep_checks import check_branch, check_into, check_rows, pair_prompts
from diffsight.lenses.results.site_effects import SiteEffects
from diffsight.lenses.sites.find_sites import Sites, find_sites, for_each_head
from diffsight.lenses.sites.regions import Box, choose_regions, region_index
from diffsight.lenses.sites.site import Site
from diffsight.pipelines.diffusion.model import DiffusionModel


def patch_denoiser(
    lens: Callable,
    model: DiffusionModel,
    clean: Any,
    corrupted: Any,
    metric: Any,
    *,
    sites: Sites,
    positions: Any,
    steps: Windows,
    heads: int | Iterable[int] | None,
    branch: str | None,
    into: str,
    batch_size: int,
    max_rows: int,
    seed: int,
    progress: bool,
    arguments: Mapping[str, Any],
) -> SiteEffects:
    """Return the effects of all sites, windows and regions. For arguments, see `activation_patching`."""
    check_options(lens, model, arguments)
    prompts = pair_prompts(clean, corrupted)
    for prompt in (*prompts[0], *prompts[1]):
        check_prompt(lens.__name__, prompt)
        check_call(lens.__name__, model, prompt, seed, batch_size, arguments)
        model.check(prompt=prompt, seed=seed, **arguments)
    check_into(into)
    check_branch(branch)
    metric = as_metric(metric).bound(model, len(prompts[0]))
    points, regions = find_sites(model, sites), choose_regions(positions)
    check_windows(steps)
    sources, targets = prompts if into == "corrupted" else prompts[::-1]
    swept, passes = [], 0
    for number, pair in enumerate(zip(sources, targets)):
        rows = DenoiserRows(model, pair, seed, arguments, metric.reads, branch)
        plain = rows.run_plain([site.point for site in points])
        chosen, columns, changes = changes_of(plain, points, heads, steps, regions)
        check_rows(len(changes), max_rows)
        measure = partial(measured, metric, plain.outcome.row(0 if into == "corrupted" else 1), number)
        source, target = measure(plain.outcome).tolist()
        values = rows.sweep(plain, changes, partial(_patch, model), measure, batch_size, progress)
        passes += rows.passes
        swept.append(Swept(values, source, target))
    return SiteEffects(
        lens=lens.__name__,
        model=model.source,
        clean=tuple(prompts[0]),
        corrupted=tuple(prompts[1]),
        into=into,
        metric=metric.name,
        sites=chosen,
        columns=columns,
        axis=axis_of(steps, positions),
        values=torch.stack([one.values for one in swept]),
        source=torch.tensor([one.source for one in swept]),
        target=torch.tensor([one.target for one in swept]),
        passes=passes,
        arguments={"seed": seed, **arguments},
    )


def changes_of(
    plain: PlainRun,
    points: Sequence[Site],
    heads: int | Iterable[int] | None,
    steps: Windows,
    regions: Mapping[str, Box | None],
) -> tuple[tuple[Site, ...], tuple[str, ...], list[Change]]:
    """Return the sites, the names of the columns, and a change for each site and column.

    Raises:
        InputError: A head or a step does not exist.
    """
    counts = {site.point: plain.shapes[site.point][site.head_dim] for site in points if site.head_dim}
    sites = for_each_head(points, counts, heads)
    columns = _columns(choose_windows(steps, plain.steps), regions)
    places = product(enumerate(sites), enumerate(columns.values()))
    changes = [Change(site, window, (i, j), box) for (i, site), (j, (window, box)) in places]
    return tuple(sites), tuple(columns), changes


def measured(metric: Metric, clean: Outcome, number: int, outcome: Outcome) -> torch.Tensor:
    """Return the metric of each row."""
    return metric.values(outcome, clean, number).float().cpu()


def _columns(
    windows: Mapping[str, tuple[int, ...]], regions: Mapping[str, Box | None]
) -> dict[str, tuple[tuple[int, ...], Box | None]]:
    """Return the window and the region of each column, by its name."""
    found = {}
    for (window, steps), (region, box) in product(windows.items(), regions.items()):
        names = [name for name, several in ((window, len(windows) > 1), (region, len(regions) > 1)) if several]
        found[", ".join(names) or (window if box is None else region)] = (steps, box)
    return found


def axis_of(steps: Windows, positions: Any) -> str:
    """Return what the columns are."""
    return "step" if positions is None else "region" if steps is None else "step and region"


def _patch(model: DiffusionModel, leading: Sequence[Any], row: Any, change: Change, call: int) -> None:
    """Put the leading row's value into a row."""
    site = change.site
    patched = site.read(row, call).clone()
    place, given = site.part(patched), site.part(site.read(leading[0], call))
    index = ... if change.region is None else region_index(place, change.region, model, site)
    place[index] = given[index]
    site.write(row, patched, call)
