"""Read the vectors at points of a pipeline for a batch of prompts, at all positions or some."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch

from diffsight.errors import InputError
from diffsight.lenses.visits.named_points import NamedPoint
from diffsight.lenses.visits.steered import where_in_sequence
from diffsight.lenses.visits.visited_steps import VisitedSteps
from diffsight.lenses.visits.visiting import Visit, has_branches, visiting
from diffsight.pipelines.diffusion.model import DiffusionModel
from diffsight.pipelines.diffusion.run import progress_bar

_BRANCHES = ("cond", "uncond")
Vectors = dict[str, tuple[torch.Tensor, torch.Tensor]]  # by point: vectors and origins


@dataclass(frozen=True)
class ImageCollection:
    """The settings of a collection.

    Attributes:
        model: The pipeline.
        points: The points.
        positions: The positions in the sequence or feature map. None means all.
        sample: The number of these positions to draw at random for each prompt and step. None means all.
        steps: The denoising steps. None means all.
        branch: "cond", "uncond" or "both".
        dtype: The type of the vectors. None means the type of the model.
        seed: The seed of the first prompt; later prompts have later seeds. Positions are also drawn with it.
        arguments: Further arguments of the pipeline.
    """

    model: DiffusionModel
    points: tuple[NamedPoint, ...]
    positions: Sequence[int] | None
    sample: int | None
    steps: Sequence[int | slice] | None
    branch: str
    dtype: torch.dtype | None
    seed: int
    arguments: Mapping[str, Any]

    @torch.no_grad()
    def read(self, prompts: Sequence[str], start: int) -> Vectors:
        """Return the vectors of some prompts, numbered from `start`."""
        found: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {str(point.name): [] for point in self.points}
        copy = self.model
        for branch in _BRANCHES if self.branch == "both" else (self.branch,):
            keep = partial(self._keep, found, branch, len(prompts), start)
            for point in self.points:
                copy = visiting(copy, [point], keep, branch if has_branches(self.model, point) else None)
        seeds = list(range(self.seed + start, self.seed + start + len(prompts)))
        call = {"prompt": list(prompts), "seed": seeds, "output_type": "latent", **self.arguments}
        with progress_bar(self.model.pipeline, disable=True), copy.generate(**call) as run:
            for step in run.steps:
                if self._visited.are_over(self.model, self.points, run, step.index):
                    run.stop()
                    break
        missing = next((name for name, parts in found.items() if not parts), None)
        if missing is not None:
            raise InputError(f"{missing} is not called in these steps: choose another module")
        return {name: tuple(map(torch.cat, zip(*parts))) for name, parts in found.items()}

    @cached_property
    def _visited(self) -> VisitedSteps:
        return VisitedSteps(self.steps)

    def _keep(
        self,
        found: dict[str, list[tuple[torch.Tensor, torch.Tensor]]],
        branch: str,
        count: int,
        start: int,
        visit: Visit,
    ) -> None:
        if visit.call or not self._visited.include(visit):
            return
        if len(visit.value) != count:
            raise InputError(
                f"{visit.point.name} has a batch of {len(visit.value)} for {count} prompts: pass batch_size=1, or "
                "choose another module"
            )
        step = -1 if visit.step is None else visit.step.index
        values = visit.value.flatten(1, -2)
        for row in range(count):
            places = self._places(visit, start + row, step)
            origins = torch.tensor([[start + row, step, 0, _BRANCHES.index(branch)]]).repeat(len(places), 1)
            origins[:, 2] = places
            vectors = values[row, places.to(values.device)].to("cpu", self.dtype, copy=True)
            found[str(visit.point.name)].append((vectors, origins))

    def _places(self, visit: Visit, prompt: int, step: int) -> torch.Tensor:
        """Return the positions to read for a prompt in a step, in order."""
        if self.positions is None:
            places = torch.arange(visit.value.shape[1:-1].numel())
        else:
            places = where_in_sequence(visit, self.positions).flatten().nonzero().flatten().cpu()
        if self.sample is None or self.sample >= len(places):
            return places
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + prompt) * 1009 + step + 1)
        return places[torch.randperm(len(places), generator=generator)[: self.sample].sort().values]
