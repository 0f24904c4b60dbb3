"""The state that PyTorch keeps per thread: grad mode, inference mode, autocast, modes, hooks, random generators.

The body of a run and its model each have their own. `Coroutine.resume` exchanges them whenever control changes sides.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any, NamedTuple

import torch
from torch._C import (
    _get_dispatch_stack_at,
    _get_function_stack_at,
    _is_any_autocast_enabled,
    _len_torch_dispatch_stack,
    _len_torch_function_stack,
    _pop_torch_dispatch_stack,
    _pop_torch_function_stack,
    _push_on_torch_dispatch_stack,
    _push_on_torch_function_stack,
)
from torch._C._autograd import (
    _pop_saved_tensors_default_hooks,
    _push_saved_tensors_default_hooks,
    _top_saved_tensors_default_hooks,
)

_ACCELERATOR = torch.accelerator.current_accelerator()
_AUTOCAST_DEVICES = ("cpu", *([_ACCELERATOR.type] if _ACCELERATOR else []))


class TorchState(NamedTuple):
    """What a user sets with a `with` statement and PyTorch keeps per thread.

    `autocast` holds the settings of each device, and whether casts are cached. `modes` are the active function modes,
    such as `torch.device(...)`, and `dispatch_modes` the active dispatch modes. `saved_tensor_hooks` are those in which
    autograd packs what it saves; gradient checkpointing sets them. `is_plain` is True if nothing of all this is active.

    Not exchanged: levels of functorch (`vmap`, `grad`)."""

    grad: bool
    inference: bool
    autocast: tuple
    modes: tuple
    is_plain: bool
    dispatch_modes: tuple = ()
    saved_tensor_hooks: tuple = ()

    @classmethod
    def capture(cls) -> "TorchState":
        """Return the current state."""
        grad, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        settings = tuple(map(torch.get_autocast_dtype, _AUTOCAST_DEVICES)), torch.is_autocast_cache_enabled()
        if not (
            _is_any_autocast_enabled()
            or _len_torch_function_stack()
            or _len_torch_dispatch_stack()
            or _top_saved_tensors_default_hooks(True)
        ):
            return _plain_state(grad, inference, settings)
        enabled = tuple(map(torch.is_autocast_enabled, _AUTOCAST_DEVICES))
        modes = tuple(map(_get_function_stack_at, range(_len_torch_function_stack())))
        dispatch_modes = tuple(map(_get_dispatch_stack_at, range(_len_torch_dispatch_stack())))
        return cls(grad, inference, (enabled, *settings), modes, False, dispatch_modes, saved_tensor_hooks())

    def now(self) -> "TorchState":
        """Return the current state: this object if nothing differs, which is quick to check for a plain state."""
        if (
            self.is_plain
            and torch.is_grad_enabled() is self.grad
            and not (_is_any_autocast_enabled() or _len_torch_function_stack() or _len_torch_dispatch_stack())
            and not _top_saved_tensors_default_hooks(True)
            and torch.is_inference_mode_enabled() is self.inference
        ):
            return self
        return TorchState.capture()

    def with_grad(self) -> "TorchState":
        """Return the same state with gradients enabled."""
        return self._replace(grad=True, inference=False)

    def with_mode(self, mode: Any) -> "TorchState":
        """Return the same state with one more function mode, outside the others."""
        return self._replace(modes=(mode, *self.modes), is_plain=False)

    def bare(self) -> "TorchState":
        """Return the same state with gradients disabled, outside all modes and hooks."""
        return self._replace(grad=False, modes=(), dispatch_modes=(), saved_tensor_hooks=(), is_plain=False)

    def without_mode(self, mode: Any) -> "TorchState":
        """Return the same state outside a function mode."""
        return self._replace(modes=tuple(other for other in self.modes if other is not mode))

    def restore(self, before: "TorchState") -> None:
        """Set grad mode, and everything else where it differs from `before`, the current state.

        Inference mode needs a guard, see `Coroutine.resume`."""
        switches = self.modes != before.modes
        while switches and _len_torch_function_stack():  # first, and added last: a mode also sees what is set here
            _pop_torch_function_stack()
        while self.dispatch_modes != before.dispatch_modes and _len_torch_dispatch_stack():
            _pop_torch_dispatch_stack(None)
        torch._C._set_grad_enabled(self.grad)
        if self.saved_tensor_hooks != before.saved_tensor_hooks:
            restore_saved_tensor_hooks(self.saved_tensor_hooks)
        if self.autocast != before.autocast:
            *devices, cache = self.autocast
            for device, enabled, dtype in zip(_AUTOCAST_DEVICES, *devices):
                torch.set_autocast_enabled(device, enabled)
                torch.set_autocast_dtype(device, dtype)
            torch.set_autocast_cache_enabled(cache)
        for mode in self.dispatch_modes if self.dispatch_modes != before.dispatch_modes else ():
            _push_on_torch_dispatch_stack(mode)
        for mode in self.modes if switches else ():
            _push_on_torch_function_stack(mode)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Make this the current state within the block, except for inference mode."""
        before = TorchState.capture()
        try:
            self.restore(before)
            yield
        finally:
            before.restore(TorchState.capture())


def saved_tensor_hooks() -> tuple:
    """Return the pairs of hooks that are set now, outermost first. They can only be looked at one by one."""
    found = []
    while hooks := _top_saved_tensors_default_hooks(True):
        found.append(hooks)
        _pop_saved_tensors_default_hooks()
    for hooks in reversed(found):
        _push_saved_tensors_default_hooks(*hooks)
    return tuple(reversed(found))


def restore_saved_tensor_hooks(pairs: Iterable[tuple]) -> None:
    """Set these pairs of hooks in place of those that are set now, outermost first."""
    while _top_saved_tensors_default_hooks(True):
        _pop_saved_tensors_default_hooks()
    for hooks in pairs:
        _push_saved_tensors_default_hooks(*hooks)


@cache
def _plain_state(grad: bool, inference: bool, settings: tuple) -> TorchState:
    return TorchState(grad, inference, ((False,) * len(_AUTOCAST_DEVICES), *settings), (), True)


def enter_inference_mode(enabled: bool) -> Any:
    """Switch inference mode on or off; return the guard that puts everything back when it is exited."""
    guard = torch._C._InferenceMode(enabled)
    try:
        guard.__enter__()
        return guard
    except BaseException:  # interrupted: otherwise the mode would end when the traceback is dropped
        guard.__exit__(None, None, None)
        raise


def call_in(state: TorchState, seed: int | None, function: Callable[[], Any]) -> Any:
    """Call a function in another state, and with a `seed` on random numbers of its own; return what it returns."""
    if seed is not None:
        with kept_random_state():
            torch.manual_seed(seed)
            return call_in(state, None, function)
    changes = state.inference != torch.is_inference_mode_enabled()
    with torch.inference_mode(state.inference) if changes else nullcontext(), state.active():
        return function()


# ---- random state


def random_state() -> list[torch.Tensor]:
    """Return the state of PyTorch's global random generators: the CPU's, then that of every GPU in use."""
    gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return [torch.get_rng_state(), *gpus]


def set_random_state(state: list[torch.Tensor]) -> None:
    """Set a state that `random_state` returned."""
    torch.set_rng_state(state[0])
    if state[1:]:
        torch.cuda.set_rng_state_all(state[1:])


def seeded_random_state(seed: int) -> list[torch.Tensor]:
    """Return the random state that `torch.manual_seed(seed)` sets, without changing the current one."""
    with kept_random_state():
        torch.manual_seed(seed)
        return random_state()


@contextmanager
def kept_random_state() -> Iterator[None]:
    """Put the global random state back at the end of the block."""
    before = random_state()
    try:
        yield
    finally:
        set_random_state(before)
