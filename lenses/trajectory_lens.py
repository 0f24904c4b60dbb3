"""The trajectory lens: the image that a denoiser predicts at every step, before the image is finished.

    result = trajectory_lens(model, "a red circle below a blue square", seed=0)
    result.grid().save("trajectory.png")

At each step the scheduler is given the noisy latents and the denoiser's output for them. The clean latents that follow
from both (`denoising/clean_prediction.py`) are drawn in one batch by the pipeline's own code
(`denoising/latent_drawing.py`).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from PIL import Image
from safetensors.torch import save_file

from diffsight.errors import InputError
from diffsight.lenses.denoising.block_exits import block_names, exit_outputs
from diffsight.lenses.denoising.call_checks import Steps, check_one_image, check_steps_ahead, choose_steps
from diffsight.lenses.denoising.clean_prediction import SchedulerCall, prediction_type
from diffsight.lenses.denoising.inverted_images import takes_inverted
from diffsight.lenses.denoising.latent_drawing import CallRecorder, draw_latents
from diffsight.lenses.results.calls import repeatable
from diffsight.lenses.results.denoising_plots import difference_image, difference_maps, step_curves
from diffsight.lenses.results.figure import write_figure
from diffsight.lenses.results.image_grid import image_grid
from diffsight.lenses.results.outputs import files_of, image_of, media_of, outputs_in, rate_of
from diffsight.lenses.results.result import LensResult
from diffsight.lenses.results.sections import CurveSection, ImageSection, Section
from diffsight.lenses.where_models_are import where_the_model_is
from diffsight.pipelines.diffusion.components import components, text_encoder_names
from diffsight.pipelines.diffusion.model import DiffusionModel
from diffsight.pipelines.diffusion.run import DiffusionRun, progress_bar

_BRANCHES = ("cond", "uncond")
_GUIDANCE = ("guidance", "guidance map")
_COLUMNS = ("noisy", "prediction", *_BRANCHES, *_GUIDANCE)
_GIF_MILLISECONDS = 150


@dataclass(frozen=True, eq=False)
class TrajectoryLensResult(LensResult):
    """Images and latents by step.

    `save(folder)` writes `grid.png`, `norms.png`, `trajectory.gif` (the predictions), `image.png` (the finished image),
    an image for each step and column (`step_04_prediction.png`; a video also as `.gif`, a sound as `.wav`),
    `lens.safetensors` (the latents) and `lens.json`.

    Attributes:
        images: By column, one image for each of `steps`. For a video it is the middle frame, for a sound the waveform.
        latents: By column, (steps, ...), as the scheduler has them. "guidance" and "guidance map" have none.
        steps: Non-negative integers, one for each call of the scheduler.
        timesteps: The timestep of each of `steps`.
        image: The finished output of the pipeline, as an image.
        prompt: The prompt, or None.
        seed: The seed.
        model: The name of the model.
        scheduler: The class of the scheduler.
        arguments: The arguments of the pipeline.
        outputs: By column, what the pipeline draws at each of `steps`: an image, the frames of a video, or the samples
            of a sound. "guidance" and "guidance map" have none.
        output: The finished output of the pipeline.
        rate: The sampling rate of sounds in Hz.
    """

    images: Mapping[str, tuple[Image.Image, ...]] = field(repr=False)
    latents: Mapping[str, torch.Tensor] = field(repr=False)
    steps: tuple[int, ...]
    timesteps: tuple[float, ...]
    image: Image.Image = field(repr=False)
    prompt: str | None
    seed: int
    model: str
    scheduler: str
    arguments: Mapping[str, Any]
    outputs: Mapping[str, tuple[Any, ...]] = field(repr=False)
    output: Any = field(repr=False)
    rate: int | None = field(default=None, repr=False)

    @property
    def norms(self) -> dict[str, torch.Tensor]:
        """The root mean square of the latents at each step, (steps,), by column. "guidance" is the value for the
        difference between the conditional and the unconditional prediction."""
        values = dict(self.latents)
        if all(branch in values for branch in _BRANCHES):
            values["guidance"] = values["cond"] - values["uncond"]
        return {name: value.double().square().flatten(1).mean(1).sqrt() for name, value in values.items()}

    def grid(self) -> Image.Image:
        """Return all images in one: a row for each step, a column for each kind of image."""
        rows = list(zip(*self.images.values()))
        titles = [f"step {step}\nt = {time:g}" for step, time in zip(self.steps, self.timesteps)]
        heading = f"{self.prompt} (seed {self.seed})" if self.prompt else f"seed {self.seed}"
        return image_grid(rows, row_titles=titles, column_titles=list(self.images), title=heading, cell=128)

    def plot(self) -> Figure:
        """Plot the norms by step."""
        curves = {name: values.tolist() for name, values in self.norms.items()}
        return step_curves(curves, self.steps, "root mean square of the latents", self.prompt or self.model)

    def preview(self) -> Image.Image:
        return self.grid()

    def sections(self) -> list[Section]:
        steps = [f"step {step}" for step in self.steps]
        rows = {}
        for column, images in self.images.items():
            shown = zip(images, self.outputs.get(column, images))
            rows[column] = dict(zip(steps, (media_of(image, output, self.rate) for image, output in shown)))
        finished = media_of(self.image, self.output, self.rate)
        norms = {name: values.tolist() for name, values in self.norms.items()}
        places = [str(step) for step in self.steps]
        return [
            ImageSection("", rows | {"finished": {"image": finished}}),
            CurveSection("Norms", "step", places, norms, "root mean square of the latents"),
        ]

    def files(self) -> dict[str, Callable[[Path], None]]:
        files: dict[str, Callable[[Path], None]] = {"grid.png": self.grid().save, "image.png": self.image.save}
        files["norms.png"] = partial(write_figure, self.plot)
        files["trajectory.gif"] = partial(_write_gif, [*self.images.get("prediction", ()), self.image])
        files |= files_of("image", self.output, self.rate)
        for column, images in self.images.items():
            names = [f"step_{step:02}_{column.replace(' ', '_')}" for step in self.steps]
            files |= {f"{name}.png": image.save for name, image in zip(names, images)}
            for name, output in zip(names, self.outputs.get(column, ())):
                files |= files_of(name, output, self.rate)
        tensors = {name: value.contiguous() for name, value in self.latents.items()}
        return files | {"lens.safetensors": partial(save_file, tensors)}

    def record(self) -> dict[str, Any]:
        return {
            "lens": "trajectory_lens",
            "model": self.model,
            "scheduler": self.scheduler,
            "prompt": self.prompt,
            "seed": self.seed,
            "steps": list(self.steps),
            "timesteps": list(self.timesteps),
            "columns": list(self.images),
            "norms": {name: values.tolist() for name, values in self.norms.items()},
            "arguments": dict(self.arguments),
        }


@takes_inverted
@repeatable
@where_the_model_is
def trajectory_lens(
    model: DiffusionModel,
    prompt: str | None = None,
    *,
    steps: Steps = None,
    show: Sequence[str] = ("noisy", "prediction"),
    exits: str | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    progress: bool = True,
    **arguments: Any,
) -> TrajectoryLensResult:
    """Draw what the denoiser predicts at each of `steps`.

        trajectory_lens(model, "a red circle", steps=slice(None, None, 5), num_inference_steps=20)
        trajectory_lens(model, "a red circle", show=["prediction", "cond", "uncond", "guidance"], guidance_scale=3.0)
        trajectory_lens(model, "a red circle", steps=[5, 10], exits="blocks")

    The pipeline runs once. Then all latents are drawn in one batch, in which only the decoder runs. Edits of the model
    act on the run, but not on how its latents are drawn.

    Args:
        model: A pipeline with one scheduler.
        prompt: The prompt. Omit it for a pipeline without one.
        steps: Step i is call i of the scheduler, counted from 0; -1 is the last. An integer, a slice, or a list of
            them. Default: all.
        show: Which images to draw at each step, from

            - "noisy": the latents that the denoiser is given
            - "prediction": the clean latents that it predicts, after guidance
            - "cond", "uncond": the predictions of the branches of guidance
            - "guidance": the difference between these two images, centred on medium gray; not for sounds
            - "guidance map": the norm of this difference at each pixel, dark for 0, with one scale for all steps
        exits: "blocks" also draws what the conditional branch would predict if the denoiser ended at each of its
            blocks, see `denoising/block_exits.py`.
        batch_size: The number of latents to draw in a call. Default: all.
        seed: The seed.
        progress: Whether to show a progress bar.
        inverted: The result of `invert` for an image, to apply the lens to that image. Omit the seed and the number
            of steps, see [inversion](../lenses/inversion.md).
        arguments: Arguments of the pipeline.

    Returns:
        The images and latents by step.

    Raises:
        InputError: An argument is not valid, or no clean latents follow from the scheduler's prediction type; guidance
            is off, but its branches are requested; or the denoiser has no blocks at which it could end.
    """
    arguments = {**arguments, "prompt": prompt} if prompt is not None else arguments
    check_one_image(trajectory_lens, model, prompt, seed, batch_size, arguments)
    shown = _check_columns(model, show)
    prediction_type(model.pipeline.scheduler)
    _check_exits(model, exits)
    call = {**arguments, "seed": int(seed)}
    model.check(**call)
    chosen = check_steps_ahead(steps, model, call)
    reading = _StepReading(model, call, chosen, shown, exits is not None)
    with progress_bar(model.pipeline, desc="steps", disable=not progress):
        finished = reading.run()
    latents, order = reading.latents(), []
    drawn = [column for column in (*shown, *reading.exit_names) if column not in _GUIDANCE]
    drawn += [b for b in _BRANCHES if b not in drawn and set(shown) & set(_GUIDANCE)]
    pictured = {**latents, "noisy": reading.scaled} if "noisy" in shown else latents
    for column in drawn:
        order += [(column, one[None]) for one in pictured[column]]
    outputs = draw_latents(model, reading.recorder, [one for _, one in order], call, batch_size)
    found: dict[str, tuple[Any, ...]] = dict.fromkeys(drawn, ())
    for (column, _), output in zip(order, outputs):
        found[column] += (output,)
    arguments.pop("prompt", None)
    columns = [*shown, *reading.exit_names]
    return TrajectoryLensResult(
        images=_columns({column: list(map(image_of, some)) for column, some in found.items()}, columns),
        latents=latents,
        steps=reading.steps,
        timesteps=reading.timesteps,
        image=image_of(finished),
        prompt=prompt,
        seed=int(seed),
        model=model.source,
        scheduler=type(model.pipeline.scheduler).__name__,
        arguments=arguments,
        outputs={column: found[column] for column in columns if column in found},
        output=finished,
        rate=rate_of(model),
    )


class _StepReading:
    """One run of the pipeline, and what was read at the chosen steps."""

    def __init__(
        self, model: DiffusionModel, call: Mapping[str, Any], steps: Steps, shown: Sequence[str], with_exits: bool
    ) -> None:
        self.recorder = CallRecorder(model)
        self.exit_names: list[str] = []
        self.steps: tuple[int, ...] = ()
        self.timesteps: tuple[float, ...] = ()
        self._model, self._call, self._asked = model, call, steps
        self._with_branches = bool(set(shown) & {*_BRANCHES, *_GUIDANCE})
        self._with_exits = with_exits
        self._found: dict[str, list[torch.Tensor]] = {}
        self._scaled: list[torch.Tensor] = []
        self._branches: dict[str, dict[int, torch.Tensor]] = {branch: {} for branch in _BRANCHES}
        self._inputs: dict[int, tuple[tuple, dict]] = {}

    @property
    def scaled(self) -> torch.Tensor:
        """The noisy latents as the denoiser gets them, (steps, ...)."""
        return torch.cat(self._scaled)

    def latents(self) -> dict[str, torch.Tensor]:
        """Return the latents that were read, by column, (steps, ...)."""
        return {name: torch.cat(values) for name, values in self._found.items()}

    def run(self) -> Any:
        """Run the pipeline, and return what it draws."""
        model = self._model
        if self._with_branches:  # each is an edit, since either branch may come first
            for branch in _BRANCHES:
                model = model.edit(partial(self._read_branch, branch=branch))
        if self._with_exits:
            model = model.edit(self._read_inputs)
        with torch.no_grad(), model.generate(**self._call) as run:
            self.recorder.follow(run)
            for step in run.steps:
                args, kwargs = run.scheduler.step.inputs
                self.recorder.note_step()
                self._read(step.index, SchedulerCall(self._model.pipeline.scheduler, args, kwargs), step)
        if self.steps and self.recorder.steps <= self.steps[-1]:
            raise InputError(f"there is no step {self.steps[-1]}: the run ended after {self.recorder.steps} steps")
        (finished,) = outputs_in(run.result, self._model.pipeline)
        return finished

    def _read(self, index: int, call: SchedulerCall, step: Any) -> None:
        if index == 0:
            self.steps = choose_steps(self._asked, call.steps_left)
        if index not in self.steps:
            return
        self.timesteps += (float(torch.as_tensor(call.timestep).flatten()[0]),)
        self._scaled.append(call.scaled_sample)
        self._add("noisy", call.sample)
        self._add("prediction", call.predict())
        if self._with_branches:
            outputs = self._outputs_of_branches(index)
            sign = _sign_of_branches(call.output, *(call.shaped(outputs[branch]) for branch in _BRANCHES))
            for branch in _BRANCHES:
                self._add(branch, call.predict(sign * outputs[branch]))
        if self._with_exits:
            self._read_exits(index, call, step)

    def _outputs_of_branches(self, index: int) -> dict[str, torch.Tensor]:
        for branch, outputs in self._branches.items():
            if index not in outputs:
                raise InputError(
                    f"the {branch} prediction of step {index} is not known: guidance is off, or the pipeline does not "
                    'tell its branches apart. Omit "cond", "uncond", "guidance" and "guidance map" from show'
                )
        return {branch: outputs[index] for branch, outputs in self._branches.items()}

    def _read_exits(self, index: int, call: SchedulerCall, step: Any) -> None:
        denoiser = getattr(self._model.pipeline, _denoiser_of(self._model, step))
        outputs = exit_outputs(denoiser, *self._inputs.pop(index))
        self.exit_names = list(outputs)
        for name, output in outputs.items():
            self._add(name, call.predict(output))

    def _add(self, column: str, value: torch.Tensor) -> None:
        self._found.setdefault(column, []).append(value.detach().cpu())

    # ---- edits that read within a step

    def _read_branch(self, run: DiffusionRun, branch: str) -> None:
        for step in run.steps:
            output = getattr(run, branch)[_denoiser_of(self._model, step)].output
            output = output if isinstance(output, torch.Tensor) else output[0]
            if step.index in self.steps or not self.steps:
                self._branches[branch][step.index] = output.clone()

    def _read_inputs(self, run: DiffusionRun) -> None:
        part = run.cond if text_encoder_names(self._model.pipeline) else run
        for step in run.steps:
            args, kwargs = part[_denoiser_of(self._model, step)].inputs
            if step.index in self.steps or not self.steps:
                self._inputs[step.index] = args, dict(kwargs)


def _denoiser_of(model: DiffusionModel, step: Any) -> str:
    """Return the name of the component that predicts in a step. A ControlNet may have begun the step."""
    if not step.component.startswith("controlnet"):
        return step.component
    return next(name for name in ("unet", "transformer") if name in components(model.pipeline))


def _sign_of_branches(output: torch.Tensor, cond: torch.Tensor, uncond: torch.Tensor) -> int:
    """Return 1, or -1 if the pipeline negates what the denoiser returns.

    Raises:
        InputError: The scheduler's input is not a combination of the branches.
    """
    given, *parts = (value.double().flatten() for value in (output, cond, uncond))
    mixed = torch.stack(parts, 1)
    weights = torch.linalg.lstsq(mixed, given[:, None], driver="gelsd").solution
    if (mixed @ weights - given[:, None]).norm() > 0.02 * given.norm():
        raise InputError(
            "the branches cannot be drawn, because the input of the scheduler is not a combination of the conditional "
            'and the unconditional output. Omit "cond", "uncond", "guidance" and "guidance map" from show'
        )
    return 1 if weights.sum() > 0 else -1


def _check_columns(model: DiffusionModel, show: Any) -> tuple[str, ...]:
    if not isinstance(show, Iterable):
        raise InputError(f"show must name the images to draw, not {show!r}: choose from {', '.join(_COLUMNS)}")
    shown = (show,) if isinstance(show, str) else tuple(show)
    unknown = [column for column in shown if column not in _COLUMNS]
    if unknown or not shown:
        given = f"{unknown[0]!r} cannot be shown" if unknown else "show is empty"
        raise InputError(f"{given}: choose from {', '.join(_COLUMNS)}")
    if rate_of(model) is not None and set(shown) & set(_GUIDANCE):
        raise InputError(f"{' and '.join(_GUIDANCE)} can be shown for images, but not for sounds: show cond and uncond")
    return tuple(dict.fromkeys(shown))


def _check_exits(model: DiffusionModel, exits: Any) -> None:
    if exits is None:
        return
    if exits != "blocks":
        raise InputError(f'exits must be "blocks" or None, not {exits!r}')
    if model.edits:
        raise InputError("exits cannot be drawn from a model with edits: use the model without them")
    for name in ("unet", "transformer"):
        if name in components(model.pipeline):
            block_names(components(model.pipeline)[name])


def _columns(found: Mapping[str, Sequence[Image.Image]], names: Sequence[str]) -> dict[str, tuple[Image.Image, ...]]:
    """Return the images of all columns in order, including those computed from the two branches."""
    made: dict[str, tuple[Image.Image, ...]] = {}
    for name in names:
        if name == "guidance":
            made[name] = tuple(map(difference_image, found["cond"], found["uncond"]))
        elif name == "guidance map":
            made[name] = difference_maps(found["cond"], found["uncond"])
        else:
            made[name] = tuple(found[name])
    return made


def _write_gif(images: Sequence[Image.Image], path: Path) -> None:
    first, *rest = images
    first.save(path, save_all=True, append_images=rest, duration=_GIF_MILLISECONDS, loop=0)
