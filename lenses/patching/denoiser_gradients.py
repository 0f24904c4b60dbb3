"""Attribution for one pair of prompts of a pipeline: the first-order effect of patching, from gradients.

    swept, passes = attribute_denoiser(pairs, 0, through="run")

With x the target's value at a site in a step, y the source's in the same step, and m the metric, the estimate is
m + (y - x) · dm/dx, summed over the steps of a window. Both prompts are denoised side by side.

- through="run": m is the metric of the finished run. The gradient goes through all steps that follow, one at a time.
- through="step": the two prompts share the target's noisy latents in every step, and m is the metric of the latents
  after this step. The gradient goes through one step. The estimate for a window is the mean over its steps.
"""

from collections.abc import Sequence

import torch

from diffsight.lenses.metrics.metric import LATENTS, Outcome
from diffsight.lenses.patching.checkpointed_run import CheckpointedRun
from diffsight.lenses.patching.denoiser_pairs import Changes, DenoiserPairs, SweptPair
from diffsight.lenses.patching.denoiser_sweep import Change, DenoiserRows, PlainRun
from diffsight.lenses.patching.language_gradients import check_gradient, gradients_of
from diffsight.lenses.patching.value_pairs import ValuePair, read_pairs
from diffsight.pipelines.diffusion.run import progress_bar

THROUGH = ("run", "step")


def attribute_denoiser(pairs: DenoiserPairs, number: int, through: str) -> tuple[SweptPair, int]:
    """Return the estimates for the pair with this number, and the number of calls of the pipeline.

    Raises:
        InputError: The model does not reach a site, a step or part of a value does not exist, or the metric has no
            gradient.
    """
    rows = pairs.rows(number, (LATENTS,))
    plain = rows.run_plain(pairs.paths)
    changes = pairs.changes(number, plain)
    estimates = _Estimates(pairs, number, changes)
    attribute = _through_run if through == "run" else _through_steps
    with torch.enable_grad(), progress_bar(pairs.model.pipeline, disable=True):
        passes = attribute(rows, plain, pairs.pairs[number], changes.rows, estimates)
    return SweptPair(changes, estimates.values, estimates.source, estimates.target), rows.passes + passes


def _through_run(
    rows: DenoiserRows, plain: PlainRun, prompts: Sequence[str], changes: Sequence[Change], estimates: "_Estimates"
) -> int:
    """Estimate the metric of the finished run. Return the number of calls of the pipeline."""
    run = CheckpointedRun(rows, plain, prompts)
    source, target = estimates.measure(run.source, run.target)
    estimates.source, estimates.target = source.detach(), target.detach()
    for change in changes:
        estimates.values[change.place] = estimates.target
    for passed, gradients in run.backward(target, min(change.steps[0] for change in changes)):
        for change in changes:
            estimates.add(change, passed, gradients)
    return run.passes


def _through_steps(
    rows: DenoiserRows, plain: PlainRun, prompts: Sequence[str], changes: Sequence[Change], estimates: "_Estimates"
) -> int:
    """Estimate the metric of the latents after each step. Return the number of calls of the pipeline."""
    columns = estimates.values.shape[1]
    estimates.source, estimates.target = torch.zeros(columns), torch.zeros(columns)
    with rows.open([prompts[0]]) as x, rows.open([prompts[1]], grad=True) as y:
        branches = [rows.branch_of(run.rows[0]) for run in (x, y)]
        early = read_pairs(*branches, None, plain.early)
        for other, step in zip(x.steps, y.steps):
            passed = read_pairs(*branches, step.index, plain.calls)
            chosen = [change for change in changes if step.index in change.steps]
            after = other.latents, step.latents
            if chosen:
                source, target = estimates.measure(*after)
                passed = early + passed
                gradients = gradients_of(target, [one.target for one in passed])
                for change in chosen:
                    share = 1 / len(change.steps)
                    estimates.values[change.place] += share * target.detach()
                    estimates.add(change, passed, gradients, share)
                    if change.place[0] == 0:
                        estimates.source[change.place[1]] += share * source.detach()
                        estimates.target[change.place[1]] += share * target.detach()
            other.latents = step.latents = after[1].detach()
    return 2


class _Estimates:
    """Sums up estimates.

    Args:
        pairs: The pairs of prompts.
        number: The number of the pair.
        changes: The changes.

    Attributes:
        values: The estimates, (sites, columns).
        source: The metric of the source's run, () or (columns,).
        target: The metric of the target's run, of the same shape.
    """

    def __init__(self, pairs: DenoiserPairs, number: int, changes: Changes) -> None:
        self.values = torch.zeros(len(changes.sites), len(changes.columns))
        self.source = self.target = torch.zeros(())
        self._pairs, self._number = pairs, number

    def measure(self, source: torch.Tensor, target: torch.Tensor) -> list[torch.Tensor]:
        """Return the metric of the latents of both runs, each ().

        Args:
            source: The latents of the source's run.
            target: The latents of the target's run, with a graph.

        Raises:
            InputError: The metric has no gradient.
        """
        metric, into = self._pairs.metric, self._pairs.request.into
        clean = Outcome(latents=source if into == "corrupted" else target.detach())
        ends = zip((source, target), self._pairs.names(self._number))
        found = [metric.measure(Outcome(latents=end), clean, self._number, [name])[0] for end, name in ends]
        check_gradient(metric, found[1], target, "latents")
        return found

    @torch.no_grad()
    def add(
        self, change: Change, passed: Sequence[ValuePair], gradients: Sequence[torch.Tensor], share: float = 1.0
    ) -> None:
        """Add the estimated effect of a patch at some points that both runs have passed.

        Args:
            change: The patch.
            passed: The values.
            gradients: The gradients of the metric at the target's values.
            share: A factor.
        """
        part, model, site = change.part, self._pairs.model, change.site
        for pair, gradient in zip(passed, gradients):
            if pair.point == site.point and (pair.step is None or pair.step in change.steps):
                own, index = part.place(pair.target, model, site)
                moved = part.taken(pair.source, model, site) - own[index]
                self.values[change.place] += share * float((moved * site.part(gradient)[index]).float().sum())
