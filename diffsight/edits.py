"""Edits: interventions that stay on a model until they are cleared.

    with model.edit() as edited:                       # a copy that shares the weights; inplace=True edits the model
        edited.layers[2].output[:] = 0                 # runs in every later run, not here
    edited.trace(x)

    @model.edit                                        # the same from a function; `edited` is the copy
    def edited(run):
        run.layers[2].output[:] = 0

    edited.layers[0].sae = SAE()                       # a module of its own, for edits to use:
    with edited.edit(inplace=True):
        edited.layers[0].output = edited.layers[0].sae(edited.layers[0].output, hook=True)

In a run every edit is a body of its own, with its own place in the model. Where the model comes to a point, edits have
their turn first, in the order in which they were made; then the body that opened the run, which sees what they did.
"""

import inspect
import warnings
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import nn

from diffsight.engine.capture import Block, Deferred
from diffsight.engine.coroutine import current
from diffsight.engine.taps import Tap, Target
from diffsight.engine.turns import Body, Scope
from diffsight.errors import InputError

if TYPE_CHECKING:
    from diffsight.model import Model
    from diffsight.run import Run


@dataclass(eq=False)
class Edit:
    """One edit: `function` takes the run, `where` is the line it was written at, `touches` are the paths of the points
    it has read and assigned so far."""

    function: Callable[[Any], Any] = field(repr=False)
    where: str
    touches: dict[str, None] = field(default_factory=dict)
    attached: dict[tuple[int, str], nn.Module] = field(default_factory=dict, repr=False)  # by owner and name

    def __repr__(self) -> str:
        touches = f", touches {', '.join(self.touches)}" if self.touches else ""
        return f"<edit at {self.where}{touches}>"


class Editing(Deferred):
    """What `model.edit(...)` gives: a context manager around the edit's block, or a decorator of its function."""

    _instead = "Write the block as a function that takes the run, and pass that: `edited = model.edit(function)`"

    def __init__(self, model: "Model", inplace: bool) -> None:
        if current_edit() is not None:
            raise InputError("an edit cannot be made within an edit: one after the other, they stack")
        self._model = model if inplace else model._copy()

    def __call__(self, function: Callable[..., Any]) -> "Model":
        if not callable(function):
            raise InputError(f"model.edit takes a function, or stands in a `with` statement: not {function!r}")
        self._model._edits.append(Edit(_taking_run(function), _place(function)))
        return self._model

    def _given(self) -> "Model":
        return self._model

    def _take(self, block: Block) -> None:
        self._model._edits.append(Edit(block, block.where))


class EditBody(Body):
    """An edit in one run. A point that never comes ends it without a word."""

    def __init__(self, edit: Edit, run: "Run", order: int) -> None:
        """`order` says when its turn is."""
        super().__init__(self._run_edit, run._flow, run._flow.state)  # the modes in which the run was opened
        self.scope = Scope(self, order)
        self.edit = edit
        self.view: Run | None = None  # the edit's own view of the run, from when it begins
        self._known = weakref.ref(run)
        self.met = False  # whether the model has come to anything it asked for

    def _run_edit(self) -> None:
        self.view = self._known()._seen_by_edit()
        with self.flow.body_mode:
            self.edit.function(self.view)

    def waits_for(self, tap: Tap, key: tuple[str, int]) -> bool:
        """Whether the edit waits for a point."""
        return not self.dead and (tap, key) in self.waits

    def go(self) -> None:
        try:
            super().go()
        except BaseException as error:
            if not is_from_edit(error):
                error._diffsight_edit = self.edit
                error.add_note(f"(in the edit written at {self.edit.where})")
            self.flow.close("an edit failed")
            raise

    def end(self, goes_on: bool) -> None:
        """The run is over: a loop over steps ends and (with `goes_on`) what follows it runs; a wait does not return."""
        if self is current():
            return
        if self.flow.has_result and not self.met and self.edit.touches:
            path, where = next(iter(self.edit.touches)), self.edit.where
            message = f"the edit at {where} did nothing in this run: the model never came to {path}"
            warnings.warn(message, stacklevel=1)
        if self.has_begun and goes_on and not (self.waits or self.asks):
            self.go()
        if self.has_begun:
            self.unwind()


def is_from_edit(error: BaseException) -> bool:
    """Whether an error came out of an edit."""
    return hasattr(error, "_diffsight_edit")


def current_edit() -> EditBody | None:
    """The edit that runs now."""
    body = current()
    return body if isinstance(body, EditBody) else None


class Attached:
    """The modules that were attached to a model, by the module they are attached to and their name.

    In runs they are parts of their own beside the model: they are called by edits, not by the module they hang on."""

    def __init__(self) -> None:
        self.targets: dict[tuple[int, str], Target] = {}
        self._real: list[tuple[nn.Module, str, nn.Module]] = []  # those that are children of the module itself

    def copy(self) -> "Attached":
        """The same, for a copy of the model."""
        copied = Attached()
        copied.targets = dict(self.targets)
        return copied

    def add(self, owner: nn.Module, name: str, path: str, module: nn.Module, real: bool) -> Target:
        """Attaches `module` under `path`; with `real` the owner has it as a child."""
        target = self.targets[id(owner), name] = Target(module, "forward", path)
        if real:
            owner.add_module(name, module)
            self._real.append((owner, name, module))
        return target

    def of(self, owner: Any) -> Iterator[str]:
        """The names of what is attached to `owner`."""
        return (name for key, name in self.targets if key == id(owner))

    def clear(self) -> None:
        """Takes all of it off again."""
        self.targets.clear()
        for owner, name, module in self._real:
            if owner._modules.get(name) is module:
                delattr(owner, name)
        self._real.clear()


def _taking_run(function: Callable[..., Any]) -> Callable[[Any], Any]:
    """`function` as one of the run, whether it takes it or not."""
    if inspect.isgeneratorfunction(function) or inspect.iscoroutinefunction(function):
        raise InputError(f"an edit takes a plain function: calling {_place(function)} (yield, async) does not run it")
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
