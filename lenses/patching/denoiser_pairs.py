"""Check the pairs of prompts, the sites and the metric for a pipeline before anything runs.

pairs = DenoiserPairs.of(request, steps="each", branch=None, align="each", seed=0)
changes = pairs.changes(0, plain)           # of the first pair: the sites, the columns, a change for each of them
pairs.effects(swept, passes)                # the result
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any, NamedTuple

import torch

from diffsight.errors import InputError
from diffsight.lenses.denoising.step_windows import Windows, check_windows, choose_windows
from diffsight.lenses.encoders.checks import check_call, check_prompt
from diffsight.lenses.metrics.metric import Metric, Outcome, as_metric
from diffsight.lenses.patching.denoiser_sweep import Change, DenoiserRows, PlainRun
from diffsight.lenses.patching.patching_request import PatchingRequest
from diffsight.lenses.patching.sweep_checks import check_branch
from diffsight.lenses.results.site_effects import SiteEffects
from diffsight.lenses.sites.find_sites import find_sites, for_each_head
from diffsight.lenses.sites.pipeline_positions import PipelinePositions, TitledPart, WholeValue
from diffsight.lenses.sites.site import Site, patched_row
from diffsight.pipelines.diffusion.model import DiffusionModel


class Changes(NamedTuple):
    """The sites, the names of the columns, and a change for each site and column."""

    sites: tuple[Site, ...]
    columns: tuple[str, ...]
    rows: list[Change]

    def named(self, prompt: str, change: Change) -> str:
        """Return what the row of a change is, for messages."""
        return patched_row(prompt, change.site, self.columns[change.place[1]])


class SweptPair(NamedTuple):
    """The measurements for one pair.

    Attributes:
        changes: The sites and columns.
        values: The metric, (sites, columns).
        source: The metric of the run that values come from, () or (columns,).
        target: The metric of the run that was changed, without the change, () or (columns,).
    """

    changes: Changes
    values: torch.Tensor
    source: torch.Tensor
    target: torch.Tensor


@dataclass(frozen=True)
class DenoiserPairs:
    """The checked arguments of patching in a pipeline.

    Attributes:
        request: The arguments.
        metric: The metric, bound to the model.
        pairs: The source and the target of each pair.
        points: The points of the sites.
        positions: The positions.
        steps: The windows of steps.
        branch: The branch of guidance that is changed.
        seed: The seed of every image.
    """

    request: PatchingRequest
    metric: Metric
    pairs: tuple[tuple[str, str], ...]
    points: tuple[Site, ...]
    positions: PipelinePositions = field(repr=False)
    steps: Windows
    branch: str | None
    seed: int

    @classmethod
    def of(
        cls, request: PatchingRequest, *, steps: Windows, branch: str | None, align: str, seed: int
    ) -> "DenoiserPairs":
        """Return the checked arguments of a lens.

        Raises:
            InputError: An argument is invalid.
        """
        model, name, arguments = request.model, request.lens.__name__, request.arguments
        pairs = request.checked_pairs()
        for prompt in (prompt for pair in pairs for prompt in pair):
            check_prompt(name, prompt)
            check_call(name, model, prompt, seed, None, arguments)
            model.check(prompt=prompt, seed=seed, **arguments)
        check_branch(branch)
        check_windows(steps)
        metric, points = as_metric(request.metric).bound(model, len(pairs)), find_sites(model, request.sites)
        positions = PipelinePositions(model, points, request.positions, align, arguments)
        return cls(request, metric, tuple(pairs), tuple(points), positions, steps, branch, seed)

    @property
    def model(self) -> DiffusionModel:
        """The model."""
        return self.request.model

    @property
    def paths(self) -> list[str]:
        """The paths of the points."""
        return [site.point for site in self.points]

    def rows(self, number: int, reads: Sequence[str] | None = None) -> DenoiserRows:
        """Return the rows of a pair, whose leading row is the source."""
        reads = self.metric.reads if reads is None else reads
        return DenoiserRows(self.model, self.pairs[number], self.seed, self.request.arguments, reads, self.branch)

    def changes(self, number: int, plain: PlainRun) -> Changes:
        """Return the changes of a pair.

        Raises:
            InputError: A head, step or word does not exist.
        """
        parts = self.positions.parts(*self.pairs[number])
        return changes_of(plain, self.points, self.request.heads, self.steps, parts)

    def clean(self, plain: Outcome) -> Outcome:
        """Return the outcome of the clean run from that of the source and the target."""
        return plain.row(0 if self.request.into == "corrupted" else 1)

    def names(self, number: int) -> list[str]:
        """Return the source and the target of a pair as messages name them."""
        return [f"the prompt {prompt!r}" for prompt in self.pairs[number]]

    def effects(self, swept: Sequence[SweptPair], passes: int) -> SiteEffects:
        """Return the result of the lens.

        Raises:
            InputError: The pairs have different numbers of positions.
        """
        sizes = sorted({len(one.changes.columns) for one in swept})
        if len(sizes) > 1:
            raise InputError(f"the pairs have {' and '.join(map(str, sizes))} positions, so they cannot be averaged")
        request, (sources, targets) = self.request, zip(*self.pairs)
        clean, corrupted = (sources, targets) if request.into == "corrupted" else (targets, sources)
        names = zip(*(one.changes.columns for one in swept))
        return SiteEffects(
            lens=request.lens.__name__,
            model=self.model.source,
            clean=clean,
            corrupted=corrupted,
            into=request.into,
            metric=self.metric.name,
            sites=swept[0].changes.sites,
            columns=tuple(each[0] if len(set(each)) == 1 else str(i) for i, each in enumerate(names)),
            axis=axis_of(self.steps, request.positions, self.positions.are_words),
            values=torch.stack([one.values for one in swept]),
            source=torch.stack([one.source for one in swept]),
            target=torch.stack([one.target for one in swept]),
            passes=passes,
            arguments={"seed": self.seed, **request.arguments},
        )


def changes_of(
    plain: PlainRun,
    points: Sequence[Site],
    heads: int | Iterable[int] | None,
    steps: Windows,
    parts: Sequence[TitledPart],
) -> Changes:
    """Return a change for each site, window of steps and part of the value.

    Raises:
        InputError: A head or a step does not exist.
    """
    counts = {site.point: plain.shapes[site.point][site.head_dim] for site in points if site.head_dim}
    sites = for_each_head(points, counts, heads)
    columns = _columns(choose_windows(steps, plain.steps), parts)
    places = product(enumerate(sites), enumerate(columns))
    changes = [Change(site, window, (i, j), part) for (i, site), (j, (_, window, part)) in places]
    return Changes(tuple(sites), tuple(title for title, _, _ in columns), changes)


def axis_of(steps: Windows, positions: Any, are_words: bool = False) -> str:
    """Return what the columns stand for."""
    place = "token" if are_words else "region"
    return "step" if positions is None else place if steps is None else f"step and {place}"


def _columns(
    windows: Mapping[str, tuple[int, ...]], parts: Sequence[TitledPart]
) -> list[tuple[str, tuple[int, ...], WholeValue]]:
    """Return the title, the steps and the part of the value of each column."""
    found = []
    for (window, steps), (title, part) in product(windows.items(), parts):
        names = [name for name, several in ((window, len(windows) > 1), (title, len(parts) > 1)) if several]
        found.append((", ".join(names) or (window if type(part) is WholeValue else title), steps, part))
    return found
