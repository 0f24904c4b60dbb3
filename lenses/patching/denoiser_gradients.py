"""Attribution for one pair of prompts of a pipeline: the first-order effect of patching, from gradients.

    swept, passes = attribute_denoiser(pairs, 0, through="run")

With x the target's value at a site in a step, y the source's in the same step, and m the metric, the estimate is
m + (y - x) · dm/dx, summed over the steps of a window. Both prompts are denoised side by side.

- through="run": m is the metric of the finished run. The gradient goes through all steps that follow.
- through="step": the two prompts share the target's noisy latents in every step, and m is the metric of the latents
  after this step. The gradient goes through one step. The estimate for a window is the mean over its steps.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from diffsight.errors import InputError
from diffsight.lenses.metrics.metric import LATENTS, Outcome
from diffsight.lenses.patching.denoiser_pairs import DenoiserPairs, SweptPair
from diffsight.lenses.patching.denoiser_sweep import Change, follow_latents
from diffsight.lenses.patching.language_gradients import gradients_of
from diffsight.lenses.sites.site import Site
from diffsight.pipelines.diffusion.run import progress_bar

THROUGH = ("run", "step")


@dataclass(frozen=True)
class _ValuePair:
    """A point that both runs have passed.

    Attributes:
        point: The path of the point.
        step: The number of the step; None before the first.
        source: The value in the source's run.
        target: The value in the target's run, with a graph.
    """

    point: str
    step: int | None
    source: torch.Tensor = field(repr=False)
    target: torch.Tensor = field(repr=False)


def attribute_denoiser(pairs: DenoiserPairs, number: int, through: str) -> tuple[SweptPair, int]:
    """Return the estimates for the pair with this number, and the number of calls of the pipeline.

    Raises:
        InputError: The model does not reach a site, a step or part of a value does not exist, or the metric has no
            gradient.
    """
    rows = pairs.rows(number, (LATENTS,))
    plain = rows.run_plain(pairs.paths)
    changes = pairs.changes(number, plain)
    estimates = _Estimates(pairs, number, len(changes.sites), len(changes.columns))
    source, target = pairs.pairs[number]
    ends: dict[str, torch.Tensor] = {}
    with torch.enable_grad(), progress_bar(pairs.model.pipeline, disable=True):
        with rows.open([source]) as x, rows.open([target], grad=True) as y:
            follow_latents(x, lambda latents: ends.__setitem__("source", latents))
            follow_latents(y, lambda latents: ends.__setitem__("target", latents))
            handles = [rows.branch_of(run.rows[0]) for run in (x, y)]
            passed = _read(*handles, None, plain.early)
            for other, step in zip(x.steps, y.steps):
                found = _read(*handles, step.index, plain.calls)
                if through == "run":
                    passed += found
                    continue
                after = other.latents, step.latents
                chosen = [change for change in changes.rows if step.index in change.steps]
                estimates.add(chosen, [*passed, *found], *after, share=True)
                other.latents = step.latents = after[1].detach()
        if through == "run":
            estimates.add(changes.rows, passed, ends["source"], ends["target"])
    return SweptPair(changes, estimates.values, estimates.source, estimates.target), rows.passes + 2


class _Estimates:
    """Sums up estimates.

    Args:
        pairs: The pairs of prompts.
        number: The number of the pair.
        sites: The number of sites.
        columns: The number of columns.

    Attributes:
        values: The estimates, (sites, columns).
        source: The metric of the source's run, () or (columns,).
        target: The metric of the target's run, of the same shape.
    """

    def __init__(self, pairs: DenoiserPairs, number: int, sites: int, columns: int) -> None:
        self.values = torch.zeros(sites, columns)
        self.source = self.target = torch.zeros(())
        self._pairs, self._number, self._columns = pairs, number, columns

    def add(
        self,
        changes: Iterable[Change],
        passed: Iterable[_ValuePair],
        source: torch.Tensor,
        target: torch.Tensor,
        share: bool = False,
    ) -> None:
        """Add the estimated metric of some latents after each change.

        Args:
            changes: The changes.
            passed: The points that the runs have passed on the way to these latents.
            source: The latents of the source's run.
            target: The latents of the target's run, with a graph.
            share: Whether a column is the mean over the steps of its change. These latents then belong to one step.
        """
        changes, passed = list(changes), list(passed)
        if not changes:
            return
        metric, into = self._pairs.metric, self._pairs.request.into
        clean = Outcome(latents=source if into == "corrupted" else target.detach())
        measured = [metric.values(Outcome(latents=latents), clean, self._number) for latents in (source, target)]
        gradients = gradients_of(metric, measured[1], dict(enumerate(one.target for one in passed)), "latents")
        ends = [float(value.detach()) for value in measured]
        if not share:
            self.source, self.target = map(torch.tensor, ends)
        elif not self.source.ndim:
            self.source, self.target = torch.zeros(self._columns), torch.zeros(self._columns)
        for change in changes:
            weight = 1 / len(change.steps) if share else 1.0
            found = [
                self._change(change, one, gradients[i])
                for i, one in enumerate(passed)
                if one.point == change.site.point and (one.step is None or one.step in change.steps)
            ]
            self.values[change.place] += weight * (ends[1] + sum(found))
            if share and change.place[0] == 0:
                self.source[change.place[1]] += weight * ends[0]
                self.target[change.place[1]] += weight * ends[1]

    @torch.no_grad()
    def _change(self, change: Change, one: _ValuePair, gradient: torch.Tensor) -> float:
        """Return the estimated change of the metric from a patch at one passage of a point."""
        part, model, site = change.part, self._pairs.model, change.site
        own, index = part.place(one.target, model, site)
        moved = part.taken(one.source, model, site) - own[index]
        return float((moved * site.part(gradient)[index]).float().sum())


def _read(source: Any, target: Any, step: int | None, calls: Iterable[tuple[str, int]]) -> list[_ValuePair]:
    """Advance both runs through some calls of points, in order, and return the values.

    Raises:
        InputError: The values have different shapes.
    """
    found = []
    for point, call in calls:
        site = Site(point)
        given, own = site.read(source, call).detach().clone(), site.track(target, call)
        if given.shape != own.shape:
            raise InputError(
                f"{point} has the shape {tuple(given.shape)} for one prompt and {tuple(own.shape)} for the other: "
                "choose prompts with the same number of tokens"
            )
        found.append(_ValuePair(point, step, given, own))
    return found
