"""Model: any `nn.Module`, opened.

model = Model(net)
with model.trace(x) as run:
    run.encoder.layers[2].output[:, 0] = 0
run.result
"""

import inspect
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from threading import RLock, get_ident
from types import FunctionType
from typing import Any, Self, overload

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from diffsight.edits import Attached, Edit, EditBody, Editing, current_edit
from diffsight.engine.flow import Flow
from diffsight.engine.hooks import FORWARD
from diffsight.engine.scan import ScanFlow, is_scanning, scanning
from diffsight.engine.steps import Clock
from diffsight.engine.tapping import Places
from diffsight.engine.taps import Target, join
from diffsight.envoy import Envoy
from diffsight.errors import DiffsightError, InputError, PointNotFoundError
from diffsight.run import Run, Step
from diffsight.session import Session


class Model(Envoy):
    """Wraps `module`; its children are envoys (`model.layers[0]`), and it is itself one (`model.output`).

    `methods` names methods that are called directly, past `forward`, and shall be traceable as well:
    `Model(vae, methods=["encode", "decoder.up"])`.

    Wrapping changes nothing: `model(...)` simply calls the module, and hooks are there only while a run is open.
    """

    _run_class: type[Run] = Run
    _opens_with = "trace"

    def __init__(self, module: nn.Module, methods: Iterable[str] = ()) -> None:
        if not isinstance(module, nn.Module):
            raise InputError(f"Model wraps a torch.nn.Module, not {type(module).__name__}")
        self._wrap(Target(module, FORWARD, ""))
        for path in methods:
            outer, _, name = path.rpartition(".")
            owner = self[outer]._owner if outer else module
            if not isinstance(inspect.getattr_static(type(owner), name, None), FunctionType):
                raise PointNotFoundError(f"methods: {path!r} is no method, or not called on a {type(owner).__name__}")
            self._methods.setdefault(id(owner), {})[name] = path

    def _wrap(self, target: Target, loader: Callable[[], None] | None = None) -> None:
        """`loader` puts the weights into a model that was built without them, see `_load`."""
        self.__dict__.update(_methods={}, _runs=[], _known_places=None, _loader=loader, _loading=RLock())
        self.__dict__.update(_edits=[], _attached=Attached(), _attachments=[], _is_copy=False)
        super().__init__(self, target, None)

    def trace(self, *args: Any, grad: bool = False, **kwargs: Any) -> Run:
        """A run of one forward pass: `with model.trace(x) as run:`. The arguments go to the module; a list of tensors
        is a batch of inputs, each as it would be given alone, and `run.rows` are its parts.

        The model runs in the grad mode in which the run is opened; with `grad=True` gradients are on."""
        again = None if args else partial(self.trace, grad=grad, **kwargs)
        args, sizes = _batch(args, kwargs)
        return self._new_run(lambda: self._owner(*args, **kwargs), sizes, again, grad)

    def generate(self, *args: Any, grad: bool = False, **kwargs: Any) -> Run:
        """A run of the module's own `generate(...)`; a step is one forward pass. `grad=True` lifts its `no_grad`."""
        function = getattr(self._owner, "generate", None)
        if function is None:
            raise PointNotFoundError(f"{type(self._owner).__name__} has no generate method; trace() runs its forward")
        again = None if args else partial(self.generate, grad=grad, **kwargs)
        args, sizes = _batch(args, kwargs)

        def call() -> Any:  # looked up when it is called, since it may be tapped by then
            return (with_gradients(function) if grad else self._owner.generate)(*args, **kwargs)

        return self._new_run(call, sizes, again, grad)

    def scan(self, *args: Any, **kwargs: Any) -> Run:
        """A run on shapes alone: `with model.scan(x) as run: width = run.layers[2].output.shape[-1]`. It takes the
        arguments of `trace` (of `generate`, where a pipeline is wrapped) and is used like any other run, but needs no
        weights and computes next to nothing.

        Values inside the model (in a pipeline: inside each module of it) are tensors on the meta device, which have a
        shape and a type; what comes out of it are zeros, on the device of what went in. Within the body of the `with`
        statement, calculating with such values (with the model's weights, with other tensors) gives shapes as well.

        Raises ScanError where the values themselves are needed: `.item()`, `if tensor:`, a boolean mask."""
        with scanning():
            return getattr(self, self._opens_with)(*args, **kwargs)

    @property
    def module(self) -> nn.Module:
        """The wrapped module itself, with its weights: they are loaded now if they come later."""
        self._load_unless_scanning()
        return self._owner

    # ---- weights that come later

    _loader: Callable[[], None] | None = None

    @property
    def _is_loaded(self) -> bool:
        return self._loader is None

    def _load(self) -> None:
        """Sees to the weights of a model that was built without them, once."""
        if self._is_loaded:
            return
        with self._loading:
            if self._is_loaded:  # by another thread meanwhile
                return
            if any(isinstance(run._flow, ScanFlow) and run._flow.taps for run in self._open_runs()):
                raise DiffsightError(
                    f"the weights of {self._title()} are not loaded yet, and cannot be while a scan of it is open: let "
                    "that end first, or load them before it"
                )
            self._loader()
            self.__dict__.update(_loader=None, _known_places=None)

    def _load_unless_scanning(self) -> None:
        """Sees to the weights where a part is called, or a weight asked for; in the body of a scan there is no need."""
        run = None if self._is_loaded else self._innermost_run()
        if run is None or not isinstance(run._flow, ScanFlow):
            self._load()

    def _attribute(self, owner: Any, name: str) -> Any:
        """An attribute of a part of the model."""
        value = getattr(owner, name)
        if self._is_loaded or not (isinstance(owner, nn.Module) or owner is self._owner) or not _needs_weights(value):
            return value
        self._load_unless_scanning()
        return getattr(owner, name)

    def session(self) -> Session:
        """Runs grouped, of this model and of others: `with model.session() as session:`. Those still open are finished
        when the block ends; `session.iter(items)` repeats a block."""
        return Session()

    # ---- edits

    @overload
    def edit(self, function: None = None, *, inplace: bool = False) -> Editing: ...

    @overload
    def edit(self, function: Callable[..., Any], *, inplace: bool = False) -> Self: ...

    def edit(self, function: Callable[..., Any] | None = None, *, inplace: bool = False) -> Any:
        """Code that runs in every later run, before the run's own body at each point:

            with model.edit() as edited:            # a copy of the model that shares its weights
                edited.layers[2].output[:] = 0
            edited.trace(x)

            @model.edit                             # the same; `edited` is the copy
            def edited(run):
                run.layers[2].output[:] = 0

        With `inplace=True` the model itself is edited. Edits stack: those of a copy come after those that the model
        had. In the block `edited` and `model` are the run at hand (`for step in edited.steps:`); other names are those
        of where it is written, see `engine.capture`. A point that the run never comes to ends the edit without a
        word.

        Raises SourceError where the source of the block cannot be read; a function can always be given."""
        editing = Editing(self, inplace)
        return editing if function is None else editing(function)

    @property
    def edits(self) -> list[Edit]:
        """The edits that are on, in order."""
        return list(self._edits)

    def clear_edits(self) -> None:
        """Takes all edits off, and the modules that were attached."""
        self._edits.clear()
        self._attached.clear()

    def _copy(self) -> Self:
        """A model of the same modules, with edits of its own that begin with those here. Both know of each other's
        runs: `model.<path>` is a value in a run of the copy as well."""
        copy = object.__new__(type(self))
        copy.__dict__.update(self.__dict__, _model=copy, _is_copy=True)
        copy.__dict__.update(_edits=list(self._edits), _attached=self._attached.copy())
        if not self._is_loaded:
            copy.__dict__["_loader"] = self._load  # once, for both
        return copy

    def __reduce_ex__(self, protocol: Any) -> Any:
        name = type(self).__name__
        raise InputError(
            f"a {name} is not copied or pickled, it is a handle with runs and edits: wrap a copy of what it wraps, "
            f"{name}(copy.deepcopy(module)); or model.edit(), a copy with edits of its own that shares the weights"
        )

    def _attach(self, envoy: Envoy, name: str, module: nn.Module) -> None:
        """Hangs a module on a part of the model, for edits to call: on a copy for the copy alone, else for real."""
        model, path, owner, body = self, join(envoy.path, name), envoy._owner, current_edit()
        if envoy._run is not None:
            model = envoy._run._model
        if body is not None and body.view._model._runs is self._runs:
            model = body.view._model
            module = body.edit.attached.setdefault((id(owner), name), module)  # the one of the first run
            if (id(owner), name) in model._attached.targets:
                return
        if not isinstance(owner, nn.Module):
            raise InputError(f"{path}: a module is attached to a module, not to a {type(owner).__name__}")
        if (id(owner), name) not in model._attached.targets and hasattr(owner, name):
            raise InputError(f"{path} is there already: attach the module under another name, and assign its output")
        if not model._is_copy:
            model._load()  # loading gives each module the children of the loaded one
        self._attachments.append(module)
        target = model._attached.add(owner, name, path, module, real=not model._is_copy)
        for run in model._open_runs():
            if run._model is model:
                run._flow.taps.add(target)

    def _start_edits(self, run: Run | None) -> bool:
        """Starts the edits of the run at hand, if they have not begun: perhaps they attach what is looked for."""
        run = run or self._innermost_run()
        return run is not None and run._flow.start_edits()

    def _attached_target(self, owner: Any, name: str, run: Run | None) -> Target | None:
        """What is attached to a part, in the run at hand."""
        run = run or self._innermost_run()
        model = self if run is None else run._model
        return model._attached.targets.get((id(owner), name)) or self._attached.targets.get((id(owner), name))

    # ---- what a wrapper of another kind answers differently

    def _components(self) -> list[Target]:
        """What is tapped from the start of every run: the model, and the methods that are called directly."""
        if not self._methods:
            return [self._target]
        paths = [path.rpartition(".") for methods in self._methods.values() for path in methods.values()]
        return [self._target, *((self[outer] if outer else self)._child(name)._target for outer, _, name in paths)]

    def _places(self, components: list[Target]) -> Places:
        """The targets of the modules that stand in several places, by key; looked for once."""
        modules = [target.owner for target in components]
        if self._known_places is None or self._known_places[0] != modules:
            places: Places = {}
            waiting = [*components]
            while waiting:
                target = waiting.pop()
                places.setdefault(target.key, []).append(target)
                waiting += target.children().values() if target.name == FORWARD else ()
            self.__dict__["_known_places"] = (modules, {key: found for key, found in places.items() if len(found) > 1})
        return self._known_places[1]

    def _stand_ins(self) -> Mapping[tuple[int, str], Callable]:
        """What a scan calls in the place of components that look at values, by the key of their target."""
        return {}

    def _clock(self) -> Clock:
        """When a step begins: at each forward pass."""
        return Clock([self._target])

    def _make_step(self, index: int, path: str, call: tuple[tuple, dict]) -> Step:
        return Step(index, path or type(self._owner).__name__, call, self)

    def _children_of(self, target: Target) -> dict[str, Target]:
        """The parts of a part of the model, by name."""
        return target.named_children()

    def _methods_of(self, owner: Any) -> Mapping[str, str]:
        """The methods of a part that can be traced: name to path."""
        return self._methods.get(id(owner), {})

    def _names_of(self, owner: Any) -> Mapping[str, str]:
        """Standard names for what lies below a part: name to real path, from the part."""
        return {}

    def _target_named(self, outer: Target, name: str) -> Target | None:
        """What a standard name below a part means, if it is one."""
        real = self._names_of(outer.owner).get(name)
        if real is None:
            return None
        found = outer
        for step in real.split("."):
            found = found.children()[step]
        return Target(found.owner, found.name, join(outer.path, name), found.outer)

    # ---- runs

    def _new_run(
        self,
        function: Callable[[], Any],
        sizes: Sequence[int] = (),
        again: Callable[..., Run] | None = None,
        grad: bool = False,
    ) -> Run:
        components = [*self._components(), *self._attached.targets.values()]
        kind = Flow
        if is_scanning():
            kind, again = partial(ScanFlow, stand_ins=self._stand_ins()), again and scanning()(again)
        flow = kind(function, components, self._clock(), self._places, self._load)
        if grad:
            flow.state = flow.state._replace(grad=True, inference=False)
        run = self._run_class(self, flow, sizes, again)
        if self._edits:
            flow.edits = [EditBody(edit, run, order) for order, edit in enumerate(self._edits)]
        return run

    def _open(self, run: Run) -> None:
        if not self._runs or self._runs[-1]() is not run:
            self._runs[:] = [weakref.ref(known) for known in self._open_runs() if known is not run] + [weakref.ref(run)]

    def _innermost_run(self) -> Run | None:
        """The run opened last, of those open in this thread; rather one of this model than of a copy. In an edit, the
        run it is in, unless it has opened one itself."""
        body = current_edit()
        runs = [run for run in self._open_runs() if run._flow.thread == get_ident() and run._opened_in is body]
        if body is not None and body.view._model._runs is self._runs:
            runs.insert(0, body.view)
        if len(runs) > 1:
            runs = [run for run in runs if run._entered or run._flow.taps] or runs  # no future nothing has asked of yet
            runs = [run for run in runs if run._model is self] or runs
        return runs[-1] if runs else None

    def _ended_run(self) -> Run | None:
        """The run in whose block this is, where it has ended before the block."""
        runs = [known() for known in reversed(self._runs)]
        return next((run for run in runs if run and run._entered and run._flow.thread == get_ident()), None)

    def _is_open_elsewhere(self) -> bool:
        """Whether another thread has a run open."""
        return any(run._flow.thread != get_ident() for run in self._open_runs())

    def _open_runs(self) -> list[Run]:
        return [run for known in self._runs if (run := known()) is not None and run._flow.outcome is None]

    # ---- showing

    def __repr__(self) -> str:
        attached = [f"attached: {t.path} = {type(t.owner).__name__}()" for t in self._attached.targets.values()]
        return "\n".join([super().__repr__(), *attached, *map(repr, self._edits)])

    def _title(self) -> str:
        return type(self._owner).__name__

    def _describe(self, owner: Any) -> str:
        """The tree as PyTorch prints it, and below it the methods that can be traced besides modules."""
        inside = {id(module) for module in owner.modules()} if isinstance(owner, nn.Module) else {id(owner)}
        paths = [path for key, methods in self._methods.items() if key in inside for path in methods.values()]
        besides = "\ntraceable besides modules: " + ", ".join(f"{path}()" for path in paths) if paths else ""
        return f"{owner!r}{besides}{self._weights_to_come()}"

    def _weights_to_come(self) -> str:
        return "" if self._is_loaded else "\nweights: not loaded yet, the first run loads them"


def with_gradients(method: Callable[..., Any]) -> Callable[..., Any]:
    """A bound method without the `torch.no_grad()` it is decorated with."""
    wrapped = getattr(method.__func__, "__wrapped__", None)
    return method if wrapped is None else partial(wrapped, method.__self__)


def _needs_weights(value: Any) -> bool:
    """Whether an attribute of a module is about weights: one of them, where they are, a module, a method."""
    meta = torch.device("meta")
    return any(
        callable(leaf) or leaf == meta if not isinstance(leaf, torch.Tensor) else leaf.is_meta
        for leaf in tree_leaves(value)
    )


def _batch(args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, list[int]]:
    """The arguments, a list of tensors joined to one, and how many entries of the batch each input takes."""
    first = args[0] if args else next(iter(kwargs.values()), None)
    if args and isinstance(first, list) and first and all(isinstance(x, torch.Tensor) and x.ndim for x in first):
        try:
            return (torch.cat(first), *args[1:]), [len(x) for x in first]
        except RuntimeError as error:
            shapes = ", ".join(str(tuple(x.shape)) for x in first)
            raise InputError(f"the inputs do not make a batch: their shapes are {shapes}") from error
    return args, [1] * first.shape[0] if isinstance(first, torch.Tensor) and first.ndim else []


# ---- what wrappers and the rest of the engine ask of a model, see `diffsight.extending`


def open_run(model: Model, function: Callable[[], Any]) -> Run:
    """Open a run of `model` that calls `function` in the place of the model."""
    return model._new_run(function)


def innermost_run(model: Model) -> Run | None:
    """Return the run that `model.<path>` means: the innermost one open in this thread."""
    return model._innermost_run()


def named_target(model: Model, name: str) -> Target | None:
    """Return what a standard name of the whole model stands for, or None."""
    return model._target_named(model._target, name)
