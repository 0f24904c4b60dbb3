"""The runs of a diffusion pipeline, and their steps."""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import ModularPipeline, SchedulerMixin
from diffusers.modular_pipelines import LoopSequentialPipelineBlocks, PipelineState
from greenlet import GreenletExit

from diffsight.errors import AssignmentError, InputError, OutOfOrderError
from diffsight.extending import ChangedMethod, Points, Run, Step, flow_of, keeping_attribute_errors, tree_of
from diffsight.pipelines.diffusion.batch_layouts import COND, UNCOND
from diffsight.pipelines.diffusion.branch_views import BranchView, DiffusionRow, GeneratedOutputs, rows_of
from diffsight.pipelines.diffusion.components import blocks_in, components
from diffsight.pipelines.diffusion.denoising_clock import scheduler_timestep
from diffsight.pipelines.diffusion.latents import sample_of, with_sample
from diffsight.pipelines.diffusion.pipelines_in_use import PipelineOfRun


class DiffusionStep(Step):
    """One denoising step: from the first call of the denoiser after a `scheduler.step` to the next such call."""

    def __init__(
        self, index: int, component: str, call: tuple[tuple, dict], run: Run, pipeline: Any, known: Mapping[str, Any]
    ) -> None:
        super().__init__(index, component, call)
        self._run, self._pipeline, self._known = run, pipeline, known

    @property
    def timestep(self) -> float | None:
        """The scheduler's timestep, such as 981 at the beginning of a run of Stable Diffusion.

        None if the denoiser is not passed a timestep."""
        if "timestep" in self._known:
            return self._known["timestep"]
        denoiser = getattr(self._pipeline, self.component)
        return scheduler_timestep(self._pipeline, denoiser, *self._call)

    @property
    def latents(self) -> torch.Tensor:
        """The latents at the end of the step, as `scheduler.step` returns them. Assignable.

        Reading them runs the model up to there. The next step begins with them, unless the pipeline puts parts of a
        given image into them first, as pipelines for inpainting do. Some pipelines pack latents: `model.decode` unpacks
        and decodes them.

        Raises:
            AssignmentError: The assigned value is not a tensor, or does not fit.
            OutOfOrderError: The model has passed them, or the loop is no longer in this step.
            InputError: The pipeline has several schedulers, or none.
        """
        return sample_of(self._scheduler_call().output)

    @latents.setter
    def latents(self, value: torch.Tensor) -> None:
        if not isinstance(value, torch.Tensor):
            fill = f". To fill them, write step.latents[:] = {value}" if isinstance(value, (bool, int, float)) else ""
            raise AssignmentError(f"step.latents are a Tensor; they cannot take a {type(value).__name__}{fill}")
        call = self._scheduler_call()
        call.output = with_sample(call.output, value)

    def _scheduler_call(self) -> Points:
        """Return the call of `scheduler.step` that ends this step."""
        scope = flow_of(self._run).scope
        if not scope.in_step or scope.step != self.index:
            raise OutOfOrderError(
                f"the latents of step {self.index} were asked for too late: the loop has left the step"
            )
        names = [name for name, part in components(self._pipeline).items() if isinstance(part, SchedulerMixin)]
        if len(names) != 1:
            raise InputError(
                f"{tree_of(self._run).title} has {', '.join(names) or 'no scheduler'}: read the latents at "
                "a point such as run.scheduler.step.output"
            )
        return self._run[names[0]].step


class DiffusionRun(GeneratedOutputs, Run):
    """A run of a diffusion pipeline."""

    _called: PipelineOfRun | None = None  # None if the run does not call the pipeline
    _output: str | None = None  # the only value that a modular pipeline was asked to return

    def __getitem__(self, key: int | str | slice) -> Any:
        if not isinstance(key, str):  # the components of a pipeline have names, not numbers
            raise InputError(f"a run has no part {key!r}: its images are run.images, and the parts of a batch run.rows")
        return super().__getitem__(key)

    @property
    def steps(self) -> Any:
        """The denoising steps, as the pipeline enters them.

        Raises:
            InputError: No component of the pipeline is known to begin a step.
        """
        if not flow_of(self._pass).clock.starts:
            raise InputError(
                f"the steps of {tree_of(self).title} cannot be counted, because none of its components takes a "
                "timestep. Read values on the run itself, and use .calls[i] for later calls"
            )
        return super().steps

    @property
    def rows(self) -> tuple[DiffusionRow, ...]:
        """One view per prompt: `a, b = run.rows`. Each has `num_images_per_prompt` images."""
        return rows_of(self._pass, flow_of(self._pass).observer)

    @property
    def cond(self) -> BranchView:
        """The run narrowed to the conditional branch of guidance, or the whole run if guidance is off."""
        return BranchView(self._pass, flow_of(self._pass).observer, COND)

    @property
    def uncond(self) -> BranchView:
        """The run narrowed to the unconditional branch of guidance, which encodes the negative prompt."""
        return BranchView(self._pass, flow_of(self._pass).observer, UNCOND)

    def _make_step(self, index: int, path: str, call: tuple[tuple, dict]) -> DiffusionStep:
        pipeline = tree_of(self).root.owner if self._called is None else self._called.pipeline
        return DiffusionStep(index, path, call, self, pipeline, flow_of(self).known_of_step)

    def _own_copy(self, part: Any) -> Any:
        return part if self._called is None else self._called.copies.get(id(part), part)

    def _of_result(self, name: str) -> Any:
        self._check_one_pass(name)
        self._check_no_scan(name)
        with keeping_attribute_errors(self):
            result = self.result
        if isinstance(result, tuple):  # the pipeline was called with return_dict=False
            return result[0]
        if isinstance(result, PipelineState):
            result = result.values
        elif isinstance(self._output, str):
            result = {self._output: result}
        if not isinstance(result, Mapping):
            title, kind = type(self._model.pipeline).__name__, type(result).__name__
            raise InputError(f"{title} returns {kind}, which has no names: read run.result")
        if name == "frames" and "videos" in result:  # in modular pipelines
            name = "videos"
        if name == "images" and "image" in result and not isinstance(self.result, PipelineState):
            name = "image"  # Kandinsky 5
        if name not in result:
            raise InputError(f"{type(self.result).__name__} has no {name}; it has {', '.join(result)}")
        return result[name]


def set_pipeline(run: DiffusionRun, called: PipelineOfRun, output: str | list[str] | None) -> None:
    """Tell a run which pipeline it calls, and which outputs a modular pipeline was asked to return."""
    run._called, run._output = called, output


def is_silenced(pipeline: Any) -> bool:
    """Return whether the user turned progress bars off: `model.set_progress_bar_config(disable=True)`."""
    bars = with_progress_bars(pipeline)
    return bool(bars) and all(getattr(part, "_progress_bar_config", {}).get("disable") for part in bars)


@contextmanager
def progress_bar(pipeline: Any, **settings: Any) -> Iterator[None]:
    """Change the settings of a pipeline's progress bar for the duration of a block.

    The settings are those of tqdm: `with progress_bar(pipeline, disable=True):`. A bar that the user turned off stays
    off."""
    shown = [(part, getattr(part, "_progress_bar_config", {})) for part in with_progress_bars(pipeline)]
    for part, before in shown:
        kept = {"disable": True} if before.get("disable") else {}
        part.set_progress_bar_config(**{**before, **settings, **kept})
    try:
        yield
    finally:
        for part, before in shown:
            part.set_progress_bar_config(**before)


class ProgressBars:
    """The progress bars that a pipeline shows during a run. The run may end before they are at 100 %."""

    def __init__(self) -> None:
        self._open: set[int] = set()  # by id
        self._has_shown_one = False

    @property
    def are_closed(self) -> bool:
        """Whether the loops for which the pipeline has shown a bar have ended."""
        return self._has_shown_one and not self._open

    @contextmanager
    def watched(self, pipeline: Any) -> Iterator[None]:
        """Watch the bars of a pipeline in the block. Those of a run that is stopped or dropped are removed, instead of
        being left below 100 %."""
        changed = [ChangedMethod(part, "progress_bar", self._watching) for part in with_progress_bars(pipeline)]
        try:
            yield
        finally:
            for method in changed:
                method.remove()

    def _watching(self, progress_bar: Callable[..., Any]) -> Callable[..., Any]:
        """Return the `progress_bar` method of a pipeline, with bars that tell when they are closed."""
        # A copy of a pipeline whose bars are watched has the method that watches them.
        progress_bar = getattr(progress_bar, "unwatched", progress_bar)

        def watching(*args: Any, **kwargs: Any) -> Any:
            bar = progress_bar(*args, **kwargs)
            close = bar.close

            def closing() -> None:
                if isinstance(sys.exc_info()[1], (GreenletExit, GeneratorExit)):
                    bar.leave = False
                close()
                self._open.discard(id(bar))

            bar.close = closing
            self._open.add(id(bar))
            self._has_shown_one = True
            return bar

        watching.unwatched = progress_bar
        return watching


def with_progress_bars(pipeline: Any) -> list[Any]:
    """Return the pipeline or, if it is modular, its blocks that loop over timesteps."""
    if not isinstance(pipeline, ModularPipeline):
        return [pipeline]
    return [block for block in blocks_in(pipeline._blocks) if isinstance(block, LoopSequentialPipelineBlocks)]
