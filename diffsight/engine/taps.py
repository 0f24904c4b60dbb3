"""All taps of a run: which modules and methods are tapped or counted, and from when.

Calls are counted to know which points the model has passed. The model's components and their children are hooked from
the start. When a point is asked for, all modules around it and their children are hooked as well. So a module is
usually hooked before the module around it is entered, and its count is exact. If it is not (`Origin.unseen`), its past
is unknown, and the point counts as passed. A module that nobody asks for is only counted, in a dictionary. That costs
next to nothing, and most modules of a run are of this kind. `tapped_call` has the code that runs at a call.
"""

from collections.abc import Callable

from torch import nn

from diffsight.engine.hooks import (
    FORWARD,
    HookedModules,
    ModuleGroup,
    count_running,
)
from diffsight.engine.module_places import Key, ModulePlaces, inside
from diffsight.engine.points import INPUTS, Assignment
from diffsight.engine.tapped_call import Host, LearningTap, Origin, Tap
from diffsight.engine.target import Target, structure_changes
from diffsight.engine.threads import RunOfThread, outermost_in_threads
from diffsight.errors import PointNotFoundError


class Taps(dict[Key, Tap]):
    """All taps of a run, by the key of their target, and the counts of the modules beside them.

    Args:
        host: The run.
        components: The targets that are tapped from the start.
        find_places: Returns where the modules below the components stand.
    """

    __slots__ = (
        "_around",
        "_calls_before",
        "_changes",
        "_find_places",
        "_host",
        "_learns",
        "_methods",
        "_opened",
        "_origins",
        "_places",
        "_run_of_thread",
        "_strangers",
        "calls",
        "components",
        "hooked",
    )

    def __init__(
        self, host: Host, components: list[Target], find_places: Callable[[list[Target]], ModulePlaces]
    ) -> None:
        self.components = components
        self._host: Host | None = host
        self._find_places = find_places
        self._places: ModulePlaces | None = None  # None until something is put on the model
        # The rest is made in `start`: a run in which nothing is read does not need it.

    def start(self) -> None:
        """Tap the components, before anything moves."""
        places = self._find_places(self.components)
        self._changes = structure_changes.count
        self._learns = not places.is_known  # whether it taps everything, to learn which modules are strays
        self.calls: dict[int, int | Tap] = {}  # id of a hooked module: its calls so far, or its tap
        self._methods = [target for target in self.components if target.name != FORWARD]
        self._origins: dict[int, Origin] = {}  # of the modules that are only counted
        self._calls_before: dict[int, int] = {}  # their calls before the current step
        self.hooked = HookedModules()
        self._opened: dict[Target, Tap] = {}  # the targets that were asked for
        self._around: dict[Target, Tap | None] = {}  # a target around them, to its tap or else to the tap around it
        self._run_of_thread = RunOfThread()
        self._strangers: set[int] = set()  # modules, by id, that are not in the model
        self._places = places  # from here on there is something to remove
        self._run_of_thread.begin()
        for component in self.components if self._learns else ():
            self._tap_everything(component)
        for component in self.components:
            self._tap_component(component)
        if places.counted:
            self._count(places.counted, Origin(step=self._host.clock.index))

    def note_learned(self) -> None:
        """Note that all strays are known, since the model has run to its end."""
        if self._places is not None and self._learns:
            self._places.is_known = True

    def add(self, target: Target) -> None:
        """Tap one more component, in a run that has started."""
        self.components.append(target)
        if self:
            self._tap_component(target)

    def open(self, target: Target) -> Tap:
        """Return the tap of `target`. If there is none yet, make it and the taps of the modules around it."""
        tap = self._opened.get(target)
        if tap is not None:
            return tap
        if not target.is_seen:
            path = target.path or type(target.owner).__name__
            raise PointNotFoundError(f"{path} has no values: {target.why_unseen}. Ask for a module inside or around it")
        if structure_changes.count != self._changes:
            self._look_again_at_places()
        if self._places.places:
            for place in self._places.places.get(target.key, ()):
                self._tap_around(place)
        around = self._around.get(target.outer) or self._tap_around(target)
        tap = self._opened[target] = self._tap(target, around)
        return tap

    def _look_again_at_places(self) -> None:
        """Count modules that have been put into the model since the run began, where that is necessary."""
        self._changes = structure_changes.count
        self._learns = False  # the new modules have not been tapped from the start
        self._places = self._find_places(self.components)
        new = {number: module for number, module in self._places.counted.items() if number not in self.calls}
        has_begun = self._host.coroutine is not None
        if new:
            self._count(new, Origin(step=self._host.clock.index, unseen=has_begun, unseen_in_step=has_begun))

    def note_call(self, target: Target) -> None:
        """Learn from a call of a module whether it is a stray."""
        places = self._places
        if target.key[0] not in places.counted:
            around = [self.get(outer.key) for outer in places.around(target)]
            if around and not any(tap is None or tap.active for tap in around):
                places.note_stray(target)

    def begin_step(self) -> list[Assignment]:
        """Begin a step. Return the assignments within the last step that were not reached."""
        self._calls_before = dict(self.calls)
        missed: list[Assignment] = []
        for tap in self.values():
            if tap.entered or tap.pending or tap.skips:
                missed += tap.drop_step()
        return missed

    def entered(self) -> dict[Key, int]:
        """Return how many calls have begun, for everything that is counted or tapped."""
        counted = {(number, FORWARD): calls for number, calls in self.calls.items() if type(calls) is int}
        return {key: tap.entered for key, tap in self.items()} | counted

    def is_called_in_thread(self, target: Target) -> bool:
        """Whether the model may have called a module, or one around it, in a thread of its own."""
        components, since = {component.key[0] for component in self.components}, self._run_of_thread.since
        inside = (module.owner for module in (target, *target.around()) if module.key[0] not in components)
        modules = [module for module in inside if isinstance(module, nn.Module)]
        outermost = {number for module in modules for number in outermost_in_threads(module, since)} - components
        return bool(outermost) and (not outermost.isdisjoint(map(id, modules)) or any(map(self._is_below, outermost)))

    def _is_below(self, number: int) -> bool:
        """Whether a module, by id, is below one of the components."""
        if number in self._strangers:
            return False
        owners = [component.owner for component in self.components if isinstance(component.owner, nn.Module)]
        if any(id(module) == number for owner in owners for module in owner.modules()):
            return True
        self._strangers.add(number)
        return False

    def is_in_method(self, around: Tap) -> bool:
        """Whether a tapped method of a module is running."""
        return any(self[method.key].active for method in self._methods if method.owner is around.target.owner)

    def remove(self) -> None:
        """Remove everything from the model."""
        if self._places is None:  # nothing has been put on it
            self._host = None
            return
        self.hooked.unhook()
        self._run_of_thread.end()
        for tap in self.values():
            if tap.hooks:
                tap.remove()
            tap.points.clear()  # points refer to their tap
        self.clear()
        for held in (self.calls, self._origins, self._calls_before, self._opened, self._around):
            held.clear()
        self._host = None  # so that nothing of a run that has ended waits for the garbage collector

    def _tap_component(self, target: Target) -> None:
        if target.name == FORWARD and target.is_compiled():
            self._tap(target, None)  # nothing in it is touched until something in it is asked for
        else:
            self._tap_with_children(target, None, is_compiled=False)

    def _tap_around(self, target: Target) -> Tap | None:
        """Tap the modules around `target` and count the modules directly in them; return the tap of the innermost."""
        outer = target.outer
        if outer is None:
            return None
        if outer not in self._around:
            around = self._tap_around(outer)
            self._around[outer] = self._tap_with_children(outer, around) if outer.is_called else around
        return self._around[outer]

    def _tap_with_children(self, target: Target, around: Tap | None, is_compiled: bool | None = None) -> Tap:
        """Tap a target and count the modules directly in it. Pass `is_compiled` if it is known."""
        tap = self._tap(target, around)
        if tap.children_counted or target.name != FORWARD:
            return tap
        tap.children_counted = True
        tap.look_inside(target.is_compiled() if is_compiled is None else is_compiled)
        group = target.called_modules()
        self._count(group.modules, self._origin(tap), group)
        return tap

    def _count(self, modules: dict[int, nn.Module], origin: Origin, group: ModuleGroup | None = None) -> None:
        """Count the calls of modules, by id, from now on, unless they are counted or tapped already.

        `group` hooks all of them together."""
        if not self.calls.keys().isdisjoint(modules):
            modules = {number: module for number, module in modules.items() if number not in self.calls}
            group = None
        if group is None:
            self.hooked.hook(modules.values())
        else:
            self.hooked.hook_together(group)
        self._origins.update(dict.fromkeys(modules, origin))
        self.calls.update(dict.fromkeys(modules, 0))

    def _count_unregistered(self, outer: Target, origin: Origin) -> None:
        """Count the modules that a module holds beside its children, which the model is about to call as well."""
        components = [component.owner for component in self.components if isinstance(component.owner, nn.Module)]
        registered = {id(module) for component in components for module in component.modules()}
        beside = {id(module): module for module in outer.unregistered() if id(module) not in registered}
        self._count(beside, origin)

    def _tap_everything(self, component: Target) -> None:
        new = {target.key: target for target in inside(component) if target.name == FORWARD and target.key not in self}
        origin = Origin(step=self._host.clock.index)
        taps = {key: LearningTap(self._host, target, origin) for key, target in new.items()}
        self.update(taps)
        self.calls.update((number, tap) for (number, _), tap in taps.items())
        self.hooked.hook([target.owner for target in new.values()])

    def _tap(self, target: Target, around: Tap | None) -> Tap:
        number, name = target.key
        known = self.calls.get(number) if name == FORWARD else self.get(target.key)
        if type(known) is int:
            tap = Tap(self._host, target, self._origins.pop(number), known, self._calls_before.get(number, 0))
            if known and self._host.coroutine is not None:
                tap.active += range(known - count_running(self._host.coroutine.frame, target.owner), known)
            self[target.key] = self.calls[number] = tap
            return tap
        if known is not None:
            return known
        tap = self[target.key] = Tap(self._host, target, self._origin(around))
        if name == FORWARD:
            self.calls[number] = tap
            self.hooked.hook([target.owner])
            if target.outer is not None and not target.is_registered:
                if tap.origin.guard is not None:
                    tap.unseen = tap.unseen_in_step = 1  # it was not counted with the other modules
                else:
                    self._count_unregistered(target.outer, tap.origin)
        else:
            tap.hooks = (*tap.hooks, target.attach(tap))
        return tap

    def _origin(self, around: Tap | None) -> Origin:
        """Return what is known about the past of the modules directly in the module that `around` taps, if they are
        counted from now on."""
        host = self._host
        if around is None or host.coroutine is None:
            return Origin(step=host.clock.index)
        at_inputs = host.parked is not None and host.parked.tap is around and host.parked.key[0] == INPUTS
        running = bool(around.active) and not at_inputs
        methods = [self[method.key] for method in self._methods if method.owner is around.target.owner]
        now = at_inputs or running  # a call of the module around is in progress, and does not count as past
        unseen_in_step = sum(method.entered - method.step_base for method in methods)
        unseen_in_step += max(0, around.entered - around.step_base - now)
        if around.origin.step == host.clock.index:
            unseen_in_step += around.unseen_in_step
        return Origin(
            around,
            host.clock.index,
            around.unseen + around.entered - now + sum(method.entered for method in methods),
            unseen_in_step,
            (around, around.active[-1]) if running else around.origin.guard,
        )
