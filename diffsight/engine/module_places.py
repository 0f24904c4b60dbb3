"""Where the modules of a model stand, and which of them are called directly, bypassing the modules around them.

A module is usually called by the module around it. So it is enough to count its calls from the moment that the model
enters the module around it. Two kinds of modules have to be counted from the start of every run: those that stand in
several places, and strays, which the model calls while no module around them is running (`net` calls `net.block.norm`
itself, for example). Some strays can be recognised in the code of the modules around them, which uses their names.
The others are unknown until the model has run. So the first run in which anything is read taps everything to learn
them.
"""

import dis
from functools import cache
from types import CodeType

from torch import nn
from torch.jit import ScriptModule

from diffsight.engine.function_code import codes_of, function_of
from diffsight.engine.hooks import FORWARD
from diffsight.engine.target import Target

Key = tuple[int, str]


class ModulePlaces:
    """The modules below some components of a model.

    `places` are the targets of the modules that stand in several places, by key. `counted` are the modules, by id,
    that are counted from the start of every run. `is_known` is False until a run has learned the strays."""

    def __init__(self, components: list[Target]) -> None:
        places: dict[Key, list[Target]] = {}
        waiting = [*components]
        while waiting:
            target = waiting.pop()
            places.setdefault(target.key, []).append(target)
            waiting += target.inner() if target.name == FORWARD else ()
        self.places = {key: found for key, found in places.items() if len(found) > 1}
        shared = [found[0] for found in self.places.values() if found[0].name == FORWARD]
        strays = (target for found in places.values() for target in found if _may_be_stray(target))
        self.counted = {target.key[0]: target.owner for target in (*shared, *strays) if target.is_called}
        self.is_known = False

    def around(self, target: Target) -> list[Target]:
        """Return the targets that call a module: the module around it, in every place where it stands."""
        found = []
        for place in self.places.get(target.key, (target,)):
            outer = place.outer
            while outer is not None and not outer.is_called:  # a list of modules
                outer = outer.outer
            if outer is not None:
                found.append(outer)
        return found

    def note_stray(self, target: Target) -> None:
        """Count a module from the start of every later run."""
        self.counted[target.key[0]] = target.owner


def _may_be_stray(target: Target) -> bool:
    """Whether the code of a module further out uses the name of a module, and so may call it."""
    *further, _ = [outer for outer in target.around() if outer.is_called] or [target]
    if not further:
        return False
    names = _names(target.path)
    by_index = names[-1].isdigit()
    name = next((name for name in reversed(names) if not name.isdigit()), "")
    return any(name in _names_in_code(type(outer.owner), by_index) for outer in further)


_ENTRIES = ("forward", "encode", "decode")  # the methods through which models are called


@cache
def _names_in_code(cls: type, by_index: bool) -> frozenset[str]:
    """Return the attributes that a class uses in its forward pass and in the methods and functions called from it, as
    far as these belong to the same package. With `by_index`, return only those used in code that also indexes or
    iterates."""
    found: set[str] = set()
    package, seen = cls.__module__.partition(".")[0], {*_ENTRIES}
    bases = [vars(base) for base in cls.__mro__ if not issubclass(nn.Module, base)]  # `super()` may call their methods
    waiting = [function_of(own[name]) for own in bases for name in _ENTRIES if name in own]
    for function in waiting:
        codes = [*codes_of(function)]
        used = {name for code in codes for name in code.co_names}
        for name in sorted(used - seen):
            seen.add(name)
            if not hasattr(nn.Module, name):
                waiting += [function_of(own[name]) for own in bases if name in own]
        for called in map(function_of, map(getattr(function, "__globals__", {}).get, used)):
            if called not in waiting and getattr(called, "__module__", "").partition(".")[0] == package:
                waiting.append(called)
        if not by_index or any(map(_indexes, codes)):
            found |= used
    return frozenset(found)


def _indexes(code: CodeType) -> bool:
    names = {(given.opname, given.argrepr) for given in dis.get_instructions(code)}
    return any(name in ("BINARY_SUBSCR", "BINARY_SLICE", "GET_ITER") or text == "[]" for name, text in names)


def _names(path: str) -> list[str]:
    return path.replace("[", ".").replace("]", "").strip(".").split(".")


def inside(component: Target) -> list[Target]:
    """Return a component and all modules inside it that are called one by one. Modules in compiled code are not."""
    found, waiting = [], [component]
    while waiting:
        target = waiting.pop()
        found.append(target)
        if target.name == FORWARD and not target.is_compiled() and not isinstance(target.owner, ScriptModule):
            waiting += target.inner()
    return [target for target in found if target.is_called or target is component]
