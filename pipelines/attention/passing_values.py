"""Values that are computed inside a module: the run reads and changes them as they pass a tap."""

from typing import Any

import torch

from diffsight.errors import AssignmentError
from diffsight.extending import INPUTS, OUTPUT, Tap


def is_wanted(tap: Tap, call: int) -> bool:
    """Return whether the run needs what a tap is passed in a call of its module: a body waits for it or has assigned
    it, or it is followed."""
    if tap.keepers:
        return True
    return any((kind, call) in points for kind in (INPUTS, OUTPUT) for points in (tap.awaited, tap.pending))


def pass_value(tap: Tap, call: int, current: Any) -> Any:
    """Let the run read and change a value that is computed in a call of a module; return what it has become.

    Raises:
        AssignmentError: What was assigned has another shape.
    """
    tap.entered = call  # a value has the number of the call that it is computed in
    if not is_wanted(tap, call):
        tap.enter((), {})
        tap.leave(None)
        return current
    tap.enter((), {})
    given = tap.leave(current)
    if given is current:
        return current
    if not isinstance(current, torch.Tensor):
        raise AssignmentError(f"{tap.target.path} can only be read")
    if not isinstance(given, torch.Tensor) or given.shape != current.shape:
        shape = tuple(given.shape) if isinstance(given, torch.Tensor) else type(given).__name__
        raise AssignmentError(f"{tap.target.path} has the shape {tuple(current.shape)}, not {shape}")
    return given


def state_of(tensor: torch.Tensor) -> Any:
    """Return what tells whether a tensor is changed in place: its version, or a copy in inference mode."""
    return tensor.clone() if tensor.is_inference() else tensor._version


def is_unchanged(tensor: torch.Tensor, state: Any) -> bool:
    return torch.equal(tensor, state) if isinstance(state, torch.Tensor) else tensor._version == state


class WithValueOf(torch.autograd.Function):
    """Continues with a value that a fused kernel has computed, while gradients go through the same value computed by
    hand: `WithValueOf.apply(by_hand, fused)`."""

    @staticmethod
    def forward(ctx: Any, by_hand: torch.Tensor, fused: torch.Tensor) -> torch.Tensor:
        return fused.view_as(fused)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient, None
