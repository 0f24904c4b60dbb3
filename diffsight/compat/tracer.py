"""`with model.trace(x) as tracer:`: a run with the methods of nnsight's tracer."""

import sys
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from types import FrameType, TracebackType
from typing import Any

from diffsight.compat.error_notes import add_hint
from diffsight.compat.functions import TracerFunctions
from diffsight.compat.iterations import WRITE_A_LOOP, Iterations
from diffsight.compat.repeated_blocks import RepeatedBlock, rest_of_block
from diffsight.compat.sessions import join_sessions
from diffsight.compat.stopping import BlockStopped
from diffsight.engine.capture import advising
from diffsight.engine.current_run import current_edit
from diffsight.engine.flow import STOPPED
from diffsight.errors import InputError
from diffsight.extending import Asked, Run, Target, flow_of, target_of


class Tracer(TracerFunctions, Run):
    """A run with the names of nnsight's tracer and invoker."""

    _generates = False
    _has_input = False  # False where the inputs come from `invoke`
    _first_inputs: Sequence[tuple] = ()  # the arguments of the model's first call, once it has begun
    _rest: Callable[[], RepeatedBlock] | None = None  # what follows `layers.all()` in the block

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        join_sessions(self)

    @property
    def invoker(self) -> "Tracer":
        """The last invoke; the run itself if it was opened with an input."""
        return self._pass

    @property
    def inputs(self) -> tuple[tuple, dict]:
        """The model's arguments, as `(args, kwargs)`. Token ids are `inputs[0][0]["input_ids"]`."""
        args, kwargs = self._first_inputs[0] if self._first_inputs else self._root().inputs
        return ((kwargs,), {}) if "input_ids" in kwargs and not args else (args, kwargs)

    @property
    def output(self) -> Any:
        """What the model returned; after several invokes, a list with one result for each."""
        if self._invoked:
            return self.result if len(self._invoked) > 1 else self.invoker.output
        return self.result if self._flow.has_result else self._root().output

    @property
    def iter(self) -> Iterations:
        """Steps by number: `with tracer.iter[0:3] as step:` or `for step in tracer.iter[:]:`."""
        return iterations_of(self._current_pass())

    def all(self) -> Iterations:
        """Repeat a block for every step: `with tracer.all():`.

        As a statement, `tracer.all()` repeats what follows it in the block of the trace."""
        return repeat_all(self._current_pass(), sys._getframe(1))

    def next(self, step: int = 1) -> "Tracer":
        """Run the model to the next step (the next token), or to the one `step` steps ahead."""
        flow = flow_of(self._current_pass())
        for _ in range(step + (flow.scope.step < 0)):
            flow.next_step()
        return self

    def stop(self) -> None:
        """End the model here, and leave the block."""
        super().stop()
        if any(tracer is self for tracer in _entered.get()):
            raise BlockStopped

    def barrier(self, parties: int) -> Callable[[], None]:
        """Return a function that does nothing: each invoke has ended when the next one begins."""
        return lambda: None

    def invoke(self, *args: Any, **kwargs: Any) -> "Tracer":
        """Open a forward pass with its own input, see `Run.invoke`."""
        if not args and not kwargs:
            raise InputError("invoke() opens a forward pass and needs an input. For the whole batch, use run.rows")
        return super().invoke(*args, **kwargs)

    def cache(self, *args: Any, **kwargs: Any) -> None:
        """Raise an error that names the method to use instead."""
        raise InputError(
            'tracer.cache() is not supported: write `kept = tracer.record("transformer.h[*]")`, a dictionary of paths '
            "and values"
        )

    def __enter__(self) -> "Tracer":
        super().__enter__()
        _entered.set((*_entered.get(), self))
        if self._has_input:
            self._keep_first_inputs()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> bool:
        try:
            return self._leave(kind, error, trace)
        finally:
            _entered.set(tuple(tracer for tracer in _entered.get() if tracer is not self))

    def _leave(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> bool:
        is_stopped = isinstance(error, BlockStopped)
        if is_stopped:
            self._flow.close(STOPPED)
        elif error is None and self._rest is not None and self._flow.outcome is None:
            self._repeat_rest()
        add_hint(error, trace)
        super().__exit__(kind, error, trace)
        return is_stopped

    def _keep_first_inputs(self) -> None:
        kept = self._first_inputs = []

        def keep(tap: Any, call: int, inputs: tuple) -> None:
            if call == 0 and not kept:
                kept.append(inputs)

        self._flow.keep(Asked(target_of(self._model), "inputs"), keep)

    def _repeat_rest(self) -> None:
        """Run what follows `layers.all()` for the remaining steps. It has run where it is written for the first."""
        with advising(WRITE_A_LOOP):
            rest, self._rest = self._rest(), None
        try:
            rest.run(self.steps)
        except BlockStopped:
            self._flow.close(STOPPED)

    def _has_own_steps(self) -> bool:
        """Return False for a run that gets its inputs from `invoke`."""
        return self._again is None or self._has_input

    def _current_pass(self) -> "Tracer":
        """The run whose steps are meant: the last invoke while it is open."""
        return self.invoker if flow_of(self.invoker).outcome is None else self


_entered: ContextVar[tuple[Tracer, ...]] = ContextVar("diffsight_entered", default=())


def entered_tracers() -> tuple[Tracer, ...]:
    """Return the tracers whose blocks are around this line, outermost first."""
    return _entered.get()


def describe_opening(tracer: Tracer, generates: bool, has_input: bool) -> Tracer:
    """Note how a tracer was opened: by `generate` or `trace`, with an input or to be given inputs by `invoke`."""
    tracer._generates, tracer._has_input = generates or tracer._generates, has_input
    return tracer


def iterations_of(tracer: Tracer) -> Iterations:
    """Return the steps of a run, to choose from.

    Raises:
        InputError: The run has no steps of its own, since each of its invokes has.
    """
    if not tracer._has_own_steps():
        raise InputError(
            "each invoke has its own steps: write `with tracer.all():` (or `tracer.iter[...]`) inside "
            "`with tracer.invoke(...):`"
        )
    return Iterations(tracer.steps)


def repeat_all(tracer: Tracer, frame: FrameType) -> Iterations:
    """Repeat a block for every step of a run: that of the `with` statement which `frame` enters, or else the rest of
    the block that `frame` is in."""
    steps = iterations_of(tracer)
    with advising(WRITE_A_LOOP):
        rest = rest_of_block(frame)
    if rest is None:
        return steps
    if current_edit() is not None:
        raise InputError("in an edit, write `with model.all():` around what to do at each step")
    tracer._rest = rest
    if flow_of(tracer).scope.step < 0:
        flow_of(tracer).next_step()
    return steps


def move_to_next(tracer: Tracer, target: Target) -> int | None:
    """Move on for `layer.next()`.

    Returns:
        None in a run that generates, where this goes to the next step. In a run of one pass, the number of the
        module's next call.
    """
    if tracer._generates:
        tracer.next()
        return None
    calls = tracer.__dict__.setdefault("_next_calls", {})
    calls[target.key] = calls.get(target.key, 0) + 1
    return calls[target.key]
