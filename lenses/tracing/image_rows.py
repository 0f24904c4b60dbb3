"""Draw rows in one call of a pipeline, with the same seed, and return the outcome that a metric reads."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from diffsight.lenses.encoders.drawing import for_each_row
from diffsight.lenses.metrics.metric import LATENTS, Metric, Outcome
from diffsight.lenses.results.outputs import image_of, outputs_in
from diffsight.pipelines.diffusion.model import DiffusionModel
from diffsight.pipelines.diffusion.run import progress_bar


@torch.no_grad()
def draw_rows(
    model: DiffusionModel, prompts: Sequence[str], seed: int, metric: Metric, arguments: Mapping[str, Any]
) -> Outcome:
    """Return the outcome of one call with a row for each prompt, all with the same seed."""
    latents: list[torch.Tensor] = []

    def keep(output: Any) -> None:
        latents[:] = [output[0]]

    call = {"prompt": list(prompts), "seed": [seed] * len(prompts), **for_each_row(arguments, len(prompts))}
    with progress_bar(model.pipeline, disable=True), model.generate(**call) as run:
        if LATENTS in metric.reads:
            run.follow("scheduler.step.output", keep)
    images = tuple(map(image_of, outputs_in(run.result, model.pipeline)))
    return Outcome(images=images, latents=latents[0].detach().cpu() if latents else None)


def part_of_outcome(outcome: Outcome, start: int, stop: int) -> Outcome:
    """Return some rows of an outcome."""
    latents = None if outcome.latents is None else outcome.latents[start:stop]
    return Outcome(images=outcome.images[start:stop], latents=latents)
