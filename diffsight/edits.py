"""Edits: interventions that stay on a model until they are cleared.

    with model.edit() as edited:                       # a copy that shares the weights; inplace=True edits the model
        edited.layers[2].output[:] = 0                 # runs in every later run, not here
    edited.trace(x)

    @model.edit                                        # the same from a function; `edited` is the copy
    def edited(run):
        run.layers[2].output[:] = 0

    edited.layers[0].sae = SAE()                       # a module attached to the copy, for edits to use:
    with edited.edit(inplace=True):
        edited.layers[0].output = edited.layers[0].sae(edited.layers[0].output, hook=True)

In a run, every edit is a body of its own, with its own position in the model's execution. When the model reaches a
point, the edits have their turn first, in the order in which they were made. The body that opened the run comes last,
and sees their changes.
"""

import inspect
import textwrap
import warnings
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from diffsight.engine.attached_modules import AttachedModules
from diffsight.engine.capture import Block, Deferred
from diffsight.engine.coroutine import current
from diffsight.engine.innermost_run import current_edit
from diffsight.engine.order import Scope
from diffsight.engine.points import PointKey
from diffsight.engine.tapped_call import Tap
from diffsight.engine.torch_state import TorchState
from diffsight.engine.turns import Body, Course
from diffsight.engine.users_line import is_from_edit, set_from_edit
from diffsight.envoy import InRun, flow_of
from diffsight.errors import InputError


@dataclass(eq=False)
class Edit:
    """One edit. `function` takes the run, `where` is the line on which it was written, and `touches` lists the paths
    of the points that it has read or assigned so far."""

    function: Callable[[Any], Any] = field(repr=False)
    where: str
    touches: dict[str, None] = field(default_factory=dict)
    attached: dict[tuple[int, str], nn.Module] = field(default_factory=dict, repr=False)  # by owner and name

    @property
    def source(self) -> str | None:
        """The source of the block or the function, or None if it is not available."""
        if isinstance(self.function, Block):
            return self.function.source
        try:
            return textwrap.dedent(inspect.getsource(inspect.unwrap(self.function)))
        except (OSError, TypeError):
            return None

    def __repr__(self) -> str:
        touches = f", touches {', '.join(self.touches)}" if self.touches else ""
        return f"<edit at {self.where}{touches}>"


class Edits(list[Edit]):
    """The edits of a model, in the order in which they were made, and the modules that were attached for them."""

    def __init__(self, attached: AttachedModules, edits: Iterable[Edit] = ()) -> None:
        super().__init__(edits)
        self._attached = attached

    def clear(self) -> None:
        """Remove all edits and all attached modules."""
        super().clear()
        self._attached.clear()


class Editing(Deferred):
    """The result of `model.edit(...)`: a context manager around the edit's block, or a decorator for its function.

    Args:
        model: The model that is edited, or its copy.
        edits: The model's edits; the new one is added to them.
        is_copy: Whether it is a copy, which only the name in `as` keeps.
    """

    _instead = "Write the block as a function that takes the run, and pass that: `edited = model.edit(function)`"

    def __init__(self, model: Any, edits: Edits, is_copy: bool) -> None:
        self._model, self._edits, self._is_copy = model, edits, is_copy

    def __call__(self, function: Callable[..., Any]) -> Any:
        """Add a function as an edit; return the edited model."""
        if not callable(function):
            raise InputError(
                f"model.edit takes a function, or is used in a `with` statement; it was given {function!r}"
            )
        self._edits.append(Edit(_taking_run(function), _place(function)))
        return self._model

    def _given(self) -> Any:
        if self._is_copy and not self._block.is_bound:
            raise InputError(
                "the edited copy of the model is bound to no name, so it would be lost: write `with model.edit() as "
                "edited:`, or `with model.edit(inplace=True):` to edit the model itself"
            )
        return self._model

    def _take(self, block: Block) -> None:
        self._edits.append(Edit(block, block.where))


class EditBody(Body):
    """An edit in one run. A point that never comes ends the edit silently.

    Args:
        function: The edit.
        flow: The run.
        state: The PyTorch state in which the run was opened.
        order: The number of the edit, which determines its turn.
        where: The line at which the edit was written.
        touches: Collects the paths of the points that the edit reads and assigns.
        attached: The modules that the edit has attached so far, in any run, by owner and name.
    """

    is_edit = True
    view: Any = None  # the edit's own view of the run, once it has started

    def __init__(
        self,
        function: Callable[[], Any],
        flow: Course,
        state: TorchState,
        order: int,
        where: str,
        touches: dict[str, None],
        attached: dict[tuple[int, str], Any],
    ) -> None:
        super().__init__(function, flow, state)
        self.scope = Scope(order)
        self.where, self.touches, self.attached = where, touches, attached
        self.met = False  # whether the model has reached anything that the edit asked for

    def waits_for(self, tap: Tap, key: PointKey) -> bool:
        """Whether the edit waits for a point."""
        return not self.dead and (tap, key) in self.waits

    def go(self, state: TorchState | None = None) -> Any:
        try:
            return super().go(state)
        except BaseException as error:
            if not is_from_edit(error):
                set_from_edit(error)
                error.add_note(f"(in the edit written at {self.where})")
            self.flow.close("an edit failed")
            raise

    def end(self, continues: bool) -> None:
        """The run is over. A loop over steps ends and, with `continues`, the code after it runs.

        An edit that is still waiting for a point is unwound there."""
        if self is current():
            return
        if self.flow.has_result and not self.met and self.touches:
            path = next(iter(self.touches))
            message = f"the edit at {self.where} did nothing in this run: the model never reached {path}"
            warnings.warn(message, stacklevel=1)
        if self.has_begun and continues and not (self.waits or self.asks):
            self.go()
        if self.has_begun:
            self.unwind()


def start_edit(edit: Edit, run: InRun, order: int) -> EditBody:
    """Return the body of an edit in one run; `order` determines its turn."""
    flow, known = flow_of(run), weakref.ref(run)

    def run_edit() -> None:
        body.view = _view(known())
        with flow.body_mode:
            edit.function(body.view)

    # The edit starts in the PyTorch state in which the run was opened.
    body = EditBody(run_edit, flow, flow.state, order, edit.where, edit.touches, edit.attached)
    return body


def _view(run: InRun) -> InRun:
    """Return a view of the run for an edit to hold. Dropping the view does not close the run."""
    view = object.__new__(type(run))
    view.__dict__.update(run.__dict__, _is_view=True)
    return view


def check_no_edit() -> None:
    """Raise InputError if an edit is running now."""
    if current_edit() is not None:
        raise InputError("edits cannot be nested: make them one after another, and all of them will apply")


def _taking_run(function: Callable[..., Any]) -> Callable[[Any], Any]:
    """Return a function that can be called with the run, even if `function` takes no arguments."""
    if inspect.isgeneratorfunction(function) or inspect.iscoroutinefunction(function):
        raise InputError(
            f"an edit takes a plain function: {_place(function)} has `yield` or `async`, so calling it does not run it"
        )
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:  # written in C
        return function
    needed = [p for p in parameters if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if len(needed) > 1:
        raise InputError(f"an edit takes the run, or nothing: {_place(function)} takes {len(needed)} arguments")
    return function if needed else lambda run: function()


def _place(function: Callable[..., Any]) -> str:
    code = getattr(inspect.unwrap(function), "__code__", None)
    return repr(function) if code is None else f"{code.co_filename}:{code.co_firstlineno}"
