"""Choose the pipeline that each run calls if several runs of one pipeline are open at once, for example in lockstep.

    with model.generate(p, seed=0) as x, model.generate(q, seed=0) as y:
        y.unet.mid_block.output = x.unet.mid_block.output

Each run has its own coroutine (`diffsight.engine.coroutine`), so one run can wait while another continues. But a
pipeline and its schedulers change while they run: the scheduler counts its steps, and the pipeline holds the guidance
scale. A run normally calls the user's own pipeline. While another run is using that pipeline, it calls a copy that
shares the modules and has its own schedulers.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any

from diffusers import ConfigMixin, DiffusionPipeline, ModularPipeline
from diffusers.guiders import BaseGuidance
from torch import nn

_in_use: set[int] = set()  # ids of pipelines and components in use by a run
_lock = Lock()


class PipelineOfRun:
    """The pipeline that one run calls: the user's own, or a copy once the run needs one."""

    def __init__(self, pipeline: DiffusionPipeline) -> None:
        self.pipeline = pipeline
        self.copies: dict[int, Any] = {}  # by the ids of the user's own objects
        self._originals: list[Any] = []  # they keep their ids as long as they are here

    @contextmanager
    def in_use(self) -> Iterator[DiffusionPipeline]:
        """Yield the pipeline to call. No other run uses it while the block is open."""
        parts = {id(part) for part in stateful_parts(self.pipeline)}
        with _lock:
            is_free = _in_use.isdisjoint(parts)
            if is_free:
                _in_use.update(parts)
        try:
            if not is_free:
                self._originals = stateful_parts(self.pipeline)
                self.pipeline = _copied(self.pipeline, self.copies)
            yield self.pipeline
        finally:
            if is_free:
                _in_use.difference_update(parts)


def stateful_parts(pipeline: DiffusionPipeline) -> list[Any]:
    """Return a pipeline, the pipelines in it, and all their components that change in a run."""
    parts = [pipeline]
    for held in parts:
        parts += [part for part in vars(held).values() if _is_stateful(part)] if _is_pipeline(held) else []
    return parts


def _copied(pipeline: DiffusionPipeline, copies: dict[int, Any]) -> DiffusionPipeline:
    """Return a copy that shares everything with the pipeline, except for what changes in a run.

    `copies` are those made so far, by the ids of the objects, which may be held in several places."""
    copied = copies[id(pipeline)] = object.__new__(type(pipeline))
    vars(copied).update(vars(pipeline))
    for name, part in vars(pipeline).items():
        if _is_stateful(part):
            if id(part) not in copies:
                copies[id(part)] = _copied(part, copies) if _is_pipeline(part) else _unused(part)
            vars(copied)[name] = copies[id(part)]
    return copied


def _unused(part: Any) -> Any:
    """Return a deep copy without a current step. A scheduler resets itself when its timesteps are set."""
    copied = copy.deepcopy(part)
    if isinstance(copied, BaseGuidance):
        copied.set_state(None, None, None)
    return copied


def _is_stateful(part: Any) -> bool:
    return isinstance(part, ConfigMixin) and not isinstance(part, nn.Module)


def _is_pipeline(part: Any) -> bool:
    return isinstance(part, (DiffusionPipeline, ModularPipeline))
