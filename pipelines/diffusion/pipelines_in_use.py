"""The pipeline that each call uses if several calls of one pipeline are open at once, for example in lockstep.

    with model.generate(p, seed=0) as x, model.generate(q, seed=0) as y:
        y.unet.mid_block.output = x.unet.mid_block.output

Each run has its own coroutine (`diffsight.engine.coroutine`), so one run can wait while another continues. But a
pipeline and its schedulers change while they run: the scheduler counts its steps, and the pipeline holds the guidance
scale. A call normally uses the user's own pipeline. While another call is using that pipeline, it uses a copy that
shares the modules and has its own schedulers. This holds for runs, for `model(...)`, and for the user's `pipe(...)` in
the body of a run, in a callback or in another thread. Python looks up `__call__` on the class, so the class of a
pipeline is changed while a run is using the pipeline.
"""

import functools
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from threading import Lock, current_thread
from types import FrameType, MethodType
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin
from greenlet import getcurrent
from torch import nn

from diffsight.errors import InputError
from diffsight.extending import ChangedMethod
from diffsight.pipelines.diffusion.changed_modules import ChangedModule, changed_modules
from diffsight.pipelines.diffusion.components import components
from diffsight.pipelines.diffusion.pipeline_copies import copied_pipeline, is_pipeline, stateful_parts
from diffsight.pipelines.diffusion.upcast_vaes import Conversions, upcast_parts

_in_use: dict[int, "PipelineOfRun"] = {}  # by ids of pipelines and of components of theirs that change
_conversions = Conversions()
_lock = Lock()


class PipelineOfRun:
    """The pipeline that one run calls: the user's own, or a copy once the run needs one.

    Args:
        pipeline: The user's own.
        arguments: The arguments of the call, by name.
        can_wait: Whether other calls can be made in the same thread before this one ends. Otherwise it is a plain call.
    """

    def __init__(self, pipeline: DiffusionPipeline, arguments: Mapping[str, Any], can_wait: bool = False) -> None:
        self.pipeline, self.arguments, self.can_wait = pipeline, arguments, can_wait
        self.copies: dict[int, Any] = {}  # by the ids of the user's own objects
        self.thread = current_thread()  # in which the call is made
        self._originals: list[Any] = []  # they keep their ids as long as they are here

    @contextmanager
    def in_use(self) -> Iterator[Callable[..., Any]]:
        """Yield the method `__call__` of a pipeline that no other call uses while the block is open."""
        used: dict[int, PipelineOfRun] = {}
        try:
            with _lock:
                self._check_modules()
                is_free = not _is_used(self.pipeline) and not _is_running(self.pipeline)
                if not is_free:
                    self._originals = stateful_parts(self.pipeline)
                    self.pipeline = copied_pipeline(self.pipeline, self.copies)
                parts = stateful_parts(self.pipeline)
                self.thread = current_thread()
                used |= dict.fromkeys(map(id, parts), self)
                _in_use.update(used)
            with ExitStack() as changes:
                for owner, name, change in _changes(parts):
                    changes.callback(ChangedMethod(owner, name, change).remove)
                yield MethodType(_unchanged(type(self.pipeline).__call__), self.pipeline)
        except BaseException:
            _conversions.end(self, is_early=True)
            raise
        finally:
            _conversions.end(self, is_early=False)
            for number in used:
                _in_use.pop(number, None)

    def _check_modules(self) -> None:
        """Raise InputError if this call and another one in progress use the same module, and one of them changes it."""
        for pipeline, arguments, is_here in _calls_in_progress():
            changed = [*_changed_in_use(pipeline, arguments, self.pipeline)]
            if self.can_wait or not is_here:
                changed += _changed_in_use(self.pipeline, self.arguments, pipeline)
            for one in changed:
                raise InputError(
                    f"{type(self.pipeline).__name__} cannot be called while another call is in progress, because one "
                    f"of the two {one.change}. Make one call after the other{one.advice}"
                )


def _changed_in_use(
    pipeline: DiffusionPipeline, arguments: Mapping[str, Any], other: DiffusionPipeline
) -> Iterator[ChangedModule]:
    """Yield the modules that a call of a pipeline changes and that another pipeline uses too."""
    used = {id(part) for held in _with_held(other) for part in components(held).values()}
    changed = (one for held in _with_held(pipeline) for one in changed_modules(held, arguments))
    return (one for one in changed if id(one.module) in used)


def _calls_in_progress() -> Iterator[tuple[DiffusionPipeline, Mapping[str, Any], bool]]:
    """Yield the pipelines that are being called in runs or by the user, the arguments of the calls, and whether they
    are made in this thread."""
    runs = {run for run in _in_use.values() if run.thread.is_alive()}
    yield from ((run.pipeline, run.arguments, run.thread is current_thread()) for run in runs)
    here = [*_calls(_frames())]
    for frame in _calls(_all_frames()):
        pipeline = frame.f_locals["self"]
        if _user_of(pipeline) is None:
            yield pipeline, frame.f_locals | frame.f_locals.get("kwargs", {}), frame in here


def _with_held(pipeline: DiffusionPipeline) -> Iterator[DiffusionPipeline]:
    """Yield a pipeline and the pipelines in it."""
    return filter(is_pipeline, stateful_parts(pipeline))


def _user_of(part: Any) -> PipelineOfRun | None:
    """Return the run that uses a pipeline or a component. A run that its thread left open when it ended uses nothing:
    it cannot go on, and nothing can unwind it."""
    run = _in_use.get(id(part))
    return run if run is not None and run.thread.is_alive() else None


def _is_used(pipeline: DiffusionPipeline) -> bool:
    return any(_user_of(part) is not None for part in stateful_parts(pipeline))


def _is_running(pipeline: DiffusionPipeline) -> bool:
    """Whether a call that the user made of the pipeline, or of one that shares a part with it, is in progress: here,
    with this code in its callback, or in another thread."""
    parts = {id(part) for called in _called(_all_frames()) for part in stateful_parts(called)}
    return not parts.isdisjoint(map(id, stateful_parts(pipeline)))


def _called(frames: Iterable[FrameType]) -> Iterator[DiffusionPipeline]:
    """Yield the pipelines whose calls are among the frames."""
    return (frame.f_locals["self"] for frame in _calls(frames))


def _calls(frames: Iterable[FrameType]) -> Iterator[FrameType]:
    """Yield those of the frames that are calls of pipelines."""
    named = (frame for frame in frames if frame.f_code.co_name == "__call__")
    return (frame for frame in named if is_pipeline(frame.f_locals.get("self")))


def _all_frames() -> list[FrameType]:
    """Return the frames that lead here, and those of all threads."""
    return [*_frames(), *(frame for innermost in sys._current_frames().values() for frame in _outwards(innermost))]


def _frames() -> Iterator[FrameType]:
    """Yield the frames that lead here, innermost first, with those of the coroutines around this one."""
    stack, frame = getcurrent(), sys._getframe(1)
    while stack is not None:
        yield from _outwards(frame)
        stack = stack.parent
        frame = None if stack is None else stack.gr_frame


def _outwards(frame: FrameType | None) -> Iterator[FrameType]:
    """Yield a frame and those that it was called from."""
    while frame is not None:
        yield frame
        frame = frame.f_back


# ---- methods that are changed while a run is using an object that has them


def _changes(parts: list[Any]) -> Iterator[tuple[Any, str, Callable]]:
    """Yield the methods to change: their classes or objects, their names, and how to change them."""
    vaes = {vae for held in filter(is_pipeline, parts) for vae in upcast_parts(held).values()}
    yield from ((vae, "to", functools.partial(_converting, vae)) for vae in vaes)
    if vaes:
        yield ModelMixin, "dtype", _seen_by_each_run
    for part in parts:
        name, change = ("__call__", _calling_a_copy) if is_pipeline(part) else ("set_timesteps", _of_one_pipeline)
        cls = next((cls for cls in type(part).__mro__ if name in vars(cls)), None)
        if cls is not None:
            yield cls, name, change


@functools.lru_cache(maxsize=64)  # so that classes made in functions do not stay for good
def _calling_a_copy(method: Callable[..., Any]) -> Callable[..., Any]:
    """Return a method `__call__` that calls a copy of a pipeline that is in use."""

    @functools.wraps(method)
    def call(pipeline: DiffusionPipeline, *args: Any, **kwargs: Any) -> Any:
        is_super = type(pipeline).__call__ is not call
        if is_super or not _is_used(pipeline) or _is_inner(pipeline):
            return method(pipeline, *args, **kwargs)
        with PipelineOfRun(pipeline, kwargs).in_use() as free:
            return free(*args, **kwargs)

    call.unchanged = method
    call.__wrapped__ = getattr(method, "__wrapped__", method)  # the undecorated call, as on the method itself
    return call


def _is_inner(pipeline: DiffusionPipeline) -> bool:
    """Whether the pipeline of a run calls a pipeline that it holds, and not its callback one that is running."""
    called, run = list(_called(_frames())), _user_of(pipeline)
    is_part = run is not None and bool(called) and _user_of(called[0]) is run
    return is_part and all(one is not pipeline for one in called)


def _unchanged(method: Callable[..., Any]) -> Callable[..., Any]:
    return getattr(method, "unchanged", method)


def _converting(vae: nn.Module, to: Callable[..., Any]) -> Callable[..., Any]:
    """Return a method `to` that notes what the pipeline of a run converts. The user may convert a VAE for good."""

    @functools.wraps(to)
    def convert(*args: Any, **kwargs: Any) -> Any:
        run = _calling_run()
        return to(*args, **kwargs) if run is None else _conversions.convert(vae, to, args, kwargs, run)

    return convert


def _seen_by_each_run(dtype: property) -> property:
    """Return a property `dtype` that does not show a run what only others have converted."""

    def seen(module: nn.Module) -> torch.dtype:
        run = _calling_run() if module in _conversions else None
        is_of_others = run is not None and not _conversions.is_converted_by(module, run)
        return _conversions.dtype_before(module) if is_of_others else dtype.fget(module)

    return property(seen, doc=dtype.__doc__)


def _calling_run() -> PipelineOfRun | None:
    """Return the run whose pipeline has called this."""
    pipeline = next(_called(_frames()), None)
    return None if pipeline is None else _user_of(pipeline)


@functools.lru_cache(maxsize=64)  # so that classes made in functions do not stay for good
def _of_one_pipeline(method: Callable[..., Any]) -> Callable[..., Any]:
    """Return a method `set_timesteps` that raises an error if a pipeline calls it on the scheduler of another's run."""

    @functools.wraps(method)
    def set_timesteps(scheduler: Any, *args: Any, **kwargs: Any) -> Any:
        run = _user_of(scheduler)
        pipeline = None if run is None else next(_called(_frames()), None)
        if pipeline is not None and _user_of(pipeline) is not run:
            raise InputError(
                f"{type(pipeline).__name__} has the same {type(scheduler).__name__} as the pipeline of a run that is "
                "open, and would change the steps of the run. Call DiffusionModel(pipeline)(...), which uses a copy, "
                "or give one of them a scheduler of its own: type(scheduler).from_config(scheduler.config)"
            )
        return method(scheduler, *args, **kwargs)

    return set_timesteps
