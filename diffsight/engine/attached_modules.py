"""The user's own modules, attached to parts of a model so that edits can call them: `edited.layers[0].sae = SAE()`."""

from collections.abc import Iterator
from typing import Any

from torch import nn

from diffsight.engine.hooks import FORWARD
from diffsight.engine.target import Target

Key = tuple[int, str]


class AttachedModules:
    """The modules that were attached to a model.

    In a run they are components of their own beside the model: edits call them, not the module they are attached to."""

    def __init__(self) -> None:
        self.targets: dict[Key, Target] = {}  # by the id of the module they are attached to, and their name
        self.ever: list[nn.Module] = []  # all that were ever attached, to any copy of the model
        self._real: list[tuple[nn.Module, str, nn.Module]] = []  # those that are children of their owner

    def copy(self) -> "AttachedModules":
        """Return a copy, for a copy of the model."""
        copied = AttachedModules()
        copied.targets, copied.ever = dict(self.targets), self.ever
        return copied

    def find(self, owner: Any, name: str) -> Target | None:
        """Return the target of the module attached to `owner` under `name`."""
        return self.targets.get((id(owner), name))

    def add(self, owner: nn.Module, name: str, path: str, module: nn.Module, is_real: bool) -> Target:
        """Attach `module` under `path`; with `is_real`, also make it a child of its owner."""
        self.ever.append(module)
        target = self.targets[id(owner), name] = Target(module, FORWARD, path)
        if is_real:
            owner.add_module(name, module)
            self._real.append((owner, name, module))
        return target

    def names_on(self, owner: Any) -> Iterator[str]:
        """Return the names of the modules attached to `owner`."""
        return (name for number, name in self.targets if number == id(owner))

    def clear(self) -> None:
        """Remove all attached modules."""
        self.targets.clear()
        for owner, name, module in self._real:
            if owner._modules.get(name) is module:
                delattr(owner, name)
        self._real.clear()
