"""Draw latents as a pipeline draws its final latents: unpacked, decoded and postprocessed by its own code.

    recorder = CallRecorder(model)
    with model.generate(prompt, seed=0) as run:
        recorder.follow(run)
        for step in run.steps:
            recorder.note_step()
    draw_latents(model, recorder, latents, {"prompt": prompt, "seed": 0})

The call of the pipeline is repeated without computing its components: each is skipped and returns its earlier output.
The last `scheduler.step` then returns all latents as one batch, and the pipeline draws this batch. Where a pipeline
pastes a given image into the latents after each step, a callback replaces them again. Edits of the model and callbacks
of the user have no effect in this call.
"""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from diffsight.errors import InputError
from diffsight.lenses.results.outputs import outputs_in
from diffsight.pipelines.diffusion.components import components
from diffsight.pipelines.diffusion.latents import ending_with, with_sample
from diffsight.pipelines.diffusion.model import DiffusionModel
from diffsight.pipelines.diffusion.run import DiffusionRun, progress_bar


class CallRecorder:
    """The outputs of a pipeline's components in one run, and how often each is called up to the last step."""

    def __init__(self, model: DiffusionModel) -> None:
        parts = components(model.pipeline)
        self._names = [name for name, part in parts.items() if isinstance(part, nn.Module)]
        self._outputs: dict[str, list[Any]] = {name: [] for name in self._names}
        self._calls = dict.fromkeys(self._names, 0)
        self._before_last_step: dict[str, int] = {}
        self.steps = 0

    def follow(self, run: DiffusionRun) -> None:
        """Record a run from its beginning."""
        for name in self._names:
            run.follow(name, lambda output, name=name: self._keep(name, output))

    def note_step(self) -> None:
        """Record that the run has reached a `scheduler.step`."""
        self.steps += 1
        self._before_last_step = dict(self._calls)

    def skip(self, run: DiffusionRun) -> None:
        """Skip all calls up to the last step in another run of the same call."""
        for name, count in self._before_last_step.items():
            outputs = self._outputs[name]
            for number in range(count):
                run[name].calls[number].skip(outputs[min(number, len(outputs) - 1)])

    def _keep(self, name: str, output: Any) -> None:
        """Keep an output. If a component is called in the steps, its last output replaces the earlier one."""
        self._calls[name] += 1
        if self.steps and self._outputs[name]:
            self._outputs[name][-1] = output
        else:
            self._outputs[name].append(output)


def draw_latents(
    model: DiffusionModel,
    recorder: CallRecorder,
    latents: Sequence[torch.Tensor],
    call: Mapping[str, Any],
    batch_size: int | None = None,
) -> list[Any]:
    """Return the images, frames or sounds that the pipeline draws, one for each of the latents.

    Args:
        model: The pipeline.
        recorder: The outputs of its components in a run of the same call.
        latents: The latents to draw, each (1, ...) as the scheduler returns them.
        call: The arguments of `generate`.
        batch_size: The number of latents in a call. Default: all.
    """
    size, outputs = batch_size or max(1, len(latents)), []
    plain = model.edit(lambda run: None)
    plain.clear_edits()
    with progress_bar(model.pipeline, disable=True), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the first call has issued them
        for start in range(0, len(latents), size):
            outputs.extend(_draw(plain, recorder, latents[start : start + size], call))
    return outputs


def _draw(
    model: DiffusionModel, recorder: CallRecorder, latents: Sequence[torch.Tensor], call: Mapping[str, Any]
) -> Sequence[Any]:
    batch, step = torch.cat(list(latents)), recorder.steps - 1
    with model.generate(**{**call, **ending_with(model.pipeline, batch, step)}) as run:
        recorder.skip(run)
        last = run.scheduler.step.calls[step]
        last.output = with_sample(last.output, batch)
    drawn = outputs_in(run.result, model.pipeline)
    if len(drawn) != len(latents):
        raise InputError(
            f"{type(model.pipeline).__name__} drew {len(drawn)} images from {len(latents)} latents: pass batch_size=1"
        )
    return drawn
