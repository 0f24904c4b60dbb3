"""`with model.trace(x) as tracer:`: a run with the methods of nnsight's tracer."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from functools import partial
from types import FrameType, TracebackType
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from diffsight.compat.activation_cache import ActivationCache, cache_of
from diffsight.compat.block_stopped import BlockStopped
from diffsight.compat.error_notes import add_hint
from diffsight.compat.functions import TracerFunctions
from diffsight.compat.invoke_notes import InvokeNotes, check_draws, check_draws_on_server
from diffsight.compat.iterations import WRITE_A_LOOP, Iterations, IterationsOfInvokes, calls_in, steps_in
from diffsight.compat.joined_inputs import joined_inputs, joined_seeds
from diffsight.compat.later_gradients import reading_gradients
from diffsight.compat.repeated_blocks import OWN_STEPS, RepeatedBlock, rest_of_block
from diffsight.compat.sessions import join_sessions
from diffsight.compat.tracer_flow import to_tracer_flow
from diffsight.engine.capture import advising
from diffsight.engine.innermost_run import current_edit
from diffsight.engine.run_end import STOPPED
from diffsight.errors import DiffsightError, InputError, PointNotFoundError
from diffsight.extending import Asked, Run, Target, flow_of, target_of, tree_of
from diffsight.remote import is_on_server


class Tracer(TracerFunctions, Run):
    """A run with the methods of nnsight's tracer and invoker."""

    _generates = False
    _has_input = False  # False where the inputs come from `invoke`
    _first_inputs: Sequence[tuple] = ()  # the arguments of the model's first call, once it has begun
    _rest: Callable[[], RepeatedBlock] | None = None  # the statements after `layers.all()` in the block
    _invoked_with: Sequence[tuple] = ()  # the inputs of its invokes

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        to_tracer_flow(self._flow)
        join_sessions(self)

    @property
    def result(self) -> Any:
        """The model's result: in the block of an invoke, of its pass; after several invokes, a list of results."""
        if self._rest is not None and self._flow.outcome is None:
            self._repeat_rest()
        is_open = bool(self._invoked) and any(tracer is self.invoker for tracer in _entered.get())
        return self.invoker.result if is_open else super().result

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
        """The model's output; after several invokes, a list with one output for each."""
        if self._invoked:
            return self.result if len(self._invoked) > 1 else self.invoker.output
        return self.result if self._flow.has_result else self._root().output

    @property
    def iter(self) -> Iterations:
        """The steps, selected by number: `with tracer.iter[0:3] as step:` or `for step in tracer.iter[:]:`."""
        return iterations_of(self._current_pass())

    def all(self) -> Iterations:
        """Repeat a block for every step: `with tracer.all():`.

        As a statement, `tracer.all()` repeats the rest of the trace's block."""
        return repeat_all(self._current_pass(), sys._getframe(1))

    def next(self, step: int = 1) -> "Tracer":
        """Run the model to the next step (the next token), or to the one `step` steps ahead."""
        flow = flow_of(self._current_pass())
        for _ in range(step + (flow.scope.step < 0)):
            flow.next_step()
        return self

    def stop(self) -> None:
        """Stop the model here, and leave the block."""
        super().stop()
        if any(tracer is self for tracer in _entered.get()):
            raise BlockStopped

    def barrier(self, parties: int) -> Callable[[], None]:
        """Return a function that does nothing: each invoke has ended when the next one begins."""
        return lambda: None

    def invoke(self, *args: Any, **kwargs: Any) -> "Tracer":
        """Open a forward pass with its own input; see `Run.invoke`. Without arguments, the pass has the inputs of all
        earlier invokes as one batch, and its values can only be read."""
        is_of_all = not args and not kwargs
        before = [flow_of(tracer).notes for tracer in self._invoked]
        if is_of_all:
            args, kwargs = self._joined_inputs(before)
        elif any(notes.is_of_all for notes in before):
            raise InputError(
                "an invoke() without an input has the inputs of all invokes, but this one comes after it and would be "
                "missing there: write the invoke() without an input last"
            )
        else:
            self._invoked_with = (*self._invoked_with, (args, kwargs))
        found = tree_leaves((args, kwargs, self._of_each_pass()))
        generators = [(one, one.get_state()) for one in found if isinstance(one, torch.Generator)]
        tracer = super().invoke(*args, **kwargs)
        flow_of(tracer).begin_notes(InvokeNotes(is_of_all, generators))
        if is_of_all and before[0].began is not None:
            flow_of(tracer).begin_in(before[0].began)
        return describe_opening(tracer, self._generates, has_input=True)

    def _of_each_pass(self) -> dict[str, Any]:
        """Return the arguments of the run, which apply to each invoke."""
        return getattr(self._again, "keywords", {})

    def _joined_inputs(self, before: list[InvokeNotes]) -> tuple[tuple, dict[str, Any]]:
        """Return the arguments of an invoke without input, which has the inputs of those before it as one batch."""
        if not before:
            raise InputError(
                "invoke() without an input uses the inputs of the invokes before it, but there is no invoke before it. "
                "For the rows of one pass, use run.rows"
            )
        for notes in before:
            notes.find_changes()
            if notes.changed:
                raise InputError(
                    f"invoke() without an input runs all inputs again, but an invoke before it has changed "
                    f"{notes.changed}, and the new pass would not include that change: read what you need in that "
                    "invoke, or trace all inputs at once and use run.rows"
                )
        if torch.is_inference_mode_enabled() or any(notes.reads_unseen for notes in before):
            raise InputError(
                "invoke() without an input, and the invokes before it, can only read values. Under "
                "torch.inference_mode() diffsight cannot tell whether a value was changed in place: use torch.no_grad()"
            )
        arguments, seeds_images = self._of_each_pass(), tree_of(self).seeds_images
        check_draws(before)
        if self._generates and is_on_server(self._model):
            check_draws_on_server(before, arguments, seeds_images)
        seeds = joined_seeds(self._invoked_with, arguments) if seeds_images else {}
        return (joined_inputs(self._invoked_with, self._model.__dict__.get("tokenizer")),), seeds

    def cache(
        self,
        modules: Sequence[Any] | None = None,
        device: torch.device | str | None = "cpu",
        dtype: torch.dtype | None = None,
        detach: bool = True,
        include_output: bool = True,
        include_inputs: bool = False,
        non_blocking: bool = False,
    ) -> ActivationCache:
        """Keep the outputs, and optionally the inputs, of many modules; see `ActivationCache`.

            cache = tracer.cache(modules=[model.transformer.h[0]])
            cache["model.transformer.h.0"].output, cache.transformer.h[0].output        # after the block

        Args:
            modules: Modules or their paths; None for all modules.
            device: The device to copy tensors to; None to leave them where they are.
            dtype: The type to convert floating-point tensors to.
            detach: Whether to detach them.
            include_output: Whether to keep outputs.
            include_inputs: Whether to keep inputs.
            non_blocking: Has no effect: copies are complete when they are kept.

        Raises:
            InputError: A value was already read or changed.
        """
        run = self._current_pass()
        if flow_of(run).coroutine is not None:
            raise InputError("tracer.cache() must come before reading or modifying a value of the model")
        return cache_of(run, self._model, modules, (device, dtype, detach), include_output, include_inputs)

    def __enter__(self) -> "Tracer":
        super().__enter__()
        _entered.set((*_entered.get(), self))
        self._gradients = reading_gradients()
        self._gradients.__enter__()
        if self._has_input:
            self._keep_first_inputs()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> bool:
        try:
            return self._leave(kind, error, trace)
        finally:
            self._gradients.__exit__(None, None, None)
            _entered.set(tuple(tracer for tracer in _entered.get() if tracer is not self))

    def _leave(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> bool:
        is_stopped = isinstance(error, BlockStopped)
        if is_stopped:
            self._flow.close(STOPPED)
        elif error is None and self._rest is not None and self._flow.outcome is None:
            self._repeat_rest()
        notes = self._flow.notes
        add_hint(error, trace, is_invoke=notes is not None)
        super().__exit__(kind, error, trace)
        if notes is not None:
            notes.end_block()
            if error is None:
                notes.check_read_only()
        return is_stopped

    # ---- a run that is used as if it were its result: `ids = model.generate(prompt)`

    def __getitem__(self, key: int | str | slice) -> Any:
        if not isinstance(key, str):
            self._check_not_result(f"run[{key!r}]")
        return super().__getitem__(key)

    def __iter__(self) -> Iterator[Any]:
        self._check_not_result("in a loop")
        return super().__iter__()

    def __len__(self) -> int:
        self._check_not_result("len(run)")
        return super().__len__()

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("_") and hasattr(torch.Tensor, name) and self._child(name) is None:
            self._check_not_result(f"run.{name}", PointNotFoundError)
        return super().__getattr__(name)

    def _check_not_result(self, use: str, kind: type[DiffsightError] = InputError) -> None:
        """Raise an error if the run generates and nobody has entered or begun it, so that its result is meant."""
        flow = self._flow
        if self._generates and not (flow.is_entered or flow.has_begun or flow.outcome is not None):
            raise kind(
                f"this is a run, which was used like its result ({use}): write `.result` after the call that opens it, "
                "as in model.generate(...).result"
            )

    def _keep_first_inputs(self) -> None:
        kept = self._first_inputs = []

        def keep(tap: Any, call: int, inputs: tuple) -> None:
            if call == 0 and not kept:
                kept.append(inputs)

        self._flow.keep(Asked(target_of(self._model), "inputs"), keep)

    def _repeat_rest(self) -> None:
        """Run the statements after `layers.all()` for the remaining steps. They ran in place for the first step."""
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
        """The run whose steps are counted: the last invoke while it is open, else this run."""
        return self.invoker if flow_of(self.invoker).outcome is None else self


_entered: ContextVar[tuple[Tracer, ...]] = ContextVar("diffsight_entered", default=())


def entered_tracers() -> tuple[Tracer, ...]:
    """Return the tracers whose blocks are around this line, outermost first."""
    return _entered.get()


def describe_opening(tracer: Tracer, generates: bool, has_input: bool) -> Tracer:
    """Note how a tracer was opened: by `generate` or `trace`, with an input or for later calls of `invoke`."""
    tracer._generates, tracer._has_input = generates or tracer._generates, has_input
    return tracer


def iterations_of(tracer: Tracer) -> Iterations:
    """Return the steps of a run, to choose from; for a run with invokes, the steps of each invoke."""
    if not tracer._has_own_steps():
        return IterationsOfInvokes(lambda: iterations_of(tracer._current_pass()))
    if tracer._generates:
        return Iterations(partial(steps_in, tracer.steps, flow_of(tracer)))
    return Iterations(partial(calls_in, flow_of(tracer)))


def repeat_all(tracer: Tracer, frame: FrameType) -> Iterations:
    """Repeat a block for every step of a run: the block of the `with` statement that `frame` enters, or else the rest
    of the block that `frame` is in."""
    steps = iterations_of(tracer)
    with advising(WRITE_A_LOOP):
        rest = rest_of_block(frame)
    if rest is None:
        return steps
    if not tracer._has_own_steps():
        raise InputError(OWN_STEPS)
    if current_edit() is not None:
        raise InputError("in an edit, write `with model.all():` around what to do at each step")
    tracer._rest = rest
    if flow_of(tracer).scope.step < 0:
        flow_of(tracer).next_step()
    return steps


def move_to_next(tracer: Tracer, target: Target) -> int | None:
    """Move to the next step or call for `layer.next()`.

    Returns:
        None in a run that generates, which moves to the next step; in a run of one pass, the number of the module's
        next call.
    """
    if tracer._generates:
        tracer.next()
        return None
    calls = tracer.__dict__.setdefault("_next_calls", {})
    calls[target.key] = calls.get(target.key, 0) + 1
    return calls[target.key]
