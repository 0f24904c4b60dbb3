"""Where the modules of a model stand, and which of them are called directly, bypassing the modules around them.

A module is usually called by the module around it. So it is enough to count its calls from the moment that the model
enters the module around it. Two kinds of modules have to be counted from the start of every run: those that stand in
several places, and strays, which the model calls while no module around them is running (`net` calls `net.block.norm`
itself, for example). Strays are not known before the model has run. So the first run in which anything is read taps
everything, and learns them.
"""

from torch.jit import ScriptModule

from diffsight.engine.hooks import FORWARD
from diffsight.engine.target import Target

Key = tuple[int, str]


class Layout:
    """The modules below some components of a model.

    `places` are the targets of the modules that stand in several places, by key. `counted` are the modules, by id,
    that are counted from the start of every run. `is_known` is False until a run has learned the strays."""

    def __init__(self, components: list[Target]) -> None:
        places: dict[Key, list[Target]] = {}
        waiting = [*components]
        while waiting:
            target = waiting.pop()
            places.setdefault(target.key, []).append(target)
            waiting += target.children().values() if target.name == FORWARD else ()
        self.places = {key: found for key, found in places.items() if len(found) > 1}
        shared = [found[0] for found in self.places.values() if found[0].name == FORWARD]
        self.counted = {target.key[0]: target.owner for target in shared if target.is_called}
        self.is_known = False

    def around(self, target: Target) -> list[Target]:
        """Return what calls a module: the module around it, in every place where it stands."""
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


def inside(component: Target) -> list[Target]:
    """Return a component and all modules inside it that are called one by one: nothing in compiled code is."""
    found, waiting = [], [component]
    while waiting:
        target = waiting.pop()
        found.append(target)
        if target.name == FORWARD and not target.is_compiled() and not isinstance(target.owner, ScriptModule):
            waiting += target.called_children()
    return found
