"""Runs: one execution of a model, open to the body that reads and changes its values.

with model.trace(x) as run:
    hidden = run.layers[4].output        # the model ran this far and waits
    run.ln_final.input = hidden
run.result                               # what the model returned

run = model.trace(x)                     # or left open: look, change, then
run.finish()
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from threading import get_ident
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch

from diffsight.edits import current_edit, is_from_edit
from diffsight.engine.flow import STOPPED, Flow
from diffsight.envoy import Envoy, from_the_asking_line, keep_attribute_error, raise_kept
from diffsight.errors import DiffsightError, InputError, OutOfOrderError, PointNotFoundError, suggest
from diffsight.record import Record, record
from diffsight.rows import Row, call_body, each, make_rows

if TYPE_CHECKING:
    from diffsight.model import Model


class Run:
    """One execution of a model. Nothing runs before the first value is asked for, the block ends or the result is read.

    `run.<path>` are the model's envoys, bound to this run."""

    def __init__(
        self,
        model: "Model",
        flow: Flow,
        sizes: Sequence[int] = (),
        again: "Callable[..., Run] | None" = None,
    ) -> None:
        # sizes: how many entries of the batch each input takes; again: opens a run of the same kind with other inputs
        self.__dict__.update(_model=model, _flow=flow, _sizes=sizes, _again=again, _invoked=[], _entered=False)
        self.__dict__.update(_opened_in=current_edit(), _is_view=False)
        model._open(self)

    @property
    def result(self) -> Any:
        """What the model returned; runs the model to its end first. After `invoke`, a list with one result a pass.

        Raises NeverReachedError for assignments the model never came to."""
        if self._invoked:
            return [run.result for run in self._invoked]
        flow = self._flow
        try:
            result = flow.run_to_end()
            if flow.unreached:
                flow.raise_unreached()
        except Exception as error:
            keep_attribute_error(self, error)
            if isinstance(error, DiffsightError):
                raise from_the_asking_line(error) from error.__cause__
            raise
        return result

    def finish(self) -> Any:
        """Runs the model to its end; gives its result."""
        return self.result

    def stop(self) -> None:
        """Ends the model where it stands; what was read stays valid."""
        flow = self._pass._flow
        flow._check_thread("run.stop")
        flow.close(STOPPED)

    @property
    def steps(self) -> "Steps":
        """The run's steps, as the model enters them: `for step in run.steps:`, or a part, `run.steps[10:20]`."""
        return Steps(self._pass)

    @property
    def rows(self) -> tuple[Row, ...]:
        """One view per input: `x, y, z = run.rows`. Raises InputError where no batch was given."""
        run = self._pass
        if not run._sizes:
            raise InputError("this run has no rows: none of its inputs is a batch of tensors")
        return make_rows(run, run._sizes)

    def each(self, functions: Callable[[Row], Any] | Sequence[Callable[[Row], Any]]) -> list[Any]:
        """Runs a function for every row (or a list of functions, one a row) over the one forward pass, each at its own
        place in the model; gives what they return.

            def body(row):
                row.layers[2].output = clean
                return row.lm_head.output[:, -1]

            answers = run.each(body)
        """
        return each(self.rows, functions)

    def invoke(self, *args: Any, **kwargs: Any) -> "Run":
        """A pass of its own, inside a run that was opened without input; what was given there is given to each pass.

            with model.trace() as run:
                with run.invoke(a):
                    clean = model.layers[5].output
                with run.invoke(b) as part:
                    model.layers[2].output = clean      # any value of an earlier pass is there
            first, second = run.result

        Each pass runs where it stands; `part.inputs` are its inputs as the model gets them. What is asked of the run
        itself (`run.<path>`, `run.steps`, `run.rows`, `run.stop()`) is asked of the last pass; only `run.result` is of
        all."""
        self._flow._check_leads("run.invoke")
        if self._again is None or self._flow.taps or (self._flow.outcome is not None and not self._invoked):
            raise InputError("invoke needs a run that was opened without input: `with model.trace() as run:`")
        self._flow.close("its passes are those of run.invoke(...)")
        self._invoked.append(self._again(*args, **kwargs))
        return self._invoked[-1]

    def record(
        self,
        patterns: str | Iterable[str],
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        detach: bool = True,
    ) -> Record:
        """Keeps many points in one go: paths, or patterns such as `layers[*].mlp` and `unet.**.attn2.output`.

            kept = run.record("layers[*]", device="cpu", dtype=torch.float16)
            run.finish()
            kept["layers[3].output"]        # filled when the model has come there
            kept.nbytes

        Gives a dictionary of path to value, see `Record`; before a loop over steps a list, one value a step. Tensors
        are copies, on `device` and (floating point) of type `dtype` where these are given; with `detach=False` they
        stay part of the graph and may be the model's own. Objects that hold tensors, such as a cache of keys and
        values, are copied with them, and counted.

        Raises PointNotFoundError where a pattern matches nothing, OutOfOrderError for what the model has passed."""
        return record(self._pass, patterns, device, dtype, detach)

    def __enter__(self) -> "Run":
        self.__dict__["_entered"] = True
        self._model._open(self)
        self._flow.body_mode.__enter__()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._flow.body_mode.__exit__(None, None, None)
        runs = self._invoked or [self]
        try:
            for run in runs if error is None else ():
                if run._flow.outcome is None:
                    run._flow.run_on()  # perhaps until an edit stops it
                if run._flow.has_result and run._flow.unreached:
                    run._flow.raise_unreached()
        except DiffsightError as told:
            raise from_the_asking_line(told) from told.__cause__
        finally:
            self.__dict__["_entered"] = False
            for run in runs:
                if run._flow.thread == get_ident():  # else it is still open for the thread that it belongs to
                    run._flow.close("an error ended its body")
        if isinstance(error, DiffsightError) and not is_from_edit(error):
            _end_at_users_line(trace)

    def _seen_by_edit(self) -> "Run":
        """The same run, for an edit to hold: when it is dropped, the run is not."""
        view = object.__new__(type(self))
        view.__dict__.update(self.__dict__, _is_view=True)
        return view

    def _make_step(self, index: int, path: str, call: tuple[tuple, dict]) -> "Step":
        return self._model._make_step(index, path, call)

    @property
    def _pass(self) -> "Run":
        """What is meant by a name of the run: the run itself, or its last pass."""
        return self._invoked[-1] if self._invoked else self

    def _check_one_pass(self, name: str) -> None:
        if self._invoked:
            raise InputError(
                f"run.{name}: each pass of this run has its own. Ask the pass, `with run.invoke(...) as part:` and "
                f"part.{name}, or run.result, a list with one result a pass"
            )

    def _root(self) -> Envoy:
        """The model's handle, bound to this run, or to its last pass."""
        return self._model._bound(self._pass)

    def __getattr__(self, name: str) -> Any:
        raise_kept(self)
        if name.startswith("__") or "_flow" not in self.__dict__:
            raise AttributeError(name)
        try:
            return getattr(self._root(), name)
        except PointNotFoundError:
            if name in ("input", "inputs", "output"):
                raise
            names = [n for n in dir(self) if not n.startswith("_")]
            raise PointNotFoundError(f"{self._model._title()} has no {name!r}{suggest(name, names)}") from None

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            object.__setattr__(self, name, value)
        else:
            setattr(self._root(), name, value)

    def __getitem__(self, key: int | str | slice) -> Any:
        return self._root()[key]

    def __iter__(self) -> Iterator[Envoy]:
        return iter(self._root())

    def __len__(self) -> int:
        return len(self._root())

    def __bool__(self) -> bool:
        return True

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *self._model._names()})

    def __repr__(self) -> str:
        state = self._flow.outcome or f"open, the model stands {self._flow._where()}"
        return f"<{type(self).__name__} of {self._model._title()}: {state}>"

    def __del__(self) -> None:
        flow = self.__dict__.get("_flow")
        if flow is not None and not self.__dict__.get("_is_view"):
            flow.close("the run was dropped")


class Step:
    """One step of a run. `index` counts from 0; `component` names the part of the model whose call began it."""

    def __init__(self, index: int, component: str, call: tuple[tuple, dict], model: "Model") -> None:
        self.index = index
        self.component = component
        self._call = call
        self._model = model

    def __repr__(self) -> str:
        return f"<step {self.index} of {self.component}>"


class Steps:
    """The steps of a run, in order; a slice of them is one of these again."""

    def __init__(self, run: Run, chosen: slice = slice(None)) -> None:
        for bound, least in ((chosen.start, 0), (chosen.stop, 0), (chosen.step, 1)):
            if bound is not None and (not isinstance(bound, int) or bound < least):
                raise InputError(
                    f"run.steps is cut by numbers from {least} on, not {bound!r}: how many come is not known"
                )
        self._run, self._chosen = run, chosen

    def __getitem__(self, chosen: slice) -> "Steps":
        if not isinstance(chosen, slice):
            raise TypeError(f"run.steps is walked through: write `for step in run.steps[{chosen}:{chosen}+1]`")
        if self._chosen != slice(None):
            raise TypeError("run.steps can be cut once")
        return Steps(self._run, chosen)

    def __iter__(self) -> Iterator[Step]:
        flow, chosen = self._run._flow, self._chosen
        first, last, stride = chosen.start or 0, chosen.stop, chosen.step or 1
        if chosen != slice(None) and (flow.clock.index > first or flow.scope.step >= first):
            raise OutOfOrderError(
                f"run.steps[{first}:] was asked for too late: the model is in step {flow.clock.index}"
            )
        try:
            while last is None or max(flow.scope.step + 1, first) < last:
                if not flow.next_step():
                    return
                index = flow.scope.step
                if index >= first and (index - first) % stride == 0 and (last is None or index < last):
                    tap, args, kwargs = flow.clock.call
                    yield self._run._make_step(index, tap.target.path, (args, kwargs))
        finally:
            flow.leave_steps()


def _end_at_users_line(trace: TracebackType) -> None:
    """Cuts a traceback that begins in the user's code behind the line that asked: that of the innermost body."""
    asked, is_users = trace, True
    while trace is not None:
        frame = trace.tb_frame
        is_engines = (frame.f_globals.get("__package__") or "").split(".")[0] == __package__
        is_users = frame.f_code is call_body.__code__ or (is_users and not is_engines)
        asked = trace if is_users and not is_engines else asked
        trace = trace.tb_next
    asked.tb_next = None


# ---- what wrappers and the rest of the engine ask of a run, see `diffsight.extending`


def flow_of(run: Run) -> Flow:
    """Return what moves the model in a run."""
    return run._flow


def run_of(bound: Any) -> Run | None:
    """Return the run that a handle, or a view of a run, is bound to."""
    return bound._run


def part_of(bound: Any) -> Any:
    """Return the part of the batch that a handle, or a view of a run, is narrowed to."""
    return bound._part
