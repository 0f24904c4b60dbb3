"""The coroutine in which a model runs, and the PyTorch state that is switched along with it.

A run has two sides: the body, which is the user's code, and the model. Each has its own stack (greenlet) and its own
grad mode, inference mode and autocast, which PyTorch keeps per thread; `Coroutine.resume` exchanges them on every
change of sides, and gives the model a copy of the `contextvars` of its creator.
"""

from collections.abc import Callable
from contextvars import copy_context
from typing import Any, NamedTuple

import torch
from greenlet import GreenletExit, getcurrent, greenlet

_AUTOCAST_DEVICES = ("cpu", "cuda", "mps", "xpu")


class TorchState(NamedTuple):
    """What PyTorch keeps per thread and a user sets with `with`; `autocast` is None where it is off everywhere."""

    grad: bool
    inference: bool
    autocast: tuple | None

    @classmethod
    def capture(cls) -> "TorchState":
        devices = tuple(
            (device, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
            for device in _AUTOCAST_DEVICES
        )
        autocast = (devices, torch.is_autocast_cache_enabled())
        return cls(torch.is_grad_enabled(), torch.is_inference_mode_enabled(), autocast)

    def restore(self) -> None:
        """Sets grad mode and autocast; inference mode needs a guard, see `Coroutine.resume`."""
        torch._C._set_grad_enabled(self.grad)
        if self.autocast is None:
            if torch._C._is_any_autocast_enabled():
                for device in _AUTOCAST_DEVICES:
                    torch.set_autocast_enabled(device, False)
            return
        devices, cache = self.autocast
        for device, enabled, dtype in devices:
            torch.set_autocast_enabled(device, enabled)
            torch.set_autocast_dtype(device, dtype)
        torch.set_autocast_cache_enabled(cache)


class Coroutine(greenlet):
    """A function that runs until it parks, and goes on from there when it is resumed."""

    def __init__(self, function: Callable[[], Any], owner: Any) -> None:
        super().__init__(function)
        self.gr_context = copy_context()
        self.owner = owner  # the Flow whose model runs here: taps recognise their run by it
        self.state = TorchState.capture()

    def resume(self, *error: Any) -> Any:
        """From the body: lets the function run on until it parks (gives what it parked with) or ends (gives what it
        returned; `self.dead` tells which). With an exception, raises it where the function is parked."""
        body = TorchState.capture()
        model = self.state
        self.parent = getcurrent()  # where the function's end, or its exception, comes out
        # The guard puts the body's inference mode back on exit, whatever modes the function entered or left meanwhile.
        with torch._C._InferenceMode(model.inference):
            model.restore()
            try:
                return self.throw(*error) if error else self.switch()
            finally:
                self.state = TorchState.capture()
                body.restore()

    def park(self, value: Any) -> None:
        """From the function: goes back to the body with `value` until it is resumed."""
        self.parent.switch(value)

    def unwind(self) -> None:
        """Ends the function where it is parked; its `finally` blocks and context managers run."""
        self.resume(GreenletExit)


def current_owner() -> Any:
    """The owner of the coroutine that runs now, or None in a body."""
    return getattr(getcurrent(), "owner", None)
