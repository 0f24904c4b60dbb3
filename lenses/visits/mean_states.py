"""Mean values at points for many prompts: over positions of tokens, or over the positions of an image, by step."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tqdm.auto import tqdm

from diffsight.errors import InputError
from diffsight.lenses.tokens.batches import Batch, open_batches
from diffsight.lenses.visits.named_points import NamedPoint, PointName
from diffsight.lenses.visits.steered import where_in_sequence
from diffsight.lenses.visits.visited_steps import VisitedSteps
from diffsight.lenses.visits.visiting import Visit, visiting
from diffsight.pipelines.diffusion.model import DiffusionModel
from diffsight.pipelines.diffusion.run import progress_bar
from diffsight.pipelines.language.model import LanguageModel


@dataclass(frozen=True)
class MeanStates:
    """Mean values by point.

    Attributes:
        values: The values, (prompts, features), or for a point in a denoiser (prompts, steps, features).
        timesteps: The timesteps of these steps.
    """

    values: Mapping[PointName, torch.Tensor]
    timesteps: tuple[float, ...] | None = None


def mean_states_of_tokens(
    model: LanguageModel,
    points: Sequence[NamedPoint],
    prompts: Sequence[str],
    positions: Any,
    batch_size: int,
    progress: bool,
    inputs: Mapping[str, Any],
) -> MeanStates:
    """Return the mean over positions of each prompt of a language model."""
    found: dict[PointName, list[torch.Tensor]] = {point.name: [] for point in points}
    current: list[Batch] = []

    def read(visit: Visit) -> None:
        rows, _ = current[-1].indices
        values = current[-1].pick(visit.value).detach().float().cpu()
        sums = torch.zeros(len(current[-1].tokens), values.shape[-1]).index_add(0, rows, values)
        found[visit.point.name].append(sums / rows.bincount()[:, None])

    batches = open_batches(visiting(model, points, read), prompts, positions, batch_size, **inputs)
    for batch in tqdm(batches, desc="prompts", disable=not progress or len(batches) == 1):
        current.append(batch)
        with torch.no_grad():
            batch.run.finish()
    return MeanStates({name: torch.cat(parts) for name, parts in found.items()})


@dataclass(frozen=True)
class ImagePrompts:
    """How the prompts of a pipeline are run: one batch at a time, where image *i* has the seed `seed + i`.

    Attributes:
        model: The pipeline.
        points: The points to read, all in denoisers or all in text encoders.
        positions: The positions in a sequence whose mean is taken. None means all.
        steps: The denoising steps to read. None means all.
        branch: The branch of guidance.
        batch_size: The number of prompts in a call.
        seed: The seed of the first prompt.
        progress: Whether to show a progress bar.
        arguments: Further arguments of the pipeline.
    """

    model: DiffusionModel
    points: tuple[NamedPoint, ...]
    positions: Sequence[int] | None
    steps: Sequence[int | slice] | None
    branch: str | None
    batch_size: int
    seed: int
    progress: bool
    arguments: Mapping[str, Any]

    def read(self, prompts: Sequence[str]) -> MeanStates:
        """Return the mean over positions for each prompt."""
        parts: dict[PointName, list[torch.Tensor]] = {point.name: [] for point in self.points}
        timesteps: dict[int, float] = {}
        starts = range(0, len(prompts), self.batch_size)
        for start in tqdm(starts, desc="prompts", disable=not self.progress or len(starts) == 1):
            some = list(prompts[start : start + self.batch_size])
            for name, values in self._read(some, self.seed + start, timesteps).items():
                parts[name].append(torch.stack(list(values.values()), 1))
        values = {name: torch.cat(some) for name, some in parts.items()}
        if not timesteps:
            return MeanStates({name: of[:, 0] for name, of in values.items()})
        return MeanStates(values, tuple(timesteps[step] for step in sorted(timesteps)))

    @torch.no_grad()
    def _read(
        self, prompts: list[str], seed: int, timesteps: dict[int, float]
    ) -> dict[PointName, dict[int, torch.Tensor]]:
        """Return the means of one call by point and step."""
        found: dict[PointName, dict[int, torch.Tensor]] = {point.name: {} for point in self.points}
        visited = VisitedSteps(self.steps)

        def read(visit: Visit) -> None:
            step = 0 if visit.step is None else visit.step.index
            if visit.call or not visited.include(visit):
                return
            if len(visit.value) != len(prompts):
                raise InputError(
                    f"{visit.point.name} has a batch of {len(visit.value)} for {len(prompts)} prompts: pass "
                    "batch_size=1, or choose another module"
                )
            if visit.step is not None:
                timesteps[step] = visit.step.timestep
            value = visit.value.detach().float()
            if self.positions is None:
                found[visit.point.name][step] = value.flatten(1, -2).mean(1).cpu()
            else:
                where = where_in_sequence(visit, self.positions)[..., 0]
                found[visit.point.name][step] = value[:, where].mean(1).cpu()

        copy = visiting(self.model, self.points, read, self.branch)
        given = {"prompt": prompts, "seed": list(range(seed, seed + len(prompts))), "output_type": "latent"}
        with progress_bar(self.model.pipeline, disable=True), copy.generate(**given | dict(self.arguments)) as run:
            for step in run.steps:
                if visited.are_over(self.model, self.points, run, step.index):
                    run.stop()
                    break
        missing = [name for name, values in found.items() if not values]
        if missing:
            raise InputError(f"{missing[0]} is not called in these steps: choose another module")
        return found
