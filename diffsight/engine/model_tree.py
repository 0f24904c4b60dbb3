"""The tree of a model: what can be tapped in it, and under which names."""

import inspect
from collections.abc import Callable, Mapping
from types import FunctionType
from typing import Any, Self

from torch import nn

from diffsight.engine.attached_modules import AttachedModules
from diffsight.engine.innermost_run import OpenRuns
from diffsight.engine.late_weights import LateWeights, needs_weights
from diffsight.engine.module_places import ModulePlaces
from diffsight.engine.step_clock import Clock
from diffsight.engine.target import WRAPPED, Target, join, structure_changes
from diffsight.errors import DiffsightError, InputError, PointNotFoundError

Key = tuple[int, str]


class Tree:
    """What can be tapped in a model, and under which names. Wrappers override its methods, see `diffsight.extending`.

    A model and each of its edited copies have their own tree. The trees share the modules and know of each other's
    runs, but each has its own attached modules.

    Args:
        root: The target of the model as a whole.
        load: Puts the weights into a model that was built without them; None if they are there.
    """

    opens_with = "trace"  # the method of the model that opens a run, for error messages
    elsewhere: Any = None  # calls parts of a model whose weights are on a server, see `diffsight.remote`
    has_private_names = False  # whether modules have names that begin with "_", such as those that handles may use

    def __init__(self, root: Target, load: Callable[[], None] | None = None) -> None:
        self.root = root
        self.is_copy = False
        self.open_runs = OpenRuns()
        self.attached = AttachedModules()
        self.weights = LateWeights(load, self._check_no_scan, self.weights_loaded)
        self.told_names: set[str] = set()  # of child modules, for which a value of that name was once taken
        self._methods: dict[int, dict[str, str]] = {}  # id of an object: names of its methods to their paths
        self._known_places: tuple[tuple, ModulePlaces] | None = None

    @property
    def title(self) -> str:
        """What error messages call the model."""
        return type(self.root.owner).__name__

    def copy(self) -> Self:
        """Return a tree of the same modules that starts with the same attached modules."""
        copied = object.__new__(type(self))
        copied.__dict__.update(self.__dict__)
        copied.is_copy, copied.attached = True, self.attached.copy()
        return copied

    # ---- parts and names: what wrappers override

    def children_of(self, target: Target) -> Mapping[str, Target]:
        """Return the parts directly in a part of the model, by name."""
        return target.named_children()

    def methods_of(self, owner: Any) -> Mapping[str, str]:
        """Return the methods of a part that can be tapped besides its forward pass: name to path from the model."""
        return self._methods.get(id(owner), {})

    def meant_by(self, target: Target, name: str) -> str:
        """Return this model's own name for the part that other models call `name`."""
        return name

    def names_of(self, owner: Any) -> Mapping[str, str]:
        """Return the standard names of what lies below a part: name to real path from the part."""
        return {}

    def target_named(self, outer: Target, name: str) -> Target | None:
        """Return the target of a standard name below a part; None if it is not a standard name."""
        real = self.names_of(outer.owner).get(name)
        if real is None:
            return None
        found = outer
        for step in real.split("."):
            found = found.children()[step]
        return Target(found.owner, found.name, join(outer.path, name), found.outer)

    def named_value(self, points: Any, name: str) -> Any:
        """Return the meaning of a name on a module's envoy (`points`) beyond the module's own attributes: the points of
        a value inside its calls, such as `attention_probs`, or an object whose `named(name)` finds such points. None if
        it has no meaning."""
        return None

    def value_names(self, target: Target) -> tuple[str, ...]:
        """Return the names of the values inside the calls of a module that patterns match."""
        return ()

    def value_target(self, target: Target, name: str) -> Target | None:
        """Return the target of a value inside the calls of a module, given its `name`; None if there is none. A remote
        run names such values in this way, since a module may have an attribute of the same name."""
        return None

    def components(self) -> list[Target]:
        """Return the targets tapped from the start of every run: the model, and the methods called directly."""
        if not self._methods:
            return [self.root]
        paths = [path for methods in self._methods.values() for path in methods.values()]
        return [self.root, *map(self._method_at, paths)]

    def stand_ins(self) -> Mapping[Key, Callable]:
        """Return the functions that a scan calls instead of components that look at values, by key of the component."""
        return {}

    def clock(self) -> Clock:
        """Return the clock that determines when a step begins; by default, at each forward pass."""
        return Clock([self.root])

    def describe(self, owner: Any) -> str:
        """Return the `repr` of a part: the tree as PyTorch prints it, then the methods that can be tapped."""
        inside = {id(module) for module in owner.modules()} if isinstance(owner, nn.Module) else {id(owner)}
        paths = [path for number, methods in self._methods.items() if number in inside for path in methods.values()]
        methods = "\ntraceable besides modules: " + ", ".join(f"{path}()" for path in paths) if paths else ""
        return f"{owner!r}{methods}{self.describe_weights()}"

    def note_on_values(self, path: str) -> str:
        """Return what users should know about the values of the part at a path, in a sentence; "" if nothing."""
        return ""

    def attribute(self, owner: Any, name: str) -> Any:
        """Return an attribute of a part of the model. If it concerns weights that are not loaded yet, load them."""
        try:
            value = getattr(owner, name)
        except KeyError as error:  # pipelines look into their configuration, also for names that dictionaries have
            raise AttributeError(name) from error
        is_part = isinstance(owner, nn.Module) or owner is self.root.owner
        if self.weights.are_loaded or not is_part or not needs_weights(value):
            return value
        self.load_unless_scanning()
        return getattr(owner, name)

    def weights_loaded(self) -> None:
        """Called once, after weights that are loaded on first use have been loaded."""

    # ---- what a tree answers

    def look_for_private_names(self) -> None:
        """Note whether modules have names that handles may use for themselves."""
        names = self.module_names(self.root.owner)
        self.has_private_names = any(name.startswith("_") and name != WRAPPED for name in names)

    def module_names(self, owner: Any) -> set[str]:
        """Return the names that modules have anywhere inside a part."""
        if not isinstance(owner, nn.Module):
            parts = [target.owner for target in self.children_of(self.root).values()]
            modules = [part for part in parts if isinstance(part, nn.Module)] if owner is self.root.owner else []
        else:
            modules = [owner]
        return {name for module in modules for inner in module.modules() for name, _ in inner._modules.items()}

    def child_of(self, target: Target, name: str) -> Target | None:
        """Return the child, method or standard name called `name` in a part; None if there is none. In a list, a number
        such as "-1" is a name as well."""
        children, owner = self.children_of(target), target.owner
        child = children.get(name)
        if child is None and isinstance(owner, (nn.ModuleList, nn.Sequential)) and name.removeprefix("-").isdecimal():
            numbers = map(str, range(-len(children), len(children)))
            child = dict(zip(numbers, [*children.values()] * 2)).get(name)
        if child is not None:
            return child
        if name in self.methods_of(owner):
            return Target(owner, name, join(target.path, name), target if isinstance(owner, nn.Module) else None)
        return self.target_named(target, name)

    def names_in(self, target: Target) -> list[str]:
        """Return the names of everything in a part: children, attached modules, methods, standard names."""
        children = dict.fromkeys((*self.children_of(target), *self.attached.names_on(target.owner)))
        return list(dict.fromkeys([*children, *self.methods_of(target.owner), *self.names_of(target.owner)]))

    def module_places(self, components: list[Target]) -> ModulePlaces:
        """Return where the modules below the components stand."""
        known_for = ([target.owner for target in components], self.weights.are_loaded, structure_changes.count)
        if self._known_places is None or self._known_places[0] != known_for:
            self._known_places = (known_for, ModulePlaces(components))
        return self._known_places[1]

    def add_method(self, owner: Any, name: str, path: str) -> None:
        """Allow tapping a method that code calls directly, bypassing the forward pass."""
        if not isinstance(inspect.getattr_static(type(owner), name, None), FunctionType):
            raise PointNotFoundError(f"methods: {path!r} is not a method, or is not called on a {type(owner).__name__}")
        self._methods.setdefault(id(owner), {})[name] = path

    def attach(self, owner: Any, name: str, path: str, module: nn.Module) -> None:
        """Attach a module to a part of the model, for edits to call. On a copy, the part itself stays unchanged."""
        if not isinstance(owner, nn.Module):
            raise InputError(f"{path}: a module can be attached to a module, not to a {type(owner).__name__}")
        if self.attached.find(owner, name) is None and hasattr(owner, name):
            raise InputError(f"{path} exists already: attach the module under another name, and assign its output")
        if not self.is_copy:
            self.weights.load()  # loading gives each module the children of the loaded one
        target = self.attached.add(owner, name, path, module, is_real=not self.is_copy)
        for flow in self.open_runs.open():
            if flow.tree is self:
                flow.taps.add(target)

    def load_unless_scanning(self) -> None:
        """Load the weights if necessary, except in the body of a scan, where calls and attributes need none."""
        run = None if self.weights.are_loaded else self.open_runs.innermost(self)
        if run is None or not run.is_scan:
            self.weights.load()

    def describe_weights(self) -> str:
        """Return a line for the `repr` of a model whose weights are not loaded yet, else an empty string."""
        return "" if self.weights.are_loaded else "\nweights: not loaded yet, the first run loads them"

    def _check_no_scan(self) -> None:
        if any(run.is_scan and run.has_begun for run in self.open_runs.open()):
            raise DiffsightError(
                f"the weights of {self.title} are not loaded yet, and cannot be loaded while a scan of it is open: end "
                "the scan first, or load the weights before it"
            )

    def _method_at(self, path: str) -> Target:
        found: Target | None = self.root
        for step in path.replace("[", ".").replace("]", "").split("."):
            found = found and self.child_of(found, step)
        if found is None:
            raise PointNotFoundError(f"methods: {path!r} is not in the model any more")
        return found
