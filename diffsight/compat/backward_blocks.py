"""`with loss.backward():`, a block in which gradients are read and changed as autograd computes them.

    with model.trace(prompt):
        hidden = model.transformer.h[0].output[0]
        loss = model.lm_head.output.sum()
        with loss.backward():
            gradient = hidden.grad              # backward() has run this far and waits
            hidden.grad = gradient * 2          # it continues with this value

Gradients become available in the reverse order of the forward pass. They are real tensors, because `backward()` runs in
a coroutine, as models do. Without `with`, `loss.backward()` is PyTorch's own method.
"""

import dis
import sys
from contextlib import ExitStack
from functools import wraps
from types import FrameType, TracebackType
from typing import Any

import torch

from diffsight.compat.later_gradients import note_freed, reading_gradients
from diffsight.engine.coroutine import Coroutine
from diffsight.engine.torch_state import TorchState
from diffsight.errors import InputError, OutOfOrderError

_plain_backward = torch.Tensor.backward


class BackwardBlock:
    """The block of `with loss.backward():`."""

    def __init__(self, loss: torch.Tensor, args: tuple, kwargs: dict[str, Any]) -> None:
        if not loss.requires_grad:
            raise InputError(
                "the tensor has no gradients to compute: its forward pass ran under torch.no_grad(), or nothing in it "
                "requires a gradient. Open the run with grad=True, or set requires_grad"
            )

        def call() -> None:
            with torch.autograd.set_multithreading_enabled(False):  # hooks must be called in this thread
                _plain_backward(loss, *args, **kwargs)

        self._backward = Coroutine(call, None, TorchState.capture())
        self._arrived: dict[int, list[Any]] = {}  # for each tensor: itself, its gradient, and the final value
        self._waited_for: torch.Tensor | None = None
        self._ends = ExitStack()
        self._freed = _freed_by(loss, *args, **kwargs)

    def __enter__(self) -> "BackwardBlock":
        self._ends.enter_context(reading_gradients(self))
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with self._ends:
            if error is None:
                while not self._backward.dead:
                    self._backward.resume()
            else:
                self._backward.unwind()
        note_freed(self._freed)

    def read(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the gradient of a tensor; run `backward()` until it is known."""
        if id(tensor) not in self._arrived:
            self._run_to(tensor)
        return self._arrived[id(tensor)][1]

    def write(self, tensor: torch.Tensor, value: torch.Tensor) -> None:
        """Replace the gradient with which `backward()` continues."""
        self.read(tensor)
        if self._waited_for is not tensor:
            raise OutOfOrderError("this gradient was assigned too late: backward() has moved on to other gradients")
        self._arrived[id(tensor)][1] = value

    def _run_to(self, tensor: torch.Tensor) -> None:
        hook = tensor.register_hook(lambda gradient: self._arrive(tensor, gradient))
        self._ends.callback(hook.remove)
        while id(tensor) not in self._arrived:
            if self._backward.dead:
                raise OutOfOrderError(
                    "backward() has ended without reaching this gradient: read gradients in the reverse order of the "
                    "forward pass, and only those of tensors that the loss was computed from"
                )
            self._waited_for = tensor
            self._backward.resume()

    def _arrive(self, tensor: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        known = self._arrived[id(tensor)] = [tensor, gradient.clone()]
        self._backward.park(None)
        return known[1]


@wraps(_plain_backward)
def backward(loss: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """Run `backward()`, or return a block if the call is the context manager of a `with` statement."""
    if _is_entered(sys._getframe(1)):
        return BackwardBlock(loss, args, kwargs)
    freed, result = _freed_by(loss, *args, **kwargs), _plain_backward(loss, *args, **kwargs)
    note_freed(freed)
    return result


def _freed_by(
    loss: torch.Tensor,
    gradient: Any = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    inputs: Any = None,
) -> Any:
    """Return the last node of the graph that a call of `backward` with these arguments uses up; None if it keeps it."""
    is_kept = create_graph if retain_graph is None else retain_graph
    return None if is_kept else loss.grad_fn


def _is_entered(frame: FrameType) -> bool:
    """Return whether the frame's current call is the context manager of a `with` statement."""
    code, place = frame.f_code.co_code, frame.f_lasti + 2
    while place < len(code) and dis.opname[code[place]] == "CACHE":
        place += 2
    names = [dis.opname[byte] for byte in code[place : place + 4 : 2]]
    return names[:1] == ["BEFORE_WITH"] or names == ["COPY", "LOAD_SPECIAL"]  # the latter from Python 3.14 on


def add_backward_blocks() -> None:
    """Let `with loss.backward():` open a block."""
    torch.Tensor.backward = backward
