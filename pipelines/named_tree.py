"""Trees whose parts have standard names, which may stand for spans of modules."""

from collections.abc import Callable, Mapping
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from diffsight.extending import Target, children_in
from diffsight.pipelines.attention.attention_values import AttentionTree
from diffsight.pipelines.module_spans import is_at, target_at


class NamedTree(AttentionTree):
    """A tree that finds the standard names of its parts with `find_names`, once per part."""

    def __init__(self, root: Target, load: Callable[[], None] | None = None) -> None:
        super().__init__(root, load)
        self.known_names: WeakKeyDictionary = WeakKeyDictionary()  # for each part: name to real path
        self._named_targets: dict[tuple, Target] = {}  # targets of the names used so far

    def find_names(self, part: nn.Module) -> dict[str, str]:
        """Return the standard names below a part, name to real path."""
        raise NotImplementedError

    def children_of(self, target: Target) -> Mapping[str, Target]:
        return children_in(target)

    def names_of(self, owner: Any) -> Mapping[str, str]:
        if not isinstance(owner, nn.Module):
            return {}
        if owner not in self.known_names:
            self.known_names[owner] = self.find_names(owner)
        return self.known_names[owner]

    def target_named(self, outer: Target, name: str) -> Target | None:
        real = self.names_of(outer.owner).get(name)
        if real is None:
            return None
        key = (*outer.key, outer.path, name)
        known = self._named_targets.get(key)
        if known is None or not is_at(known, outer, real):
            known = self._named_targets[key] = target_at(outer, name, real)
        return known
