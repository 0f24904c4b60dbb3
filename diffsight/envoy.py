"""Envoys: the named handles on a model's modules and methods.

    model.unet.mid_block                    # a child, by attribute
    model.text_encoder.layers[4]            # or by index; standard names work too ("layers", "ln_final")
    run.unet.mid_block.output               # the value it returned, in this run
    run.unet.mid_block.calls[2].output      # ... in its third call of the scope
    run.vae.decode.input = latents          # methods that pipelines call directly are envoys as well

Reading a value runs the model up to it. Assigning replaces the value, now or when the model gets there. An attribute
that is neither a child nor a value is the module's own (`model.unet.config`, `model.unet.dtype`).

The functions at the end are for code outside this module that works with envoys: see `diffsight.extending`.
"""

import operator
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

from torch import nn

from diffsight.engine.batch_slicing import Selection
from diffsight.engine.hooks import FORWARD
from diffsight.engine.innermost_run import current_edit
from diffsight.engine.model_tree import Tree
from diffsight.engine.points import Asked
from diffsight.engine.run_to_point import Flow
from diffsight.engine.target import Target, in_run, join
from diffsight.engine.users_line import from_the_asking_line
from diffsight.envoys_in_values import assigned_in_vain, modules_themselves, with_envoys
from diffsight.errors import (
    DiffsightError,
    InputError,
    NoRunError,
    PointNotFoundError,
    WrongThreadError,
    is_own_code,
    suggest,
    warn_user,
)
from diffsight.notebook_tree import folded

VALUES = ("input", "inputs", "output")
_IN_WORDS = {
    "input": "the first argument of the module",
    "inputs": "all arguments of the module",
    "output": "what the module returns",
    "result": "what the model returns",
    "rows": "the parts of the batch",
}
_OF_PARAMETERS = (nn.ParameterList, nn.ParameterDict)  # modules that hold parameters, and no modules
_FEW = 12  # parts; up to this many are listed in an error message


@contextmanager
def keeping_attribute_errors(holder: Any) -> Iterator[None]:
    """Keep an AttributeError that the block raises, for `raise_kept`.

    If a property raises AttributeError, Python treats the attribute as missing and calls `__getattr__`, which then
    hides the model's own error. So a property puts its code into this block, and `__getattr__` calls `raise_kept`."""
    try:
        yield
    except AttributeError as error:
        keep_attribute_error(holder, error)
        raise


def keep_attribute_error(holder: Any, error: Exception) -> None:
    """Keep an error for `raise_kept` if it is an AttributeError, see `keeping_attribute_errors`."""
    if isinstance(error, AttributeError):
        holder.__dict__["_kept_error"] = error


def raise_kept(holder: Any) -> None:
    """Raise the AttributeError of a property of `holder`, if it is the reason why `__getattr__` was called."""
    own = holder.__dict__
    if "_kept_error" in own:
        raise own.pop("_kept_error")


class ChildrenFirst:
    """A handle on a model that has modules named `_model`, `_flow` or the like. Outside diffsight, such a name refers
    to the module, not to diffsight's own attribute."""

    def __getattribute__(self, name: str) -> Any:
        asker = sys._getframe(1).f_globals.get("__name__", "")
        if name.startswith("_") and not name.startswith("__") and not asker.startswith(f"{__package__}."):
            child = object.__getattribute__(self, "_child")(name)
            if child is not None:
                return child
        return super().__getattribute__(name)


@cache
def _children_first(cls: type) -> type:
    return type(cls.__name__, (ChildrenFirst, cls), {"__module__": cls.__module__, "__doc__": cls.__doc__})


set_class = object.__dict__["__class__"].__set__  # of a handle, whose own `__class__` may be that of a module


def look_at_children_first(handle: Any) -> None:
    """Make a handle look up private names among the modules first; see `ChildrenFirst`."""
    set_class(handle, _children_first(type(handle)))


class InRun:
    """A run as its envoys see it: the handle on its model, and the flow that moves the model."""

    def __init__(self, model: "Envoy", flow: Flow) -> None:
        self.__dict__.update(_model=model, _flow=flow)
        if flow.tree.has_private_names:
            look_at_children_first(self)

    def _child(self, name: str) -> "Envoy | MethodEnvoy | None":
        """The child of the whole model called `name`, if there is one."""
        return root_of(self)._child(name)

    def _own_copy(self, part: Any) -> Any:
        """Return the copy of a part of the model that this run works on, or the part itself if it has none."""
        return part


class Points:
    """The values of one call, on an envoy, a method, or one of their `.calls`: they can be read and assigned.

    Args:
        tree: The tree of the model.
        target: The module or method that is called.
        run: The run that the values are bound to; None for the innermost open run of the model.
        call: The number of the call in the current scope.
        part: The selected part of each value, such as a row; None for all of it.
    """

    _tree: Tree
    _target: Target
    _run: InRun | None
    _call: int
    _part: Selection | None

    def __init__(
        self, tree: Tree, target: Target, run: InRun | None = None, call: int = 0, part: Selection | None = None
    ) -> None:
        own = self.__dict__  # quicker than its `update`: a run makes many of these
        own["_tree"], own["_target"], own["_run"], own["_call"], own["_part"] = tree, target, run, call, part
        if tree.has_private_names and isinstance(self, Envoy):
            look_at_children_first(self)

    @property
    def output(self) -> Any:
        """The return value of the call. Assignable."""
        return self._fetch("output")

    @output.setter
    def output(self, value: Any) -> None:
        self._assign("output", value)

    @property
    def input(self) -> Any:
        """The first argument of the call: the first positional one, else the first by keyword. Assignable."""
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
        """Skip the call: the model continues with `value` as its output."""
        if self._part is not None:
            raise InputError(
                f"{join(self.path, 'skip')} leaves the call out for all rows: write it on the run, not on a part of it"
            )
        self._flow("skip").skip(Asked(self._target, "skip", self._call), value)

    def next(self) -> "Points":
        """Return the call after this one: `run.lm_head.next().output` equals `run.lm_head.calls[1].output`."""
        return Points(self._tree, self._target, self._run, self._call + 1, self._part)

    @property
    def path(self) -> str:
        """The path from the model, as you write it."""
        return self._target.path

    @property
    def _title(self) -> str:
        """What error messages call the part: its path, or the name of the model."""
        return self.path or self._tree.title

    def __eq__(self, other: object) -> bool:
        """Whether these are the points of the same calls, in the same run, or `other` is the module that is called.

        So `handle in modules` and `by_module[handle]` find the handles of a net's own modules. Handles of one module in
        several runs or rows differ from each other."""
        if not isinstance(other, Points):
            return True if self._is_of_module() and other is self._target.owner else NotImplemented
        is_same = self._tree is other._tree and self._run is other._run and self._part == other._part
        return is_same and self._target.key == other._target.key and self._call == other._call

    def __hash__(self) -> int:
        return hash(self._target.owner if self._is_of_module() else (self._target.key, self._call))

    def _is_of_module(self) -> bool:
        """Whether the points are those of a module as a whole: of its own calls, beginning with the first."""
        return self._call == 0 and self._target.name == FORWARD and isinstance(self._target.owner, nn.Module)

    def __repr__(self) -> str:
        note = self._tree.note_on_values(self.path)
        return f"<call {self._call} of {self._title}: .input, .inputs and .output{f'. {note}' if note else ''}>"

    def __getattr__(self, name: str) -> Any:
        raise_kept(self)
        found = None if name.startswith("_") else self._tree.named_value(self, name)
        if found is None:
            raise AttributeError(f"{self._title} has no {name!r}")
        return found.output if isinstance(found, Points) else found

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in VALUES:
            found = self._tree.named_value(self, name)
            if isinstance(found, Points):
                found._assign("output", value)
                return
            raise PointNotFoundError(
                f"{join(self.path, name)} cannot be assigned: only .input, .inputs and .output can"
                + suggest(name, VALUES)
            )
        object.__setattr__(self, name, value)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise InputError(
            f"{self._title} cannot be copied or pickled, since it belongs to a model with runs and edits: copy the "
            "module that it wraps, and wrap the copy, Model(copy.deepcopy(module))"
        )

    def _hint_at_child(self, name: str) -> str:
        """Return a hint on how to reach the module called `name`, if there is one."""
        is_child = name in self._tree.children_of(self._target)
        return f'. The module of that name is {self.path or "run"}["{name}"]' if is_child else ""

    def _fetch(self, part: str) -> Any:
        own = self.__dict__  # where a class has a `__getattr__`, as here, attributes are looked up slowly
        run = own["_run"]
        try:
            flow = run.__dict__["_flow"] if run is not None else self._flow(part)
            target, call, selection = own["_target"], own["_call"], own["_part"]
            if call or selection is not None or target.name != FORWARD:
                asked = Asked(target, part, call, selection)
            elif (asked := target.asked.get(part)) is None:
                tell_of_child(own["_tree"], target, part)
                asked = target.asked[part] = Asked(target, part)
            return flow.fetch(asked)
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
        """Return the run to which the value `part` belongs."""
        if self._run is not None:
            return self._run._flow
        runs = self._tree.open_runs
        flow = runs.innermost(self._tree) or runs.ended()
        if flow is None and runs.is_open_elsewhere():
            raise WrongThreadError(
                f"{join(self.path, part)}: a run belongs to the thread that opened it, and this thread has none open"
            )
        if flow is None:
            raise NoRunError(
                f"{join(self.path, part)} has a value only while the model runs: write it inside "
                f"`with model.{self._tree.opens_with}(...) as run:`{self._hint_at_child(part)}"
            )
        return flow


class Calls:
    """The calls of a module or method in the current scope, by number: `envoy.calls[2].output`."""

    __iter__ = None  # it is not known how many calls there will be

    def __init__(self, points: Points) -> None:
        self.__dict__["_points"] = points

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        calls = join(self._points.path, "calls")
        hint = self._points._hint_at_child("calls")
        raise PointNotFoundError(f"{calls} has no {name!r}: choose a call by its number, {calls}[0].{name}{hint}")

    def __setattr__(self, name: str, value: Any) -> None:
        self.__getattr__(name)

    def __getitem__(self, index: int) -> Points:
        try:
            number = operator.index(index)
        except TypeError:  # an array or a tensor of several numbers has an `__index__` too
            number = -1
        if number < 0:
            raise IndexError(f".calls takes the number of a call, 0 for the first, not {index!r}")
        points = self._points
        return Points(points._tree, points._target, points._run, number, points._part)

    def __repr__(self) -> str:
        return f"<calls of {self._points._title}>"


class MethodEnvoy(Points):
    """The handle on a method: its values in a run. Calling it calls the method."""

    @property
    def calls(self) -> Calls:
        """Every call of the scope, by number."""
        return Calls(self)

    def __call__(self, *args: Any, hook: bool = False, **kwargs: Any) -> Any:
        """Call the method outside the run: none of its values are read or replaced.

        With `hook=True` the call goes through the run's points."""
        elsewhere = self._tree.elsewhere
        if elsewhere is not None and elsewhere.is_meant_by(self):
            return elsewhere.call(self, args, kwargs, hook)
        plain = type(self._target) is Target
        owner = part_in_run(self)
        method = self._tree.attribute(owner, self._target.name) if plain else self._target.call
        return self._within(method, args, kwargs) if hook else method(*args, **kwargs)

    def __repr__(self) -> str:
        return f"<method {self.path} of {type(self._target.owner).__name__}>"


class Envoy(Points):
    """The handle on a module, or on another part of a pipeline. Calling it calls the part, outside the run."""

    @property
    def calls(self) -> Calls:
        """Every call of the scope, by number."""
        return Calls(self)

    def __call__(self, *args: Any, hook: bool = False, **kwargs: Any) -> Any:
        """Call the part outside the run: none of its values are read or replaced.

        With `hook=True` the call goes through the run's points: values assigned in advance are used, and other
        bodies (edits, functions of rows) can read the values. The body that makes the call can read them afterwards,
        until the model moves on."""
        if self._tree.elsewhere is not None and self._is_elsewhere():
            return self._tree.elsewhere.call(self, args, kwargs, hook)
        if isinstance(self._owner, nn.Module) or self._owner is self._tree.root.owner:
            self._tree.load_unless_scanning()
        return self._within(self._owner, args, kwargs) if hook else self._owner(*args, **kwargs)

    @property
    def __class__(self) -> type:
        """In a run, the class of the module, so that `isinstance(run.layers[0], nn.Linear)` is true of a Linear."""
        own = self.__dict__
        is_of_module = "_part" in own and isinstance(own["_target"].owner, nn.Module)  # it is set last
        return type(own["_target"].owner) if is_of_module and self._is_in_run() else type(self)

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, nn.Module) and not isinstance(value, Points) and name not in VALUES:
            self._attach(name, value)
        else:
            super().__setattr__(name, value)

    @property
    def _owner(self) -> Any:
        return self._target.owner

    def _is_elsewhere(self) -> bool:
        """Whether the weights of the part are on a server. False for attached modules and tokenizers."""
        is_attached = any(target.owner is self._owner for target in self._tree.attached.targets.values())
        return isinstance(self._owner, nn.Module) and not is_attached and self._tree.elsewhere.is_meant_by(self)

    def _bound(self, run: InRun | None, part: Selection | None = None) -> "Envoy":
        """Return the same handle, bound to `run` and to a part of its batch."""
        own = self.__dict__
        return Envoy(own["_tree"], own["_target"], run, 0, part)

    def _handle(self, target: Target) -> "Envoy":
        """The handle on another module, for the same run and part."""
        own = self.__dict__
        return Envoy(own["_tree"], target, own["_run"], 0, own["_part"])

    def _child(self, name: str) -> "Envoy | MethodEnvoy | None":
        """The child, method or standard name called `name`, if there is one."""
        own = self.__dict__
        tree, outer = own["_tree"], own["_target"]
        target = self._attached_child(name) if tree.attached.ever else None
        target = target or tree.children_of(outer).get(name) or tree.child_of(outer, name)
        if target is None:
            return None
        if target.name in (FORWARD, "__call__"):
            return self._handle(target)
        return MethodEnvoy(tree, target, own["_run"], 0, own["_part"])

    def _attached_child(self, name: str) -> Target | None:
        """Return the target of the module attached under a name, preferably in the current run."""
        tree, flow = self._tree, self._current_flow()
        found = None if flow is None else flow.tree.attached.find(self._owner, name)
        return found or tree.attached.find(self._owner, name)

    def _attach(self, name: str, module: nn.Module) -> None:
        """Attach a module. In an edit it is attached for the edit, whose later runs keep the first run's module."""
        tree, owner, edit = self._tree, self._owner, current_edit()
        if edit is not None and edit.flow.tree.open_runs is tree.open_runs:
            tree = edit.flow.tree
            module = edit.attached.setdefault((id(owner), name), module)
            if tree.attached.find(owner, name) is not None:
                return
        tree.attach(owner, name, join(self._target.path, name), module)

    def _start_edits(self) -> bool:
        """Start the edits of the current run if they have not started: one of them may attach the requested module."""
        flow = self._current_flow()
        return flow is not None and flow.start_edits()

    def _current_flow(self) -> Flow | None:
        """Return the run that the handle is bound to, else the innermost open run of the model; None if there is
        none."""
        return self._run._flow if self._run is not None else self._tree.open_runs.innermost(self._tree)

    def __getattr__(self, name: str) -> Any:
        raise_kept(self)
        if name.startswith("__"):
            raise AttributeError(name)
        child = self._child(name)
        if child is not None:
            return child
        try:
            value = self._tree.attribute(part_in_run(self), name)
        except AttributeError:
            found = self._tree.named_value(self, name)
            if found is not None:
                return found.output if isinstance(found, Points) else found
            if self._start_edits():
                return getattr(self, name)
            raise PointNotFoundError(f"{self._title} has no {name!r}{self._hint(name, dir(self))}") from None
        if self._tree.elsewhere is not None:
            value = self._tree.elsewhere.attribute(self, name, value)
        is_in_run = self._is_in_run()
        if is_in_run and getattr(value, "__func__", None) is nn.Module.apply:
            raise InputError(
                f"{join(self.path, name)} passes the modules themselves to the function, where an assigned value has "
                f"no effect: write a loop, `for module in {in_run(join(self.path, 'modules'))}():`, or call `apply` on "
                "the module outside the run"
            )
        if is_in_run:
            self._watch_modules_in(value, join(self.path, name))
        if is_in_run or (isinstance(self._owner, nn.ModuleDict) and name in ("items", "values")):
            return with_envoys(value, join(self.path, name), self._envoys())
        return value

    def _watch_modules_in(self, value: Any, path: str) -> None:
        """Raise an error at the end of the run if the body assigns values to modules that an object at `path` holds."""
        envoy_of = self._envoys()
        envoys = {module: envoy_of(module, "") for module in modules_themselves(value)}
        parts = [(module, part) for module in envoys for part in VALUES if not hasattr(module, part)]
        if parts:
            flow = self._current_flow()
            meant = {module: getattr(envoy, "path", "") for module, envoy in envoys.items()}
            checks = [partial(assigned_in_vain, *which, path, meant[which[0]]) for which in parts]
            flow.end_checks = [*flow.end_checks, *checks]

    def _hint(self, name: str, known: Iterable[str]) -> str:
        """Return a hint at what the user may have meant by a name that does not exist."""
        if hasattr(vars(self._owner).get("config"), name):
            return f"; its configuration has one: .config.{name}"
        known, children = [one for one in known if not one.startswith("_")], self._names()
        hint = suggest(self._tree.meant_by(self._target, name), known)
        is_short = 0 < len(children) <= _FEW and not any(child.isdigit() for child in children)
        return hint + (f"; its parts are {', '.join(children)}" if is_short else "")

    def _envoys(self) -> Callable[[nn.Module, str], Any]:
        """Return a function that returns the envoy of a module at a path. A module that is not in the model becomes an
        envoy if it is an attribute of this one (it has a path), since this one may call it. Otherwise, a `ModuleList`
        such as a slice becomes a list of the envoys in it."""
        known: dict[int, Target] = {}

        def envoy_of(module: nn.Module, path: str) -> Any:
            if not known:
                parts = [self._tree.root, *self._tree.children_of(self._tree.root).values()]
                known.update(self._targets_inside(*parts, *self._tree.attached.targets.values()))
                known.update(self._targets_inside())
            target = known.get(id(module))
            if target is None and path and isinstance(self._owner, nn.Module):
                target = Target(module, FORWARD, path, self._target)
            if target is None and isinstance(module, nn.ModuleList):
                return [envoy_of(item, "") for item in module]
            return module if target is None else self._handle(target)

        return envoy_of

    def _targets_inside(self, *outer: Target) -> dict[int, Target]:
        """Return the targets in this one, or in `outer`, by the id of the module; the first of those of one module."""
        found, waiting = {}, [*(outer or [self._target])]
        for target in waiting:
            found.setdefault(id(target.owner), target)
            waiting += target.inner()
        return found

    def _is_in_run(self) -> bool:
        return self._run is not None or self._tree.open_runs.innermost(self._tree) is not None

    def __getitem__(self, key: Any) -> Any:
        own = self.__dict__
        outer = own["_target"]
        if type(key) is int and type(outer.owner) is nn.ModuleList:
            target = outer.item(key)
            if target is not None:
                return self._handle(target)
        has_own = _has_own(outer.owner, "__getitem__")
        if isinstance(key, str) and not isinstance(outer.owner, _OF_PARAMETERS):
            try:
                return self._at(key)
            except PointNotFoundError:
                if not has_own:
                    raise
        if has_own:
            path = join(outer.path, key) if type(key) in (int, str) else ""
            found, envoy_of = self._holder_here()[key], self._envoys()
            if self._is_in_run():
                self._watch_modules_in(found, path or outer.path)
            if isinstance(found, nn.Sequential) and envoy_of(found, "") is found:
                found = [*found]  # a slice: only the modules in it are in the model
            return with_envoys(found, path, envoy_of)
        children = list(own["_tree"].children_of(outer).values())
        if isinstance(key, slice):
            return [*map(self._handle, children[key])]
        try:
            return self._handle(children[key])
        except IndexError:
            raise PointNotFoundError(
                f"{self.path}[{key}] does not exist: {self._title} has {len(children)} children"
            ) from None

    def _at(self, path: str) -> "Envoy | MethodEnvoy":
        """Return the envoy at a path from here, such as "layers[4].mlp"."""
        found = self._child(path)  # a name may have brackets in it
        if found is not None:
            return found
        found = self
        for step in path.replace("[", ".").replace("]", "").split("."):
            child = found._child(step)
            if child is None and self._start_edits():
                child = found._child(step)
            if child is None:
                problem = f"{found._title} has no {step!r}"
                if found is not self:
                    problem = f"{self._title} has no {path!r}: {problem}"
                raise PointNotFoundError(problem + suggest(step, found._names()))
            found = child
        return found

    def _holder_here(self) -> Any:
        """Return the part itself, with its weights loaded if it is a module."""
        if isinstance(self._owner, nn.Module):
            self._tree.load_unless_scanning()
        return part_in_run(self)

    def __len__(self) -> int:
        return len(self._holder_here() if _has_own(self._owner, "__len__") else self._tree.children_of(self._target))

    def __iter__(self) -> Iterator[Any]:
        """Iterate over the modules directly in this one, but over the names in a `ModuleDict`, as PyTorch does. A class
        may define another order, or other items."""
        if _has_own(self._owner, "__iter__", "__getitem__"):
            return self._with_envoys_each(iter(self._holder_here()))
        children = self._tree.children_of(self._target)
        return iter([*(children if isinstance(self._owner, nn.ModuleDict) else map(self._handle, children.values()))])

    def __reversed__(self) -> Iterator[Any]:
        if _has_own(self._owner, "__reversed__"):
            return self._with_envoys_each(reversed(self._holder_here()))
        return reversed([*self])

    def _with_envoys_each(self, items: Iterator[Any]) -> Iterator[Any]:
        """Iterate over what the part's own class iterates over, with envoys in place of modules."""
        envoy_of = self._envoys()
        return (with_envoys(item, join(self._target.path, number), envoy_of) for number, item in enumerate(items))

    def __contains__(self, item: Any) -> bool:
        """Whether a module or its envoy is directly in this one. A string is looked up among the names."""
        owner = item._owner if isinstance(item, Envoy) else item
        if _has_own(self._owner, "__contains__", "__iter__", "__getitem__"):
            return owner in self._holder_here()
        children = self._tree.children_of(self._target)
        return item in children if isinstance(item, str) else any(child.owner is owner for child in children.values())

    def __bool__(self) -> bool:
        return True

    def _names(self) -> list[str]:
        return self._tree.names_in(self._target)

    def __dir__(self) -> list[str]:
        return sorted({*dir(type(self)), *vars(self), *self._names(), *dir(self._owner)})

    def _hidden_names(self) -> list[str]:
        """Return the names of modules in this one that mean something else on an envoy, such as `output`."""
        return sorted(name for name in self._tree.module_names(self._owner) if hasattr(Envoy, name))

    def __repr__(self) -> str:
        hidden = ", ".join(f'["{name}"]' for name in self._hidden_names())
        hint = f"\nmodules whose names mean something else here: {hidden}" if hidden else ""
        note = self._tree.note_on_values(self.path)
        return f"{self._tree.describe(self._owner)}{hint}" + (f"\n{note}" if note else "")

    def _repr_html_(self) -> str:
        return folded(repr(self))


def _has_own(owner: Any, *names: str) -> bool:
    """Whether the class of a part defines one of these special methods, such as `__getitem__`. Those with which PyTorch
    reaches the modules in a `Sequential`, `ModuleList` or `ModuleDict` do not count."""
    kinds = type(owner).__mro__
    definers = [next((kind for kind in kinds if name in vars(kind)), nn.Module) for name in names]
    return any(kind in _OF_PARAMETERS or not kind.__module__.startswith("torch.") for kind in definers)


# ---- for code outside this module, see `diffsight.extending`


def tree_of(points: Points | InRun) -> Tree:
    """Return the tree of the model that an envoy or a run belongs to."""
    return points._model._tree if isinstance(points, InRun) else points._tree


def target_of(points: Points) -> Target:
    """Return the target of an envoy."""
    return points._target


def owner_of(points: Points) -> Any:
    """Return the module or other part behind an envoy. Its weights may not be loaded yet."""
    return points._target.owner


def selection_of(points: Points) -> Selection | None:
    """Return the part of each value that an envoy is narrowed to; None if it is not."""
    return points._part


def bound_run(points: Points) -> Any:
    """Return the run that an envoy is bound to; None for an envoy of the model."""
    return points._run


def run_meant_by(points: Points, what: str) -> Any:
    """Return the run whose values an envoy returns: the run it is bound to, else the innermost open run of the model.

    Raises NoRunError or WrongThreadError if there is none; `what` names the requested value in the message."""
    if points._run is not None:
        return points._run
    flow, edit = points._flow(what), current_edit()
    return edit.view if edit is not None and edit.flow is flow else flow.run()


def flow_of(run: InRun) -> Flow:
    """Return the flow that moves the model in a run."""
    return run._flow


def model_of(run: InRun) -> Any:
    """Return the model of a run."""
    return run._model


def root_of(run: InRun, part: Selection | None = None) -> Envoy:
    """Return the handle on the whole model, bound to a run, and to a part of its batch."""
    return run.__dict__["_model"]._bound(run, part)


def child_of(envoy: Points, name: str) -> Envoy | MethodEnvoy | None:
    """Return the child, method or standard name called `name` in an envoy; None if there is none. A method has none."""
    return envoy._child(name) if isinstance(envoy, Envoy) else None


def inside(holder: Any, name: str) -> Any:
    """Return what a name refers to in an envoy, or in a result of `Tree.named_value`; None if the name is unknown."""
    if not isinstance(holder, Points):
        return holder.named(name)
    return child_of(holder, name) or holder._tree.named_value(holder, name)


def points_on(points: Points, target: Target) -> Points:
    """Return the points of a value inside the calls of a module, for the same run, call and part."""
    return Points(points._tree, target, points._run, points._call, points._part)


def hint_at(envoy: Envoy, name: str, known: Iterable[str]) -> str:
    """Return a hint at what the user may have meant by a name that an envoy does not have."""
    return envoy._hint(name, known)


def handle_on(envoy: Points, target: Target, part: Selection | None = None) -> Envoy | MethodEnvoy:
    """Return the handle on another target, for the run of `envoy`, and for `part` or else the part of `envoy`."""
    kind = Envoy if target.name in (FORWARD, "__call__") else MethodEnvoy
    return kind(envoy._tree, target, envoy._run, part=envoy._part if part is None else part)


def tell_of_child(tree: Tree, target: Target, name: str, distance: int = 3) -> None:
    """Warn, once for each name in a model, if a value that the user's code asks for has the name of a child module.
    `distance` is the number of calls between that code and this function."""
    is_child = isinstance(target.owner, nn.Module) and name in target.children()
    if is_child and name not in tree.told_names and not is_own_code(sys._getframe(distance).f_globals):
        tree.told_names.add(name)
        handle = in_run(target.path) if target.path else "run"
        warn_user(f'{join(handle, name)} is {_IN_WORDS[name]}; its child of that name is {handle}["{name}"]')


def narrowed(points: Points, part: Selection | None) -> Points:
    """Return the same points, narrowed to `part` of each value instead of any earlier part."""
    return Points(points._tree, points._target, points._run, points._call, part)


def fetch(points: Points, part: str) -> Any:
    """Return a value by the name of its part: "output", "input" or "inputs"."""
    return points._fetch(part)


def assign(points: Points, part: str, value: Any) -> None:
    """Assign a value by the name of its part: "output", "input" or "inputs"."""
    points._assign(part, value)


def part_in_run(points: Points) -> Any:
    """Return the part of the model behind a handle: in a run that works on a copy of the part, the copy."""
    flow = None if points._run is not None else points._tree.open_runs.innermost(points._tree)
    run = points._run if flow is None else flow.run()
    return points._target.owner if run is None else run._own_copy(points._target.owner)
