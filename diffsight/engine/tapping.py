"""What a run has tapped, and what it knows of the rest.

To know what lies behind, calls are counted. The model's components and their children are followed from the start, and
with a point all modules around it and their children: so a module is, as a rule, followed before the one around it is
entered, and its count is exact. Where it is not (`Origin.unseen`), the past is unknown and the point counts as passed.

A module beside what the body asks for is only counted, in a dictionary: that costs next to nothing, and most modules
of a run are such.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from diffsight.engine.hooks import FORWARD, count_running, follow, unfollow
from diffsight.engine.taps import INPUTS, Assignment, Origin, Tap, Target
from diffsight.errors import PointNotFoundError

if TYPE_CHECKING:
    from diffsight.engine.flow import Flow

Key = tuple[int, str]
Places = dict[Key, list[Target]]


class Taps(dict[Key, Tap]):
    """The taps of a run, by the key of their target, and the counts of the modules beside them.

    `components` are tapped from the start, `find_places` gives the modules that stand in several places."""

    def __init__(
        self, flow: "Flow", components: Sequence[Target], find_places: Callable[[list[Target]], Places]
    ) -> None:
        super().__init__()
        self.components = list(components)
        self.counts: dict[int, int] = {}  # id of a module that is only counted: its calls so far
        self._flow: Flow | None = flow
        self._find_places = find_places
        self._places: Places | None = None
        self._methods = [target for target in components if target.name != FORWARD]
        self._origins: dict[int, Origin] = {}  # of the modules that are only counted
        self._counts_before: dict[int, int] = {}  # their calls before the current step
        self._followed: list = []  # all modules, those with taps too
        self._opened: set[Target] = set()  # what was asked for
        self._around: dict[Target, Tap | None] = {}  # what lies around that, to the tap of it or of what it lies in

    def start(self) -> None:
        """Taps the components, before anything moves."""
        for component in self.components:
            self._tap_component(component)

    def add(self, target: Target) -> None:
        """Taps one more component, in a run that has started."""
        self.components.append(target)
        if self:
            self._tap_component(target)

    def open(self, target: Target) -> Tap:
        """The tap of `target`, made now if there is none, along with those of the modules around it."""
        if target in self._opened:
            return self[target.key]
        if not target.is_called:
            raise PointNotFoundError(
                f"{target.path} has no values: {type(target.owner).__name__} is not called by the model, it only "
                "holds others. Ask for one of them"
            )
        if self._places is None:
            self._places = self._find_places(self.components)
        for place in self._places.get(target.key, ()):
            self._tap_around(place)
        around = self._around.get(target.outer) or self._tap_around(target)
        tap = self._tap(target, around)
        self._opened.add(target)
        return tap

    def begin_step(self) -> list[Assignment]:
        """A step begins. Gives what was assigned within the last one and not reached."""
        self._counts_before = dict(self.counts)
        missed: list[Assignment] = []
        for tap in self.values():
            if tap.entered or tap.pending or tap.skips:
                missed += tap.drop_step()
        return missed

    def entered(self) -> dict[Key, int]:
        """How many calls have begun, of all that is followed."""
        return {key: tap.entered for key, tap in self.items()} | {(i, FORWARD): n for i, n in self.counts.items()}

    def in_method(self, around: Tap) -> bool:
        """Whether a tapped method of a module is running."""
        return any(self[method.key].active for method in self._methods if method.owner is around.target.owner)

    def remove(self) -> None:
        """Takes everything off the model."""
        unfollow(self._followed)
        for tap in self.values():
            if tap.hooks:
                tap.remove()
            tap.points.clear()  # which know their tap
        self.clear()
        for held in (self.counts, self._origins, self._counts_before, self._followed, self._opened, self._around):
            held.clear()
        self._flow = None  # so that nothing of a run that has ended waits for the garbage collector

    def _tap_component(self, target: Target) -> None:
        if target.name == FORWARD and target.is_compiled():
            self._tap(target, None)  # nothing in it is touched before something in it is asked for
        else:
            self._tap_with_children(target, None)

    def _tap_around(self, target: Target) -> Tap | None:
        """Taps the modules around `target` and counts what lies directly in them; gives the tap of the innermost."""
        outer = target.outer
        if outer is None:
            return None
        if outer not in self._around:
            around = self._tap_around(outer)
            self._around[outer] = self._tap_with_children(outer, around) if outer.is_called else around
        return self._around[outer]

    def _tap_with_children(self, target: Target, around: Tap | None) -> Tap:
        tap = self._tap(target, around)
        if tap.children_counted or target.name != FORWARD:
            return tap
        tap.children_counted = True
        tap.look_inside()
        children = {
            id(child.owner): child.owner
            for child in target.called_children()
            if child.key not in self and child.key[0] not in self.counts
        }
        follow(children.values(), self._followed)
        self._origins.update(dict.fromkeys(children, self._origin(tap)))
        self.counts.update(dict.fromkeys(children, 0))
        return tap

    def _tap(self, target: Target, around: Tap | None) -> Tap:
        tap = self.get(target.key)
        if tap is not None:
            return tap
        number, owner = target.key[0], target.owner
        if target.name != FORWARD or number not in self.counts:
            tap = self[target.key] = Tap(self._flow, target, self._origin(around))
            if target.name == FORWARD:
                follow([owner], self._followed)
            else:
                tap.hooks.append(target.attach(tap))
            return tap
        entered, origin = self.counts.pop(number), self._origins.pop(number)
        tap = self[target.key] = Tap(self._flow, target, origin, entered, self._counts_before.get(number, 0))
        if entered and self._flow.coroutine is not None:
            tap.active += range(entered - count_running(self._flow.coroutine.frame, owner), entered)
        return tap

    def _origin(self, around: Tap | None) -> Origin:
        """What is known of the past of the modules in the one that `around` taps, if they are followed from now on."""
        flow = self._flow
        if around is None or flow.coroutine is None:
            return Origin(step=flow.clock.index)
        at_inputs = flow.parked is not None and flow.parked.tap is around and flow.parked.key[0] == INPUTS
        running = bool(around.active) and not at_inputs
        methods = [self[method.key] for method in self._methods if method.owner is around.target.owner]
        now = at_inputs or running  # a call of the module around is going on, and does not count as past
        unseen_in_step = sum(method.entered - method.step_base for method in methods)
        unseen_in_step += max(0, around.entered - around.step_base - now)
        if around.origin.step == flow.clock.index:
            unseen_in_step += around.unseen_in_step
        return Origin(
            around,
            flow.clock.index,
            around.unseen + around.entered - now + sum(method.entered for method in methods),
            unseen_in_step,
            (around, around.active[-1]) if running else around.origin.guard,
        )
