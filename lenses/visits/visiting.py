"""Call a function with every value that passes a point, in a copy of the model. A returned tensor replaces the value.

    norms = []
    copy = visiting(pipeline, named_points(pipeline, "unet.**.attn2"), lambda visit: norms.append(visit.value.norm()))
    copy.generate("a red circle", seed=0).result

The copy is an edited model: it shares the weights, and the visits go on until its edits are cleared.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any, TypeVar

import torch
from torch import nn

from diffsight.errors import InputError, OutOfOrderError
from diffsight.lenses.features.activation_stream import channels_last
from diffsight.lenses.sites.items import tensor_of, with_tensor
from diffsight.lenses.visits.named_points import NamedPoint
from diffsight.pipelines.diffusion.components import components, text_encoder_names
from diffsight.pipelines.diffusion.denoising_clock import time_parameter
from diffsight.pipelines.diffusion.model import DiffusionModel
from diffsight.pipelines.language.model import LanguageModel
from diffsight.pipelines.stopped_runs import was_stopped

Wrapper = TypeVar("Wrapper")
BRANCHES = ("cond", "uncond", "both")


@dataclass(frozen=True, eq=False)
class Visit:
    """A value as the model passes a point.

    Attributes:
        point: The point.
        value: The value, (batch, ..., features). The features of a feature map are in the last dimension too.
        run: The run.
        step: The denoising step, or the generated token. None where the point is not passed in steps.
        call: The number of the module's call, counted within the step if there is one.
    """

    point: NamedPoint
    value: torch.Tensor
    run: Any
    step: Any | None
    call: int


class _Reached:
    """The calls of a point that the runs of a copy have visited.

    The edits of a run begin one directly after another, so the next edit finds in `latest` the calls of its own run."""

    latest: list[int]

    def begin(self) -> list[int]:
        """Return the list of calls of a new run."""
        self.latest = []
        return self.latest


def visiting(
    model: Wrapper,
    points: Sequence[NamedPoint],
    function: Callable[[Visit], torch.Tensor | None],
    branch: str | None = None,
    ended: Callable[[int], None] | None = None,
    required: bool = False,
) -> Wrapper:
    """Return a copy of the model that calls `function` each time it passes one of the points.

    Args:
        model: The model.
        points: The points.
        function: Takes the visit. If it returns a tensor, (batch, ..., features), the model continues with that.
        branch: "cond", "uncond" or "both" branches of guidance. None means the conditional branch where there are
            branches: in the denoisers and text encoders of a pipeline that takes a prompt or a guidance scale.
        ended: Called with the number of steps at the end of each run, for a model that runs in steps. Not called if the
            run is stopped.
        required: Whether a run without an unconditional branch is an error if "uncond" is asked for.

    Raises:
        InputError: There are no branches at a point.
    """
    visitors: list[Callable[[Any], None]] = []
    for point in points:
        which, steps = _branch_at(model, point, branch), is_in_steps(model, point)
        reached = _Reached()
        visitors.append(_visitor(point, function, which, steps, reached))
        if required and which == "uncond":
            visitors.append(_check_of_branch(point, steps, reached))
    if ended is not None:
        visitors.append(partial(_count_steps, ended))
    copy = model.edit(visitors[0])
    for visitor in visitors[1:]:
        copy.edit(visitor, inplace=True)
    return copy


def is_in_steps(model: Any, point: NamedPoint) -> bool:
    """Return whether a point is passed in steps: in a language model, or in a denoiser."""
    if isinstance(model, LanguageModel):
        return True
    if not isinstance(model, DiffusionModel):
        return False
    part = components(model.pipeline).get(point.component)
    return isinstance(part, nn.Module) and time_parameter(part) is not None


def has_branches(model: Any, point: NamedPoint) -> bool:
    """Return whether guidance may have two branches at a point."""
    if not isinstance(model, DiffusionModel):
        return False
    return is_in_steps(model, point) or point.component in text_encoder_names(model.pipeline)


def _branch_at(model: Any, point: NamedPoint, branch: str | None) -> str:
    if branch is not None and branch not in BRANCHES:
        raise InputError(f"branch must be one of {', '.join(map(repr, BRANCHES))}, not {branch!r}")
    if has_branches(model, point):
        return branch or ("cond" if _takes_guidance(model) else "both")
    if branch is not None:
        raise InputError(f"there are no branches of guidance at {point.name}: omit branch")
    return "both"


def _takes_guidance(model: DiffusionModel) -> bool:
    """Return whether a pipeline may have guidance. An unconditional one has a single branch."""
    return any("prompt" in name or "guidance" in name for name in model.argument_names)


def _visitor(
    point: NamedPoint, function: Callable[[Visit], torch.Tensor | None], branch: str, steps: bool, reached: _Reached
) -> Callable[[Any], None]:
    """Return an edit that visits a point."""

    path = f"{point.path}.{'input' if point.is_input else 'output'}"

    def visit(run: Any) -> None:
        calls = reached.begin()
        module = (run if branch == "both" else getattr(run, branch))[point.path]
        for step in run.steps if steps else [None]:
            for number in count():
                call = module.calls[number]
                try:
                    whole = call.input if point.is_input else call.output
                except OutOfOrderError:  # the step has ended
                    break
                calls.append(number)
                value = tensor_of(whole, path, point.item)
                is_map = value.ndim >= 4
                new = function(Visit(point, channels_last(value), run, step, number))
                if new is None:
                    continue
                whole = with_tensor(whole, new.movedim(-1, 1) if is_map else new, path, point.item)
                if point.is_input:
                    call.input = whole
                else:
                    call.output = whole

    return visit


def _count_steps(ended: Callable[[int], None], run: Any) -> None:
    steps = sum(1 for _ in run.steps)
    if not was_stopped(run):
        ended(steps)


def _check_of_branch(point: NamedPoint, steps: bool, reached: _Reached) -> Callable[[Any], None]:
    """Return an edit that raises InputError once a run has passed a point without an unconditional branch.

    It is an edit of its own, because one that still waits for a point ends silently with the run."""

    def check(run: Any) -> None:
        calls = reached.latest
        for _ in run.steps if steps else run.steps[:1]:  # text encoders run before the first step
            pass
        if not calls and not was_stopped(run):
            raise InputError(
                f"uncond.{point.path} was asked for, but there is no unconditional branch at that point: guidance is "
                "off, the pipeline does not encode a negative prompt, or the run does not call the module"
            )

    return check
