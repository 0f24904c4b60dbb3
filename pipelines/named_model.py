"""Models whose parts have standard names, which may stand for spans of modules."""

from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from diffsight.extending import Model, Target
from diffsight.pipelines.targets import is_at, target_at


class NamedModel(Model):
    """A model that finds the standard names of its parts with `_find_names`, once per part."""

    _known: WeakKeyDictionary  # for each part, name to real path
    _targets: dict  # of the names used so far

    def _find_names(self, part: nn.Module) -> dict[str, str]:
        """Return the standard names below a part, name to real path."""
        raise NotImplementedError

    def _names_of(self, owner: Any) -> Mapping[str, str]:
        if not isinstance(owner, nn.Module):
            return {}
        if owner not in self._known:
            self._known[owner] = self._find_names(owner)
        return self._known[owner]

    def _target_named(self, outer: Target, name: str) -> Target | None:
        real = self._names_of(outer.owner).get(name)
        if real is None:
            return None
        key = (*outer.key, outer.path, name)
        known = self._targets.get(key)
        if known is None or not is_at(known, outer, real):
            known = self._targets[key] = target_at(outer, name, real)
        return known
