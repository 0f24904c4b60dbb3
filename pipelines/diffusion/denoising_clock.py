"""Find out when a denoising step begins, and at which timestep."""

import ast
import functools
import inspect
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModularPipeline, SchedulerMixin
from diffusers.modular_pipelines import SequentialPipelineBlocks
from torch import nn

from diffsight.extending import FORWARD, Clock, Target, unwrapped
from diffsight.pipelines.arguments import signature
from diffsight.pipelines.diffusion.components import blocks_in, components

_CALL_ONE_AFTER_ANOTHER = SequentialPipelineBlocks.__call__  # loops over the blocks in it


class DenoisingClock(Clock):
    """Begins a step at the first call of a denoiser, and at the first call after each `scheduler.step`.

    Some samplers never step their scheduler: until it is stepped for the first time, a step also begins where the same
    denoiser is called at a different timestep than before.

    Args:
        parts: The components of the pipeline. The denoisers are the components that are passed a timestep.
        methods: The traceable methods of the components.
        decodes_last: Whether the pipeline decodes its result only after the scheduler's last step.
    """

    def __init__(self, parts: Sequence[Target], methods: Sequence[Target], decodes_last: bool) -> None:
        denoisers = [target for target in parts if target.name == FORWARD and time_parameter(target.owner)]
        super().__init__(denoisers, [target for target in methods if target.name == "step"])
        self._decoders = {target.key for target in methods if target.name == "decode"} if decodes_last else ()

    def has_moved_on(self, target: Target, args: tuple, kwargs: dict) -> bool:
        if self.has_ended_one or self.call is None or target.key != self.call[0].key:
            return False
        return time_argument(target.owner, args, kwargs) != time_argument(target.owner, *self.call[1:])

    def is_behind(self, target: Target) -> bool:
        """Return whether a call that begins is one of the decoder, after the last step."""
        if target.key not in self._decoders or not self.has_ended_one or self.is_in_step or self.call is None:
            return False
        return self.is_last(*self.call)


def decodes_last(pipeline: Any) -> bool:
    """Return whether a pipeline decodes latents only after all its steps. Pipelines that generate a video in parts
    decode inside a loop."""
    called = _called_in_loops(pipeline)
    return called is not None and not any("decode" in name for name in called)


def _called_in_loops(pipeline: Any) -> list[str] | None:
    """Return the names of what a pipeline calls in its loops; None if they are unknown.

    A block of a modular pipeline that loops calls the blocks in it in every iteration."""
    if not isinstance(pipeline, ModularPipeline):
        loops = _loops(type(pipeline))
        return None if loops is None else [name for loop in loops for name in loop.called]
    blocks = [block for block in blocks_in(pipeline._blocks) if type(block).__call__ is not _CALL_ONE_AFTER_ANOTHER]
    looping = [block for block in blocks if block.sub_blocks and _loops(type(block)) != []]
    trees = [_tree(type(inner)) for block in looping for inner in blocks_in(block)]
    return None if None in trees else [name for tree in trees for name in _called_in(tree)]


def count_of_steps(pipeline: Any) -> int | None:
    """Return the maximum number of steps of a pipeline, once its scheduler's timesteps are set.

    None if it is unknown, because the pipeline does not step a single scheduler once per iteration of a single loop."""
    schedulers = [part for part in components(pipeline).values() if isinstance(part, SchedulerMixin)]
    stepping = [loop for loop in _loops(type(pipeline)) or () if "step" in loop.called]
    if len(schedulers) != 1 or len(stepping) != 1 or not stepping[0].is_for:
        return None
    return len(getattr(schedulers[0], "timesteps", ())) or None


@dataclass(frozen=True)
class _Loop:
    is_for: bool
    called: tuple[str, ...]  # the names of the functions and methods called in the loop


def _loops(kind: type) -> list[_Loop] | None:
    """Return the loops, including nested loops, in the call of a pipeline class or of a class of blocks; None if they
    are unknown."""
    tree = _tree(kind)
    if tree is None:
        return None
    loops = [node for node in ast.walk(tree) if isinstance(node, (ast.For, ast.While))]
    return [_Loop(isinstance(loop, ast.For), _called_in(loop)) for loop in loops]


@functools.cache
def _tree(kind: type) -> ast.AST | None:
    """Return the syntax tree of the call of a class, or None if its source is not available."""
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(kind.__call__))))
    except (OSError, SyntaxError, TypeError):
        return None


def _called_in(tree: ast.AST) -> tuple[str, ...]:
    called = (node.func for node in ast.walk(tree) if isinstance(node, ast.Call))
    names = (getattr(function, "attr", getattr(function, "id", None)) for function in called)
    return tuple(name for name in names if name is not None)


def is_last_step(pipeline: Any, denoiser: nn.Module, args: tuple, kwargs: dict) -> bool:
    """Return whether a denoiser is called at the last timestep of a scheduler."""
    time = scheduler_timestep(pipeline, denoiser, args, kwargs)
    schedulers = (part for part in components(pipeline).values() if isinstance(part, SchedulerMixin))
    known = (torch.as_tensor(getattr(scheduler, "timesteps", [])).flatten() for scheduler in schedulers)
    return any(timesteps.numel() and timesteps[-1].item() == time for timesteps in known)


def denoisers(pipeline: Any) -> dict[str, nn.Module]:
    """Return the components that are passed a timestep, by name: denoisers, and others such as ControlNets."""
    parts = components(pipeline).items()
    return {name: part for name, part in parts if isinstance(part, nn.Module) and time_parameter(part)}


def time_parameter(module: nn.Module) -> str | None:
    """Return the parameter through which a denoiser receives the timestep. Other components have none."""
    names = _parameters(module)
    return next((n for n in names if "timestep" in n), next((n for n in names[:3] if n in ("t", "r")), None))


def _parameters(module: nn.Module) -> list[str]:
    """Return the names of a denoiser's parameters, from its class if its `forward` was replaced by one with `*args`."""
    denoiser = unwrapped(module)
    own = signature(denoiser.forward).parameters
    if any(parameter.kind is parameter.VAR_POSITIONAL for parameter in own.values()):
        return list(signature(type(denoiser).forward).parameters)[1:]
    return list(own)


def time_argument(module: nn.Module, args: tuple, kwargs: dict) -> tuple[float, float] | None:
    """Return the timestep that a call passes to a denoiser, and the rounding error of its dtype.

    If each token has its own timestep, the largest is returned: tokens that are given and not generated have 0."""
    name = time_parameter(module)
    given = dict(zip(_parameters(module), args)) | kwargs
    if given.get(name) is None:
        return None
    time = torch.as_tensor(given[name])
    rounding = 4 * torch.finfo(time.dtype).eps if time.is_floating_point() else 0
    return float(time.max()), rounding


def scheduler_timestep(pipeline: DiffusionPipeline, denoiser: nn.Module, args: tuple, kwargs: dict) -> float | None:
    """Return the timestep of a denoiser call in the scheduler's own units.

    Some pipelines divide the timestep by 1000 before they pass it to the denoiser, or pass 1 minus the quotient."""
    found = time_argument(denoiser, args, kwargs)
    if found is None:
        return None
    time, rounding = found
    near = []
    for scheduler in (part for part in components(pipeline).values() if isinstance(part, SchedulerMixin)):
        known = torch.as_tensor(getattr(scheduler, "timesteps", [])).flatten()
        span = scheduler.config.get("num_train_timesteps", 1000)
        for order, value in enumerate((time, time * span, (1 - time) * span) if known.numel() else ()):
            nearest = known[(known.double() - value).abs().argmin()].item()
            if abs(nearest - value) <= rounding * span:
                near.append((abs(nearest - value), order, nearest))
    return min(near)[2] if near else time
