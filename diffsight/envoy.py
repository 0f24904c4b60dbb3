"""Envoys: the named handles on a model's modules and methods.

    model.unet.mid_block                    # a child, by attribute
    model.text_encoder.layers[4]            # or by index; names may be standard ones ("layers", "ln_final")
    run.unet.mid_block.output               # the value it returned, in this run
    run.unet.mid_block.calls[2].output      # ... in its third call of the scope
    run.vae.decode.input = latents          # methods that pipelines call directly are envoys as well

Reading a value runs the model up to it; assigning puts a value in its place, now or when the model comes there.
Attributes that are neither children nor values are those of the module itself (`model.unet.config`,
`model.unet.dtype`).
"""

import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn

from diffsight.edits import is_from_edit
from diffsight.engine.flow import Flow
from diffsight.engine.hooks import FORWARD
from diffsight.engine.taps import Asked, Target, join
from diffsight.errors import DiffsightError, InputError, NoRunError, PointNotFoundError, WrongThreadError, suggest

if TYPE_CHECKING:
    from diffsight.model import Model
    from diffsight.rows import Part
    from diffsight.run import Run

VALUES = ("input", "inputs", "output")


@contextmanager
def keeping_attribute_errors(holder: Any) -> Iterator[None]:
    """Python takes an AttributeError out of a property for a missing attribute and goes on to `__getattr__`, which then
    hides the model's own error. So it is kept aside here, for `__getattr__` to raise (`raise_kept`)."""
    try:
        yield
    except AttributeError as error:
        keep_attribute_error(holder, error)
        raise


def keep_attribute_error(holder: Any, error: Exception) -> None:
    """Keeps an error aside, if it is an AttributeError; see `keeping_attribute_errors`."""
    if isinstance(error, AttributeError):
        holder.__dict__["_kept_error"] = error


def raise_kept(holder: Any) -> None:
    """Raises the AttributeError that a property of `holder` ended with, if that is why `__getattr__` was called."""
    error = holder.__dict__.pop("_kept_error", None)
    if error is not None:
        raise error


class Points:
    """The values of one call: what can be read and assigned on an envoy, a method, or one of their `.calls`."""

    def __init__(
        self, model: "Model", target: Target, run: "Run | None", call: int = 0, part: "Part | None" = None
    ) -> None:
        self.__dict__.update(_model=model, _target=target, _run=run, _call=call, _part=part)

    @property
    def output(self) -> Any:
        """What the call returned. Assignable."""
        return self._fetch("output")

    @output.setter
    def output(self, value: Any) -> None:
        self._assign("output", value)

    @property
    def input(self) -> Any:
        """The first argument of the call (positional, else by keyword). Assignable."""
        return self._fetch("input")

    @input.setter
    def input(self, value: Any) -> None:
        self._assign("input", value)

    @property
    def inputs(self) -> tuple[tuple, dict]:
        """All arguments of the call, as `(args, kwargs)`. Assignable."""
        return self._fetch("inputs")

    @inputs.setter
    def inputs(self, value: tuple[tuple, dict]) -> None:
        self._assign("inputs", value)

    def skip(self, value: Any) -> None:
        """Leaves the call out: the model goes on with `value` as its output."""
        if self._part is not None:
            raise InputError(
                f"{self.path}.skip leaves the call out for all rows: write it on the run, not on a part of it"
            )
        self._flow("skip").skip(Asked(self._target, "skip", self._call), value)

    def next(self) -> "Points":
        """The call after this one: `run.lm_head.next().output` is the second call's, as `.calls[1].output` is."""
        return Points(self._model, self._target, self._run, self._call + 1, self._part)

    @property
    def path(self) -> str:
        """The path from the model, as one writes it."""
        return self._target.path

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in VALUES:
            raise PointNotFoundError(
                f"{join(self.path, name)} cannot be assigned: .input, .inputs and .output can" + suggest(name, VALUES)
            )
        object.__setattr__(self, name, value)

    def _fetch(self, part: str) -> Any:
        try:
            flow = self._run._flow if self._run is not None else self._flow(part)
            return flow.fetch(Asked(self._target, part, self._call, self._part))
        except Exception as error:
            keep_attribute_error(self, error)
            if isinstance(error, DiffsightError):
                raise from_the_asking_line(error) from error.__cause__
            raise

    def _assign(self, part: str, value: Any) -> None:
        try:
            self._flow(part).assign(Asked(self._target, part, self._call, self._part), value)
        except DiffsightError as error:
            raise from_the_asking_line(error) from error.__cause__

    def _within(self, function: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        flow = self._flow("hook=True")
        try:
            return flow.call(lambda: function(*args, **kwargs), self._target)
        except DiffsightError as error:
            raise from_the_asking_line(error) from error.__cause__

    def _flow(self, part: str) -> Flow:
        return self._open_run(part)._flow

    def _open_run(self, part: str) -> "Run":
        """The run whose value `part` is."""
        run = self._run if self._run is not None else self._model._innermost_run() or self._model._ended_run()
        if run is None and self._model._is_open_elsewhere():
            raise WrongThreadError(
                f"{join(self.path, part)}: a run belongs to the thread that opened it, and none is open in this one"
            )
        if run is None:
            raise NoRunError(
                f"{join(self.path, part)} has a value only while the model runs: write it inside "
                f"`with model.{self._model._opens_with}(...) as run:`"
            )
        return run


def from_the_asking_line(error: DiffsightError) -> DiffsightError:
    """The error without the engine's frames below the line that asked; one out of an edit keeps the edit's line."""
    return error if is_from_edit(error) else error.with_traceback(None)


class Calls:
    """The calls of a module or method in the current scope, by number: `envoy.calls[2].output`."""

    __iter__ = None  # there is no telling how many calls will come

    def __init__(self, points: Points) -> None:
        self._points = points

    def __getitem__(self, index: int) -> Points:
        if not hasattr(index, "__index__") or index < 0:
            raise IndexError(f".calls takes the number of a call, 0 for the first, not {index!r}")
        points = self._points
        return Points(points._model, points._target, points._run, operator.index(index), points._part)

    def __repr__(self) -> str:
        return f"<calls of {self._points.path}>"


class MethodEnvoy(Points):
    """The handle on a method: its values in a run; called, it calls the method."""

    @property
    def calls(self) -> Calls:
        """Every call of the scope, by number."""
        return Calls(self)

    def __call__(self, *args: Any, hook: bool = False, **kwargs: Any) -> Any:
        """Calls the method. Its points do not fire, unless with `hook=True`, within the run."""
        plain = type(self._target) is Target
        method = self._model._attribute(self._target.owner, self._target.name) if plain else self._target.call
        return self._within(method, args, kwargs) if hook else method(*args, **kwargs)

    def __repr__(self) -> str:
        return f"<method {self.path} of {type(self._target.owner).__name__}>"


class Envoy(Points):
    """The handle on a module, or on another part of a pipeline; called, it calls the part without its points firing."""

    @property
    def calls(self) -> Calls:
        """Every call of the scope, by number."""
        return Calls(self)

    def __call__(self, *args: Any, hook: bool = False, **kwargs: Any) -> Any:
        """Calls the part. Its points do not fire, unless with `hook=True`, within the run: what was assigned to them
        ahead is put in, and other bodies (edits, functions of rows) can read them."""
        if isinstance(self._owner, nn.Module) or self._owner is self._model._owner:
            self._model._load_unless_scanning()
        return self._within(self._owner, args, kwargs) if hook else self._owner(*args, **kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, nn.Module) and name not in VALUES:
            self._model._attach(self, name, value)
        else:
            super().__setattr__(name, value)

    @property
    def _owner(self) -> Any:
        return self._target.owner

    def _bound(self, run: "Run", part: "Part | None" = None) -> "Envoy":
        """The same handle, for `run` alone, and for a part of its batch."""
        return Envoy(self._model, self._target, run, part=part)

    def _handle(self, target: Target) -> "Envoy":
        """The handle on another module, for the same run and part."""
        return Envoy(self._model, target, self._run, part=self._part)

    def _child(self, name: str) -> "Envoy | MethodEnvoy | None":
        """The child, method or standard name called `name`, if there is one."""
        model = self._model
        attached = model._attached_target(self._owner, name, self._run) if model._attachments else None
        target = attached or model._children_of(self._target).get(name)
        if target is not None:
            return self._handle(target)
        owner, path = self._owner, join(self.path, name)
        if name in model._methods_of(owner):
            outer = self._target if isinstance(owner, nn.Module) else None
            return MethodEnvoy(model, Target(owner, name, path, outer), self._run, part=self._part)
        target = model._target_named(self._target, name)
        if target is None:
            return None
        return (
            self._handle(target) if target.name == FORWARD else MethodEnvoy(model, target, self._run, part=self._part)
        )

    def __getattr__(self, name: str) -> Any:
        raise_kept(self)
        if name.startswith("__"):
            raise AttributeError(name)
        child = self._child(name)
        if child is not None:
            return child
        try:
            return self._model._attribute(self._owner, name)
        except AttributeError:
            if self._model._start_edits(self._run):
                return getattr(self, name)
            known = [known for known in dir(self) if not known.startswith("_")]
            raise PointNotFoundError(
                f"{self.path or type(self._owner).__name__} has no {name!r}{suggest(name, known)}"
            ) from None

    def __getitem__(self, key: int | str | slice) -> Any:
        if isinstance(key, str):
            found = self
            for step in key.replace("[", ".").replace("]", "").split("."):
                child = found._child(step)
                if child is None and self._model._start_edits(self._run):
                    child = found._child(step)
                if child is None:
                    told = f"{found.path or type(found._owner).__name__} has no {step!r}"
                    if found is not self:
                        told = f"{self.path or type(self._owner).__name__} has no {key!r}: {told}"
                    raise PointNotFoundError(told + suggest(step, found._names()))
                found = child
            return found
        children = list(self._model._children_of(self._target).values())
        if isinstance(key, slice):
            return [self._handle(target) for target in children[key]]
        try:
            return self._handle(children[key])
        except IndexError:
            raise PointNotFoundError(
                f"{self.path}[{key}] is not there: {self.path} has {len(children)} children"
            ) from None

    def __len__(self) -> int:
        return len(self._model._children_of(self._target))

    def __iter__(self) -> Iterator["Envoy"]:
        return iter(self[:])

    def __bool__(self) -> bool:
        return True

    def _names(self) -> list[str]:
        model, owner = self._model, self._owner
        children = dict.fromkeys((*model._children_of(self._target), *model._attached.of(owner)))
        return [*children, *model._methods_of(owner), *model._names_of(owner)]

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *self._names(), *dir(self._owner)})

    def __repr__(self) -> str:
        return self._model._describe(self._owner)


# ---- what wrappers and the rest of the engine ask of a handle, see `diffsight.extending`


def model_of(points: Points) -> "Model":
    """Return the model that a handle or a view of a run belongs to."""
    return points._model


def target_of(points: Points) -> Target:
    """Return what a handle taps."""
    return points._target


def owner_of(envoy: Points) -> Any:
    """Return the module, or other part, behind a handle; its weights may be still to come."""
    return envoy._target.owner


def narrowed(points: Points, part: Any) -> Points:
    """Return the same point, narrowed to a part of its value."""
    return Points(points._model, points._target, points._run, points._call, part)
