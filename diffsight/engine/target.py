"""Targets: what can be tapped. A module's forward pass, or a method that code calls directly (`vae.decode`)."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from typing import Any

from torch import nn

from diffsight.engine.hooks import COMPILED, FORWARD, ModuleGroup
from diffsight.engine.tapped_methods import TappedMethod
from diffsight.engine.unseen_modules import why_unseen

WRAPPED = "_orig_mod"  # in the module that `torch.compile(module)` makes: the module itself
_UNCOMPILED = "_torchdynamo_orig_callable"  # on a function that `torch.compile(function)` makes: the function itself


class StructureChanges:
    """How often the modules directly in some module have been found to be others than before."""

    count = 0


structure_changes = StructureChanges()


class Target:
    """One thing that can be tapped: the forward pass of a module (`name` is "forward"), or another method of an object.

    A target that is neither, such as attention probabilities, has a subclass with its own `attach` and `call`.

    Args:
        owner: The module or other object.
        name: The name of the method.
        path: The path as the user writes it: `unet.mid_block`, `layers[4]`, `vae.decode`.
        outer: The target of the module around it.
    """

    __slots__ = ("_called", "_children", "asked", "is_called", "is_seen", "key", "name", "outer", "owner", "path")
    is_value = False  # whether it is a value inside the calls of `outer`, and has their numbers
    if_missing = ""  # what an error adds if the model does not reach it

    def __init__(self, owner: Any, name: str, path: str, outer: "Target | None" = None) -> None:
        self.owner, self.name, self.path, self.outer = owner, name, path, outer
        self.key = (id(owner), name)
        self.asked: dict[str, Any] = {}  # part to the point in the first call, see `Points`
        self.is_called = True  # False if there is nothing to call: a ModuleList, for example, has no forward pass
        if name == "__call__":
            self.is_called = callable(owner)
        elif name == FORWARD:
            forward = getattr(type(owner), FORWARD, None)
            self.is_called = forward is not nn.Module.forward or FORWARD in owner.__dict__
        self.is_seen = self.is_called and (name != FORWARD or why_unseen(type(owner)) is None)  # whether it has values
        self._children: tuple[dict, dict[str, Target]] | None = None
        self._called: tuple[list[Target], list[dict], ModuleGroup] | None = None  # see `called_modules`

    @property
    def why_unseen(self) -> str:
        """The reason why the target cannot be seen and has no values to read, in words."""
        why = why_unseen(type(self.owner)) if self.name == FORWARD else None
        return why or f"{type(self.owner).__name__} is never called by the model; it only holds other modules"

    def attach(self, tap: Any) -> Any:
        """Send every call through `tap` from now on; return an object whose `remove()` undoes it.

        This is for methods; forward passes are hooked by `Taps`. Subclasses call `tap.enter` and `tap.leave`, or
        `tap.call`, see `diffsight.engine.tapped_call.Tap`."""
        return TappedMethod(self.owner, self.name)

    def decided_by(self, tap: Any) -> Any:
        """Return the tap of the call in progress whose end decides whether a value read from `tap` was the intended
        one; None if there is none."""
        return None

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """Call the method."""
        return getattr(self.owner, self.name)(*args, **kwargs)

    def point(self, part: str, call: int) -> str:
        """Return the path of a point as the user writes it: `unet.mid_block.calls[1].output`."""
        return join(join(self.path, f"calls[{call}]") if call else self.path, part)

    def around(self) -> list["Target"]:
        """Return the targets of the modules around this one, outermost first."""
        return [*self.outer.around(), self.outer] if self.outer else []

    def children(self) -> dict[str, "Target"]:
        """Return the modules directly in this one, by name. They are kept as long as the modules stay the same."""
        if not isinstance(self.owner, nn.Module):
            return {}
        modules = self.owner._modules
        if self._children is None or self._children[0] != modules:
            structure_changes.count += self._children is not None
            around = {id(target.owner): target for target in (*self.around(), self)}
            self._children = (
                dict(modules),
                {
                    name: around.get(id(module)) or Target(module, FORWARD, join(self.path, name), self)
                    for name, module in modules.items()
                    if module is not None
                },
            )
        return self._children[1]

    def inner(self) -> list["Target"]:
        """Return the modules directly in this one, without those that are around it (`child.parent = module`)."""
        return [child for child in self.children().values() if child.outer is self]

    def item(self, index: int) -> "Target | None":
        """Return an entry of a `ModuleList`; None if it does not exist. This takes no longer in a long list."""
        modules = self.owner._modules
        name = str(index + len(modules) if index < 0 else index)
        module, known = modules.get(name), self._children and self._children[1].get(name)
        return known if known and known.owner is module else self.children().get(name)

    def named_children(self) -> dict[str, "Target"]:
        """Return the children as a user names them. `torch.compile(module)` has the children of `module`."""
        children = self.children()
        wrapped = children.get(WRAPPED)
        return children if wrapped is None else {**wrapped.children(), **children}

    @property
    def is_registered(self) -> bool:
        """Whether a module is a child of the module around it, not in a plain list of it, say."""
        return self.outer is None or any(child.owner is self.owner for child in self.outer.children().values())

    def unregistered(self) -> list[nn.Module]:
        """Return the modules that this one holds in plain lists and dictionaries, or otherwise beside its children."""
        return unregistered_in(self.owner)

    def called_modules(self) -> ModuleGroup:
        """Return the modules directly in this one. A list or dict, which is never called itself, is replaced by the
        modules in it. The result is kept as long as the modules stay the same."""
        known = self._called
        if known is None or [*map(Target.children, known[0])] != known[1]:
            holders = [self]
            found: dict[int, nn.Module] = {}
            for holder in holders:
                children = holder.inner()
                found.update((child.key[0], child.owner) for child in children if child.is_called)
                holders += [child for child in children if not child.is_called]
            known = self._called = holders, [holder.children() for holder in holders], ModuleGroup(found)
        return known[2]

    def is_compiled(self) -> bool:
        """Whether `torch.compile` made the module, or the function that it calls. Nothing inside can be seen then."""
        known = vars(self.owner)
        if WRAPPED in known.get("_modules", ()) or known.get(COMPILED) is not None:
            return True
        forward = known.get(FORWARD)
        return forward is not None and _UNCOMPILED in getattr(forward, "__dict__", ())

    def uncompiled(self) -> Callable:
        """Return the uncompiled function or module of a compiled module."""
        known = vars(self.owner)
        if known.get(COMPILED) is not None:
            return self.owner._call_impl
        return known["_modules"].get(WRAPPED) or getattr(known[FORWARD], _UNCOMPILED)


def all_modules(owners: Iterable[nn.Module]) -> list[nn.Module]:
    """Return all modules in some modules, those that they hold in plain lists and the like included."""
    found: dict[nn.Module, None] = {}
    owners = [*owners]
    for owner in owners:
        new = [module for module in owner.modules() if module not in found]
        found.update(dict.fromkeys(new))
        owners += chain.from_iterable(map(unregistered_in, new))
    return [*found]


def unregistered_in(module: nn.Module) -> list[nn.Module]:
    """Return the modules that a module holds in plain lists and dictionaries, or otherwise beside its children."""
    return [*_modules_in([value for name, value in vars(module).items() if name != "_modules"])]


def _modules_in(value: Any, levels: int = 4) -> Iterator[nn.Module]:
    """Yield the modules in a value, which may be in containers within each other."""
    if isinstance(value, nn.Module):
        yield value
    elif levels and isinstance(value, (list, tuple, set, dict)):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _modules_in(one, levels - 1)


def join(path: str, name: str | int) -> str:
    """Return the path of a child as a user writes it: `unet.mid_block`, `layers[4]`."""
    if isinstance(name, int) or name.isdigit():
        return f"{path}[{name}]"
    if name.startswith("["):
        return f"{path}{name}"
    return f"{path}.{name}" if path else name


def in_run(path: str) -> str:
    """Return a path as a user writes it in the body of a run: `run.unet.mid_block`, `run[0]`."""
    return f"run{path}" if path.startswith("[") else f"run.{path}"


def part_targets(parts: Mapping[str, Any], known: dict[str, Target]) -> dict[str, Target]:
    """Return a target for each part of a pipeline, by name.

    `known` holds the targets made earlier. Each is reused until its part is replaced."""
    for name, part in parts.items():
        if name not in known or known[name].owner is not part:
            known[name] = Target(part, FORWARD if isinstance(part, nn.Module) else "__call__", name)
    return {name: known[name] for name in parts}
