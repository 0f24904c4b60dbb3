"""Runs: one execution of a model, open to the body that reads and changes its values.

with model.trace(x) as run:
    hidden = run.layers[4].output        # the model has run this far and waits
    run.ln_final.input = hidden
run.result                               # what the model returned

run = model.trace(x)                     # or left open: look, change, then
run.finish()
"""

import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any

import torch

from diffsight.engine.batch_slicing import Indexed
from diffsight.engine.points import Asked, first_input
from diffsight.engine.run_end import STOPPED
from diffsight.engine.run_to_point import Flow
from diffsight.engine.target import Target
from diffsight.engine.threads import THIS_THREAD
from diffsight.engine.users_line import end_at_users_line, from_the_asking_line, is_from_edit
from diffsight.envoy import (
    Envoy,
    InRun,
    fetch,
    flow_of,
    hint_at,
    keep_attribute_error,
    narrowed,
    raise_kept,
    root_of,
    selection_of,
    target_of,
    tell_of_child,
    tree_of,
)
from diffsight.errors import DiffsightError, InputError, PointNotFoundError, ScanError, warn_user
from diffsight.recorded_values import Record, find_point, record
from diffsight.rows import Row, call_body, each, make_rows
from diffsight.steps import Step, Steps


class Run(InRun):
    """One execution of a model. Nothing runs until the first value is asked for, the block ends, or the result is read.

    `run.<path>` are the model's envoys, bound to this run."""

    _if_unread: Callable[[], None] | None = None  # called if the run is dropped before anything ran

    def __init__(
        self,
        model: Envoy,
        flow: Flow,
        sizes: Sequence[int] = (),
        again: "Callable[..., Run] | None" = None,
    ) -> None:
        # sizes: how many entries of the batch each input takes; again: opens a run of the same kind with other inputs
        super().__init__(model, flow)
        self.__dict__.update(_sizes=sizes, _again=again, _invoked=[], _is_view=False)
        flow.run = weakref.ref(self)
        flow.tree.open_runs.add(flow)

    @property
    def result(self) -> Any:
        """The model's return value. Reading it runs the model to its end. After `invoke`, a list with one result per
        pass.

        Raises NeverReachedError if there are assignments that the model did not reach."""
        tell_of_child(tree_of(self), tree_of(self).root, "result", 2)
        if self._invoked:
            return [run.result for run in self._invoked]
        flow = self._flow
        try:
            result = flow.run_to_end()
            if flow.unreached or flow.refused:
                flow.check_assignments()
        except Exception as error:
            keep_attribute_error(self, error)
            if isinstance(error, DiffsightError):
                raise from_the_asking_line(error) from error.__cause__
            raise
        return result

    def finish(self) -> Any:
        """Run the model to its end; return its result."""
        return self.result

    def stop(self) -> None:
        """End the model where it stands. Values that were read stay valid.

        Sometimes only the end of a call shows whether a value read in it was the intended one, for example the
        attention probabilities of a module that may compute several products. The model then ends after that call."""
        flow = flow_of(self._pass)
        flow.check_thread("run.stop")
        flow.finish_undecided()
        flow.close(STOPPED)
        flow.check_refused()

    @property
    def steps(self) -> Steps:
        """The run's steps, as the model enters them: `for step in run.steps:`, or only some: `run.steps[10:20]`."""
        run = self._pass
        return Steps(flow_of(run), run._make_step)

    @property
    def rows(self) -> tuple[Row, ...]:
        """One view per input: `x, y, z = run.rows`. Raises InputError if the input is not a batch."""
        run = self._pass
        tell_of_child(tree_of(self), tree_of(self).root, "rows", 2)
        if not run._sizes:
            raise InputError("this run has no rows: none of its inputs is a batch of tensors")
        return make_rows(run, run._sizes)

    def each(self, functions: Callable[[Row], Any] | Sequence[Callable[[Row], Any]]) -> list[Any]:
        """Run a function for every row during a single forward pass, each at its own position in the model.

            def body(row):
                row.layers[2].output = clean
                return row.lm_head.output[:, -1]

            answers = run.each(body)

        Args:
            functions: One function for all rows, or a list with one function per row.

        Returns:
            A list of their return values.
        """
        return each(self.rows, functions)

    def invoke(self, *args: Any, **kwargs: Any) -> "Run":
        """Open a separate pass inside a run that was opened without input. Arguments of the run apply to each pass.

            with model.trace() as run:
                with run.invoke(a):
                    clean = model.layers[5].output
                with run.invoke(b) as part:
                    model.layers[2].output = clean      # any value of an earlier pass is available
            first, second = run.result

        Each pass runs where it is written; `part.inputs` are its inputs as the model gets them. The names of the run
        itself (`run.<path>`, `run.steps`, `run.rows`, `run.stop()`) refer to the last pass; only `run.result` has
        the results of all passes."""
        self._flow.check_leads("run.invoke")
        if self._again is None or self._flow.has_begun or (self._flow.outcome is not None and not self._invoked):
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
        """Keep the values of many points.

            kept = run.record("layers[*]", device="cpu", dtype=torch.float16)
            run.finish()
            kept["layers[3].output"]        # filled once the model has been there
            kept.nbytes

        Args:
            patterns: Paths, or patterns such as `layers[*].mlp` and `unet.**.attn2.output`.
            device: Copy tensors to this device.
            dtype: Convert floating-point tensors to this type.
            detach: Whether to detach and copy tensors. If False, they stay part of the graph, and may be the model's
                own. If the model then changes one of these in place, that is an error.

        Returns:
            A dictionary of path to value, see `Record`. A point that the model passes more than once has a list with
            one value per call; in a loop over steps, one per step. Other objects, such as arrays and caches of keys
            and values, are copied with their tensors.

        Raises:
            PointNotFoundError: A pattern matches nothing.
            OutOfOrderError: The model has already passed one of the points.
        """
        return record(self._pass, patterns, device, dtype, detach)

    def follow(self, path: str, function: Callable[[Any], Any]) -> None:
        """Call `function` with every value that passes a point from now on, in every call and every step.

            norms = []
            run.follow("layers[3].output", lambda hidden: norms.append(hidden.norm()))

        The function gets the value that the model continues with, including all edits. What it returns is ignored.

        Args:
            path: The path of a point. Without `.input`, `.inputs` or `.output` at its end it means the output.
            function: Takes the value.

        Raises:
            PointNotFoundError: The path does not exist.
            OutOfOrderError: The model has already passed the point.
        """
        run = self._pass
        points, part = find_point(root_of(run), path, "follow")
        asked = Asked(target_of(points), part)

        def keep(tap: Any, call: int, value: Any) -> None:
            function(first_input(value, asked) if part == "input" else value)

        try:
            flow_of(run).keep(asked, keep)
        except DiffsightError as error:
            raise from_the_asking_line(error) from error.__cause__

    def at(self, path: str, index: Any) -> torch.Tensor:
        """Return `tensor[index]` of the tensor at a point: a view of it, to read or to change in place.

            last = run.at("layers[4].output", (slice(None), -1))     # the same as run.layers[4].output[:, -1]
            last += direction

        In a remote run only this part is sent.

        Args:
            path: The path of a point. Without `.input`, `.inputs` or `.output` at its end it means the output.
            index: An index, a slice, a mask, or a tuple of them.

        Raises:
            PointNotFoundError: The path does not exist.
            InputError: The value is not a tensor, or the index does not fit its shape.
        """
        points, part = find_point(root_of(self._pass), path, "at")
        return fetch(narrowed(points, Indexed(index, selection_of(points))), part)

    def backward(self, loss: torch.Tensor) -> None:
        """Compute the gradients of a loss, in a run that was opened with `grad=True`. It is `loss.backward()`, but also
        works if the model is on a server.

            with model.trace(x, grad=True) as run:
                hidden = run.layers[2].output
                hidden.retain_grad()
                run.backward(run.logits[0, -1, 5])
            hidden.grad

        In a remote run, the part of the graph that is on the server is computed there. Call it in the block, on values
        that were read there.

        Args:
            loss: A tensor with one element. Its graph is kept.
        """
        try:
            flow_of(self._pass).backward(loss)
        except DiffsightError as error:
            raise from_the_asking_line(error) from error.__cause__

    def __enter__(self) -> "Run":
        flow = self._flow
        try:
            flow.is_entered = True
            flow.tree.open_runs.add(flow)
            flow.note_block(sys._getframe(1).f_code)
            flow.enter_body()
        except BaseException:  # interrupted: the block does not begin, so Python would not call __exit__
            self._close_all([flow])
            raise
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        flows = [self._flow]
        try:
            self._flow.leave_body()
            flows = [flow_of(run) for run in self._invoked] if self._invoked else flows
            for flow in flows if error is None else ():
                if flow.outcome is None:
                    flow.run_on()  # perhaps until an edit stops it
                if flow.has_result and (flow.unreached or flow.refused):
                    flow.check_assignments()
        except DiffsightError as problem:
            raise from_the_asking_line(problem) from problem.__cause__
        finally:
            try:
                self._close_all(flows)
            except BaseException:  # an interrupt may come between any two lines
                self._close_all(flows)
                raise
        if isinstance(error, DiffsightError) and not is_from_edit(error):
            end_at_users_line(trace, call_body.__code__)

    def _close_all(self, flows: list[Flow]) -> None:
        self._flow.leave_body()
        self._flow.is_entered = False
        for flow in flows:
            if flow.thread == THIS_THREAD.number:  # otherwise it is still open for the thread that it belongs to
                flow.close("an error ended its body")

    # ---- for wrappers, see `diffsight.extending`

    def _make_step(self, index: int, path: str, call: tuple[tuple, dict]) -> Step:
        """Return what `run.steps` yields; wrappers override it.

        `path` is the path of the component whose call began the step; `call` holds the args and kwargs of that call."""
        return Step(index, path or tree_of(self).title, call)

    def _own_target(self, path: str) -> Target | None:
        """Return the target of a path that belongs to the run, not to the model, such as the choice of a token."""
        return None

    @property
    def _pass(self) -> "Run":
        """The run that names of this run refer to: itself, or its last pass."""
        return self._invoked[-1] if self._invoked else self

    def _check_one_pass(self, name: str) -> None:
        """Raise InputError if the run has several passes, each of which has a value called `name`."""
        if self._invoked:
            raise InputError(
                f"run.{name}: each pass of this run has its own. Open the pass with `with run.invoke(...) as part:` "
                f"and use part.{name}, or use run.result, a list with one result per pass"
            )

    def _check_no_scan(self, name: str) -> None:
        """Raise ScanError if the run is a scan, in which a value called `name` would be made of zeros."""
        if self._flow.is_scan:
            raise ScanError(
                f"run.{name}: a scan computes shapes only, so there is nothing to show. Use a real run, or read the "
                "shape of a value in the scan"
            )

    # ---- the model's envoys

    def _root(self) -> Envoy:
        """The model's handle, bound to this run, or to its last pass."""
        return root_of(self._pass)

    def __getattr__(self, name: str) -> Any:
        raise_kept(self)
        if name.startswith("__") or "_flow" not in self.__dict__:
            raise AttributeError(name)
        try:
            return getattr(root_of(self._pass), name)
        except PointNotFoundError:
            if name in ("input", "inputs", "output"):
                raise
            hint = hint_at(root_of(self._pass), name, dir(self))
            raise PointNotFoundError(f"{tree_of(self).title} has no {name!r}{hint}") from None

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            object.__setattr__(self, name, value)
        else:
            setattr(self._root(), name, value)

    def __getitem__(self, key: int | str | slice) -> Any:
        return self._root()[key]

    def __iter__(self) -> Iterator[Any]:
        return iter(self._root())

    def __reversed__(self) -> Iterator[Any]:
        return reversed(self._root())

    def __contains__(self, item: Any) -> bool:
        return item in self._root()

    def __len__(self) -> int:
        return len(self._root())

    def __bool__(self) -> bool:
        return True

    def __dir__(self) -> list[str]:
        tree = tree_of(self)
        return sorted({*super().__dir__(), *tree.names_in(tree.root)})

    def __repr__(self) -> str:
        state = self._flow.outcome or f"open, the model is {self._flow.where}"
        return f"<{type(self).__name__} of {tree_of(self).title}: {state}>"

    def __del__(self) -> None:
        flow = self.__dict__.get("_flow")
        if flow is not None and not self.__dict__.get("_is_view"):
            try:
                self._drop(flow)
            except BaseException:  # an interrupt may come between any two lines
                self._drop(flow)
                raise

    def _drop(self, flow: Flow) -> None:
        if flow.is_cleared:
            return
        undecided = flow.undecided()
        is_unread = not flow.has_begun and flow.outcome is None
        if flow.is_entered and flow.thread == THIS_THREAD.number:
            flow.leave_body()
        flow.close("the run was dropped")
        if is_unread and self._if_unread is not None:
            self._if_unread()
        for value, calls in undecided:
            warn_user(
                f"the run was dropped during the call of {calls} in which {value} was read, so diffsight cannot tell "
                "whether that call would have computed a second product. Call run.stop() or run.finish()"
            )


def call_if_unread(run: Run, function: Callable[[], None]) -> None:
    """Call a function if a run is dropped before anything ran."""
    run._if_unread = function


def own_target(run: Run, path: str) -> Target | None:
    """Return the target of a path that belongs to a run, not to the model; None for any other path."""
    return run._own_target(path)


def make_step(run: Run, index: int, path: str, call: tuple[tuple, dict]) -> Step:
    """Return the step of a run that a call has begun, as `run.steps` yields it."""
    return run._make_step(index, path, call)
