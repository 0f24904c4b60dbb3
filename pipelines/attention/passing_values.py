"""Let a run read and change values that are computed inside a module, as they pass a tap."""

from typing import Any

import torch
from torch._C._autograd import CreationMeta, _get_creation_meta

from diffsight.errors import AssignmentError
from diffsight.extending import INPUTS, OUTPUT, Tap


def is_wanted(tap: Tap, call: int) -> bool:
    """Return whether the run needs the value that passes a tap in a call of its module: a body waits for it or has
    assigned it, or it is followed."""
    if tap.keepers:
        return True
    return any((kind, call) in points for kind in (INPUTS, OUTPUT) for points in (tap.awaited, tap.pending))


def pass_value(tap: Tap, call: int, current: Any) -> Any:
    """Let the run read and change a value that is computed in a call of a module; return the result.

    Raises:
        AssignmentError: The assigned value has a different shape, or the value can only be read.
    """
    tap.entered = call  # a value has the number of the call in which it is computed
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
    """Return a state with which `is_unchanged` detects in-place changes: a version, or a copy in inference mode."""
    return tensor.clone() if tensor.is_inference() else tensor._version


def is_unchanged(tensor: torch.Tensor, state: Any) -> bool:
    return torch.equal(tensor, state) if isinstance(state, torch.Tensor) else tensor._version == state


class WithValueOf(torch.autograd.Function):
    """Returns the value that a fused kernel computed, while gradients flow through the same value computed by hand:
    `WithValueOf.apply(by_hand, fused)`."""

    @staticmethod
    def forward(ctx: Any, by_hand: torch.Tensor, fused: torch.Tensor) -> torch.Tensor:
        return fused.detach()  # PyTorch refuses in-place changes of a view that an autograd function returns

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient, None


def can_change_in_place(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor, or if it is a view that PyTorch lets nobody change in place, such as a part from `split`, the
    same memory on the graph without being a view."""
    is_fixed = tensor.requires_grad and tensor._base is not None and _get_creation_meta(tensor) != CreationMeta.DEFAULT
    return WithValueOf.apply(tensor, tensor) if is_fixed else tensor
