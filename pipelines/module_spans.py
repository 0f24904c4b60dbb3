"""Spans: several modules of a model that are tapped as one.

BART's layers call `fc1` and `fc2` themselves, so no single module is the MLP. There `layer.mlp` is the span `fc1:fc2`:
its input is the input of `fc1`, and its output is the output of `fc2`.
"""

from collections.abc import Callable
from typing import Any

from torch import nn

from diffsight.errors import InputError
from diffsight.extending import Tap, Target, current_owner, join


class HookHandle:
    """Removes the hooks that a run has installed on a model."""

    def __init__(self, *undo: Callable[[], None]) -> None:
        self._undo = undo

    def remove(self) -> None:
        for undo in self._undo:
            undo()


class Span(Target):
    """Several modules treated as one, from the inputs of `first` to the output of `last`, below the target `outer`."""

    __slots__ = ("first", "last")

    def __init__(self, outer: Target, name: str, first: Target, last: Target) -> None:
        super().__init__(outer.owner, name, join(outer.path, name), outer)
        self.first, self.last = first, last

    def attach(self, tap: Tap) -> HookHandle:
        """Send the calls between both modules through the tap."""
        host, first, last = tap.host, self.first.owner, self.last.owner

        def before(module: nn.Module, args: tuple, kwargs: dict | None = None) -> Any:
            return tap.enter(args, kwargs) if current_owner() is host and host.taps else None

        def after(module: nn.Module, args: tuple, output: Any) -> Any:
            if current_owner() is not host or not host.taps:
                return None
            skip = tap.skips.pop(tap.active[-1], None) if tap.skips and tap.active else None
            return tap.leave(output if skip is None else skip.value)

        handles = [
            first.register_forward_pre_hook(before, with_kwargs=True),
            last.register_forward_hook(after, prepend=True),
        ]
        return HookHandle(*(handle.remove for handle in handles))

    def call(self, *args: Any, **kwargs: Any) -> Any:
        raise InputError(
            f"{self.path} cannot be called, because it is not a single module: it is made of {self.first.path} and "
            f"{self.last.path}, which the module around them calls itself"
        )


def target_at(outer: Target, name: str, real: str) -> Target:
    """Return the target at the real path (or span, `first:last`) below `outer`, under its standard name."""
    if ":" not in real:
        found = _below(outer, real)
        return Target(found.owner, found.name, join(outer.path, name), found.outer)
    first, last = (_below(outer, path) for path in real.split(":"))
    return Span(outer, name, first, last)


def is_at(target: Target, outer: Target, real: str) -> bool:
    """Return whether a target created earlier is still at the real path below `outer`."""
    first, _, last = real.partition(":")
    if isinstance(target, Span):
        return target.first.owner is _below(outer, first).owner and target.last.owner is _below(outer, last).owner
    return target.owner is _below(outer, first).owner


def _below(outer: Target, path: str) -> Target:
    found = outer
    for step in path.split("."):
        found = found.children()[step]
    return found


def module_at(module: nn.Module, real: str) -> tuple[nn.Module, nn.Module]:
    """Return the first and the last module of a real path or span."""
    first, _, last = real.partition(":")
    return module.get_submodule(first), module.get_submodule(last or first)
