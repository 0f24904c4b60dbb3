"""The rows of a sweep over a pipeline: in each of them, one site is changed in a window of steps.

    rows = DenoiserRows(model, ["a red circle", "a blue circle"], seed=0, arguments={}, reads=("images",))
    plain = rows.run_plain(points)              # both prompts, without a change
    rows.run(plain, changes, apply)             # a row for each change: the outcome

The rows of a pass run in one call of the pipeline. Before the first step that is changed, all rows equal the plain run:
the denoiser is skipped there, and its stored outputs are used.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from tqdm.auto import tqdm

from diffsight.errors import InputError
from diffsight.lenses.encoders.drawing import for_each_row
from diffsight.lenses.features.activation_stream import tensor_in
from diffsight.lenses.metrics.metric import IMAGES, LATENTS, Outcome
from diffsight.lenses.results.outputs import image_of, outputs_in
from diffsight.lenses.sites.items import with_tensor
from diffsight.lenses.sites.pipeline_positions import WholeValue
from diffsight.lenses.sites.site import Site
from diffsight.pipelines.diffusion.denoising_clock import denoisers
from diffsight.pipelines.diffusion.model import DiffusionModel
from diffsight.pipelines.diffusion.run import DiffusionRun, is_silenced, progress_bar

_FEW = 8  # rows; a pass with fewer also takes the rows with the next first step


@dataclass(frozen=True)
class Change:
    """A row of a sweep.

    Attributes:
        site: The site that is changed.
        steps: The steps in which it is changed.
        place: The numbers of the site and the column.
        part: The part of the value that is changed.
    """

    site: Site
    steps: tuple[int, ...]
    place: tuple[int, int]
    part: WholeValue = field(default_factory=WholeValue)


@dataclass(frozen=True)
class Passage:
    """A call of a point.

    Attributes:
        point: The path of the point.
        call: The number of the call in the step, or in the branch of the step.
        denoiser_call: The number of calls of denoisers that ended before it in the step.
        batch: The batch size.
    """

    point: str
    call: int
    denoiser_call: int
    batch: int


@dataclass(frozen=True)
class PlainRun:
    """The values kept from the run without a change.

    Attributes:
        outcome: The outcome, a row for each prompt.
        calls: The calls of each point, in the order in which the model reaches them in a step.
        early: The same for the points that the model reaches before the first step.
        shapes: The shape of the value at each point, for one row.
        denoisers: The denoisers that are called in each step, in order.
        latents: The output of `scheduler.step` in each step, a row for each prompt.
        denoised: The output of the denoiser in each step and call; None if its rows cannot be distinguished, or if
            there are several denoisers, such as a ControlNet.
    """

    outcome: Outcome
    calls: Sequence[Passage]
    early: Sequence[Passage]
    shapes: Mapping[str, torch.Size]
    denoisers: Sequence[Sequence[str]]
    latents: Sequence[torch.Tensor] = field(repr=False)
    denoised: Sequence[Sequence[Any]] | None = field(repr=False)

    @property
    def steps(self) -> int:
        """The number of steps."""
        return len(self.denoisers)


Apply = Callable[[Any, Sequence[Any], Any, Change, int], None]


class DenoiserRows:
    """Runs of a pipeline whose rows differ in one change.

    Args:
        model: The pipeline.
        prompts: The prompts of the leading rows, which are never changed, and last the prompt of the changed rows.
        seed: The seed of every row.
        arguments: Further arguments of the pipeline.
        reads: The parts of the outcome that the metric reads.
        branch: "cond" or "uncond", the branch of guidance that is changed. None stands for both.

    Attributes:
        passes: The number of calls of the pipeline so far.
    """

    def __init__(
        self,
        model: DiffusionModel,
        prompts: Sequence[str],
        seed: int,
        arguments: Mapping[str, Any],
        reads: Sequence[str],
        branch: str | None = None,
    ) -> None:
        self.passes = 0
        self._model, self._prompts, self._seed, self._branch = model, list(prompts), seed, branch
        self._arguments, self._reads = dict(arguments), reads
        if IMAGES not in reads:
            self._arguments["output_type"] = "latent"

    @torch.no_grad()
    def run_plain(self, points: Sequence[str]) -> PlainRun:
        """Run all prompts without a change, and record the order in which the model reaches the points.

        Raises:
            InputError: The model does not reach one of the points.
        """
        log, latents = _Log(), []
        with progress_bar(self._model.pipeline, disable=True), self.open(self._prompts) as run:
            follow_latents(run, lambda value: latents.append(value.clone()))
            for point in points:
                run.follow(Site(point).path, partial(log.see, point))
            for denoiser in denoisers(self._model.pipeline):
                run.follow(f"{denoiser}.output", partial(log.keep, denoiser))
            for step in run.steps:
                log.begin(step.index)
                if step.index == 0:
                    if self._branch is not None:
                        self.branch_of(run)[step.component].input  # runs up to the call that contains the branch
                        log.branch = step.component, log.denoisers[0].count(step.component)
                    last = tensor_in(run.rows[-1][step.component].output).clone()
            outcome = self._outcome(run, latents)
        self.passes += 1
        missing = next((point for point in points if point not in log.shapes), None)
        if missing is not None:
            raise InputError(f"the pipeline never reaches {missing} with these arguments, so nothing is changed there")
        has_one = len({name for names in log.denoisers for name in names}) == 1
        is_told_apart = has_one and torch.equal(last, _by_branch(log.denoised[0][0], len(self._prompts))[:, -1])
        kept = log.denoised if is_told_apart else None
        calls = (log.calls(0), log.calls(None)) if self._branch is None else log.calls_of_branch(len(self._prompts))
        seen = {passage.point for of_part in calls for passage in of_part}
        late = next((point for point in points if point not in seen), None)
        if late is not None:
            raise InputError(
                f"the pipeline reaches {late} neither before the steps nor in the first step"
                f"{'' if self._branch is None else f' in the branch {self._branch!r}'}, so it is not changed: choose a "
                "site in a text encoder or denoiser"
            )
        return PlainRun(outcome, *calls, log.shapes, log.denoisers, latents, kept)

    @torch.no_grad()
    def run(self, plain: PlainRun, changes: Sequence[Change], apply: Apply) -> Outcome:
        """Run a row for each change; return the outcome of these rows.

        Args:
            plain: The run without a change.
            changes: The changes.
            apply: Makes a change in a run: it gets the run (or its branch), the leading rows, the row, the change and
                the number of the call.
        """
        leading, count = len(self._prompts) - 1, len(changes)
        start = 0 if plain.denoised is None or self._changes_early(plain, changes) else _first_step(changes)
        prompts = [*self._prompts[:-1], *self._prompts[-1:] * count]
        with progress_bar(self._model.pipeline, disable=True), self.open(prompts) as run:
            latents: list[torch.Tensor] = []
            follow_latents(run, lambda value: latents.__setitem__(slice(None), [value]))
            rows = [self.branch_of(row) for row in run.rows]
            self._apply(plain.early, enumerate(changes, leading), run, rows, apply)
            for step in run.steps:
                if step.index < start:
                    for number, output in enumerate(plain.denoised[step.index]):
                        run[step.component].calls[number].skip(_spread(output, leading, count))
                    continue
                active = [(row, one) for row, one in enumerate(changes, leading) if step.index in one.steps]
                self._apply(plain.calls, active, run, rows, apply)
            outcome = self._outcome(run, latents)
        self.passes += 1
        return outcome.part(slice(leading, None))

    def sweep(
        self,
        plain: PlainRun,
        changes: Sequence[Change],
        apply: Apply,
        measure: Callable[..., torch.Tensor],
        named: Callable[[Change], str],
        batch_size: int,
        progress: bool,
    ) -> torch.Tensor:
        """Run a row for each change; return the metric of each at its place, (sites, columns).

        Args:
            plain: The run without a change.
            changes: The changes.
            apply: Makes a change, as in `run`.
            measure: Returns the metric of each row of an outcome; `rows` are the names of the rows.
            named: Returns the name of the row of a change.
            batch_size: The largest number of changes in a pass.
            progress: Whether to show a progress bar over rows.
        """
        values = torch.full([1 + max(place) for place in zip(*(change.place for change in changes))], torch.nan)
        with tqdm(total=len(changes), desc="rows", disable=not progress or is_silenced(self._model.pipeline)) as bar:
            for chunk in _chunks(changes, batch_size):
                found = measure(self.run(plain, chunk, apply), rows=list(map(named, chunk)))
                for change, value in zip(chunk, found.tolist()):
                    values[change.place] = value
                bar.update(len(chunk))
        return values

    def open(self, prompts: Sequence[str], grad: bool = False) -> DiffusionRun:
        """Open a run with a row for each prompt."""
        several = len(prompts) > 1
        arguments = for_each_row(self._arguments, len(prompts)) if several else self._arguments
        prompt, seed = (list(prompts), [self._seed] * len(prompts)) if several else (prompts[0], self._seed)
        return self._model.generate(prompt, seed=seed, grad=grad, **arguments)

    def branch_of(self, part: Any) -> Any:
        """Return the changed branch of a row or run."""
        return part if self._branch is None else getattr(part, self._branch)

    def _changes_early(self, plain: PlainRun, changes: Sequence[Change]) -> bool:
        early = {passage.point for passage in plain.early}
        return any(change.site.point in early for change in changes)

    def _apply(
        self,
        calls: Sequence[Passage],
        changes: Iterable[tuple[int, Change]],
        run: DiffusionRun,
        rows: Sequence[Any],
        apply: Apply,
    ) -> None:
        """Make changes at the points as the model reaches them."""
        at: dict[str, list[tuple[int, Change]]] = {}
        for row, change in changes:
            at.setdefault(change.site.point, []).append((row, change))
        leading = rows[: len(self._prompts) - 1]
        for passage in calls:
            for row, change in at.get(passage.point, ()):
                apply(self.branch_of(run), leading, rows[row], change, passage.call)

    def _outcome(self, run: DiffusionRun, latents: Sequence[torch.Tensor]) -> Outcome:
        """Run the pipeline to its end; return its outcome."""
        result = run.result
        images = tuple(map(image_of, outputs_in(result, self._model.pipeline))) if IMAGES in self._reads else None
        if LATENTS in self._reads and not latents:
            raise InputError(f"the latents of {type(self._model.pipeline).__name__} do not pass through scheduler.step")
        return Outcome(images=images, latents=latents[-1] if latents else None)


class _Log:
    """A log of the run without a change.

    Attributes:
        step: The number of the step; None before the first.
        branch: The denoiser that begins a step, and the number of the call of it that contains the branch.
        shapes: The shape of the first value at each point.
        denoisers: The denoisers that were called, by step, in order.
        denoised: Their outputs.
    """

    def __init__(self) -> None:
        self.step: int | None = None
        self.branch = "", 0
        self.shapes: dict[str, torch.Size] = {}
        self.denoisers: list[list[str]] = []
        self.denoised: list[list[Any]] = []
        self._seen: Counter[tuple[int | None, str]] = Counter()
        self._passages: dict[int | None, list[Passage]] = {}

    def begin(self, step: int) -> None:
        """Begin a step."""
        self.step = step
        self.denoisers.append([])
        self.denoised.append([])

    def see(self, point: str, value: Any) -> None:
        """Note that the model reaches a point."""
        number, shape = self._seen[self.step, point], tensor_in(value).shape
        self._seen[self.step, point] += 1
        ended = 0 if self.step is None else len(self.denoisers[-1])
        passage = Passage(point, number, ended, shape[0] if shape else 0)
        self._passages.setdefault(self.step, []).append(passage)
        self.shapes.setdefault(point, shape)

    def keep(self, denoiser: str, output: Any) -> None:
        """Keep an output of a denoiser."""
        self.denoisers[-1].append(denoiser)
        self.denoised[-1].append(with_first(output, tensor_in(output).clone()))

    def calls(self, step: int | None) -> list[Passage]:
        """Return the calls of points in a step, in order."""
        return self._passages.get(step, [])

    def calls_of_branch(self, prompts: int) -> tuple[list[Passage], list[Passage]]:
        """Return the calls that contain the branch, in a step and before the first step. Only these are counted.

        Raises:
            InputError: It is not known which calls contain the branch.
        """
        count: Counter[str] = Counter()
        calls = []
        for passage in self._passages.get(0, []):
            if self._is_in_branch(passage):
                calls.append(replace(passage, call=count[passage.point]))
                count[passage.point] += 1
        early: dict[str, Passage] = {}
        for passage in self._passages.get(None, []):
            early.setdefault(passage.point, passage)
        for point in early:
            of_point = [passage for passage in self._passages[None] if passage.point == point]
            if len(of_point) > 2 or (len(of_point) == 2 and any(passage.batch != prompts for passage in of_point)):
                raise InputError(f"{point} is called {len(of_point)} times before the first step: omit branch")
        return calls, list(early.values())

    def _is_in_branch(self, passage: Passage) -> bool:
        """Return whether a call of a point in the first step contains the branch.

        Raises:
            InputError: This is not known.
        """
        begins, number = self.branch
        called, before = self.denoisers[0], self.denoisers[0][: passage.denoiser_call]
        current = called[passage.denoiser_call] if passage.denoiser_call < len(called) else begins
        denoiser = current if is_in(current, passage.point) else begins
        if called.count(denoiser) not in (1, called.count(begins)):
            raise InputError(f"{denoiser} is called {called.count(denoiser)} times in a step: omit branch")
        return called.count(denoiser) == 1 or before.count(denoiser) == number


def is_in(component: str, point: str) -> bool:
    """Return whether a point is in a component."""
    return f"{Site(point).module}.".startswith(f"{component}.")


def _first_step(changes: Sequence[Change]) -> int:
    """Return the first step in which anything is changed."""
    return min(change.steps[0] for change in changes)


def _chunks(changes: Sequence[Change], size: int) -> Iterator[list[Change]]:
    """Yield the changes of each pass: at most `size`, with the same first step unless they are few."""
    chunk: list[Change] = []
    for change in sorted(changes, key=lambda one: one.steps[0]):
        is_other = chunk and chunk[-1].steps[0] != change.steps[0] and len(chunk) >= _FEW
        if len(chunk) == size or is_other:
            yield chunk
            chunk = []
        chunk.append(change)
    yield chunk


def follow_latents(run: DiffusionRun, function: Callable[[torch.Tensor], Any]) -> None:
    """Call a function with the latents at the end of each step."""
    if hasattr(run, "scheduler"):
        run.follow("scheduler.step.output", lambda output: function(tensor_in(output)))


def _by_branch(output: Any, rows: int) -> torch.Tensor:
    """Return an output of the denoiser as (branches, rows, ...)."""
    return tensor_in(output).unflatten(0, (-1, rows))


def _spread(output: Any, leading: int, count: int) -> Any:
    """Return an output of the denoiser with `count` copies of its last row after its leading rows."""
    rows = _by_branch(output, leading + 1)
    last = rows[:, leading:].expand(-1, count, *[-1] * (rows.ndim - 2))
    return with_first(output, torch.cat([rows[:, :leading], last], 1).flatten(0, 1))


def with_first(output: Any, tensor: torch.Tensor) -> Any:
    """Return an output of the denoiser with another first tensor."""
    items = list(output.values()) if isinstance(output, Mapping) else output
    first = None if isinstance(output, torch.Tensor) else [isinstance(item, torch.Tensor) for item in items].index(True)
    return with_tensor(output, tensor, "the denoiser's output", first)
