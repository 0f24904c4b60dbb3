"""Checkpointed regions: parts of the model that `backward()` computes again.

Gradient checkpointing drops what autograd saves in a region of the model, and `backward()` computes the region again.
That second computation would leave out every change that a run has made in the region. So autograd keeps what it saves
from the first point in the region that a run reads or changes. The second computation ends with the last dropped value,
and therefore before that point: all gradients are exact.

A region whose forward pass runs without gradients, as in reentrant checkpointing, is computed again as a whole.
Points in it are refused.
"""

import sys
from types import FrameType

import torch
from torch.autograd.function import Function, FunctionCtx

from diffsight.engine.torch_state import restore_saved_tensor_hooks, saved_tensor_hooks, unseen

_PACKS_FOR_CHECKPOINT = "_checkpoint_hook.__init__.<locals>.pack_hook"  # in torch.utils.checkpoint
_APPLY = Function.apply.__func__.__code__


def end_checkpoints() -> None:
    """From now on, keep what autograd saves in all checkpointed regions that the model is in."""
    hooks = saved_tensor_hooks()
    regions = [pack for pack, _ in hooks if pack.__qualname__ == _PACKS_FOR_CHECKPOINT]
    if regions:
        for pack in regions:
            region = pack.__closure__[pack.__code__.co_freevars.index("frame")].cell_contents
            region.early_stop = True  # the second computation ends with the last value that was dropped
        restore_saved_tensor_hooks([(_keep, _kept) if pack in regions else (pack, unpack) for pack, unpack in hooks])


def is_computed_again() -> bool:
    """Whether the model is inside an autograd function that needs gradients and hides its calls from autograd."""
    inside: list[FrameType] = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code is _APPLY and _needs_gradients(frame, inside):
            return True
        inside.append(frame)
        frame = frame.f_back
    return False


def _needs_gradients(apply: FrameType, inside: list[FrameType]) -> bool:
    """Whether autograd records the call of an autograd function. `inside` are the frames inside it, innermost first."""
    function, args = apply.f_locals["cls"], apply.f_locals["args"]
    if function.setup_context is Function.setup_context:
        for frame in reversed(inside):
            context = frame.f_locals.get(*frame.f_code.co_varnames[:1] or ("",))
            if isinstance(context, FunctionCtx):
                return bool(context.next_functions)
    # The context does not exist yet. Whether gradients were enabled outside is unknown.
    return any(isinstance(arg, torch.Tensor) and unseen(getattr, arg, "requires_grad") for arg in args)


def _keep(tensor: torch.Tensor) -> tuple[torch.Tensor, int]:
    return tensor.detach(), tensor._version  # detached: the tensor itself may hold the graph that it is saved in


def _kept(saved: tuple[torch.Tensor, int]) -> torch.Tensor:
    tensor, version = saved
    if tensor._version != version:  # autograd does not compare versions where hooks are set
        raise RuntimeError(
            f"a tensor of shape {tuple(tensor.shape)} that is needed for the gradient has been modified in place: it "
            f"is at version {tensor._version}, and was saved at version {version}"
        )
    return tensor
