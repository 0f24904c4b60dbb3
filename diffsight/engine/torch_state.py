"""The state that a `with` statement changes for what runs inside it, which PyTorch keeps per thread or process.

The body of a run and its model each have their own. `Coroutine.resume` exchanges them whenever control changes sides:

    grad mode, inference mode
    autocast on each device, its cache, and how deep its blocks are nested
    function modes (`torch.device(...)`, `DeviceContext`), dispatch modes, whether either is disabled
    saved-tensor hooks: gradient checkpointing, `save_on_cpu`
    levels of functorch: `vmap`, `grad`, `jvp`
    the default dtype, and which kernels attention may use (`sdpa_kernel`)
    the current device and stream of CUDA, and which of its own kernels attention may use
    the global random generators, if the run has a seed

Not exchanged: what changes no value (anomaly detection, the profiler, view replay, multithreaded backward passes,
`torch.compiler.set_stance`, `disable_saved_tensors_hooks`); flags of cuDNN, MKL-DNN and of reduced precision, and the
order of attention's kernels (`sdpa_kernel(..., set_priority=True)`), which change speed and rounding; and levels of
forward-mode differentiation, of which PyTorch allows only one at a time, so that a second is an error.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import islice, starmap
from operator import itemgetter
from typing import Any

import torch
from torch import (
    get_autocast_dtype,
    get_default_dtype,
    is_autocast_cache_enabled,
    is_grad_enabled,
    is_inference_mode_enabled,
)
from torch._C import (
    DisableTorchFunction,
    _get_cudnn_sdp_enabled,
    _get_dispatch_stack_at,
    _get_flash_sdp_enabled,
    _get_function_stack_at,
    _get_math_sdp_enabled,
    _get_mem_efficient_sdp_enabled,
    _get_torch_function_state,
    _is_any_autocast_enabled,
    _is_torch_function_enabled,
    _len_torch_dispatch_stack,
    _len_torch_function_stack,
    _pop_torch_dispatch_stack,
    _pop_torch_function_stack,
    _push_on_torch_dispatch_stack,
    _push_on_torch_function_stack,
    _set_torch_function_state,
)
from torch._C._autograd import (
    _pop_saved_tensors_default_hooks,
    _push_saved_tensors_default_hooks,
    _saved_tensors_hooks_enable,
    _saved_tensors_hooks_is_enabled,
    _top_saved_tensors_default_hooks,
)
from torch._C._functorch import get_dynamic_layer_stack_depth, pop_dynamic_layer_stack, push_dynamic_layer_stack

_ACCELERATOR = torch.accelerator.current_accelerator()
_HAS_CUDA = _ACCELERATOR is not None and _ACCELERATOR.type == "cuda"
_ENABLED = _get_torch_function_state()
# Each `next` increments the nesting depth of autocast and decrements it, both in C: no interrupt comes between them.
_AUTOCAST_NESTING = zip(iter(torch.autocast_increment_nesting, None), iter(torch.autocast_decrement_nesting, None))
_top_hooks = partial(_top_saved_tensors_default_hooks, True)
_run_all, _first = deque(maxlen=0).extend, itemgetter(0)  # the former runs an iterator to its end, in C
_AUTOCAST_DEVICES = ("cpu", *([_ACCELERATOR.type] if _ACCELERATOR else []))


@dataclass(frozen=True, slots=True)
class TorchState:
    """The settings that a user changes with a `with` statement, see above.

    `autocast` holds the settings of each device, whether casts are cached, and the nesting of blocks. `modes` are the
    active function modes and `dispatch_modes` the active dispatch modes. `saved_tensor_hooks` are the hooks with
    which autograd packs what it saves. `levels` are the levels of functorch. `flags` are the default dtype, whether the
    flash and mathematical kernels of attention are enabled, and what CUDA adds, see `_of_cuda`. `is_plain` is True if
    nothing is active besides `flags`."""

    grad: bool
    inference: bool
    autocast: tuple
    modes: tuple
    is_plain: bool
    flags: tuple
    dispatch_modes: tuple = ()
    saved_tensor_hooks: tuple = ()
    levels: tuple = ()
    functions: Any = None  # whether function modes and tensor subclasses see functions; None if they do

    @classmethod
    def capture(cls) -> "TorchState":
        """Return the current state."""
        grad, inference, nesting = is_grad_enabled(), is_inference_mode_enabled(), _autocast_nesting()
        dtypes = get_autocast_dtype("cpu"), _ACCELERATOR and get_autocast_dtype(_ACCELERATOR.type)
        is_cached = is_autocast_cache_enabled()
        if not (
            nesting  # also counts the blocks that switch it off
            or _is_any_autocast_enabled()
            or _len_torch_function_stack()
            or _len_torch_dispatch_stack()
            or _top_saved_tensors_default_hooks(True)
            or get_dynamic_layer_stack_depth()
            or not _is_torch_function_enabled()
        ):
            return _plain_state(grad, inference, dtypes, is_cached, *_flags())
        levels = _functorch_levels()  # while there are any, they see changes to the rest
        enabled = tuple(map(torch.is_autocast_enabled, _AUTOCAST_DEVICES))
        modes = tuple(map(_get_function_stack_at, range(_len_torch_function_stack())))
        dispatch_modes = tuple(map(_get_dispatch_stack_at, range(_len_torch_dispatch_stack())))
        functions = None if _is_torch_function_enabled() else _get_torch_function_state()
        autocast = (enabled, dtypes, is_cached, nesting)
        hooks = saved_tensor_hooks()
        return cls(grad, inference, autocast, modes, False, _flags(), dispatch_modes, hooks, levels, functions)

    def now(self) -> "TorchState":
        """Return the current state: this object if nothing differs, which is quick to check for a plain state."""
        dtype, flash, math, of_cuda = self.flags
        if (
            self.is_plain
            and is_grad_enabled() is self.grad
            and not (next(_AUTOCAST_NESTING)[1] or _is_any_autocast_enabled())
            and not (_len_torch_function_stack() or _len_torch_dispatch_stack())
            and not (_top_saved_tensors_default_hooks(True) or get_dynamic_layer_stack_depth())
            and is_inference_mode_enabled() is self.inference
            and _is_torch_function_enabled()
            and get_default_dtype() is dtype
            and _get_flash_sdp_enabled() is flash
            and _get_math_sdp_enabled() is math
            and not (_HAS_CUDA and _of_cuda() != of_cuda)
        ):
            return self
        return TorchState.capture()

    def with_grad(self) -> "TorchState":
        """Return the same state with gradients enabled."""
        return replace(self, grad=True, inference=False)

    def with_mode(self, mode: Any) -> "TorchState":
        """Return the same state with one more function mode, outside the others."""
        return replace(self, modes=(mode, *self.modes), is_plain=False)

    def bare(self) -> "TorchState":
        """Return the same state with gradients disabled, outside all modes and hooks."""
        return replace(self, grad=False, modes=(), dispatch_modes=(), saved_tensor_hooks=(), levels=(), is_plain=False)

    def without_mode(self, mode: Any) -> "TorchState":
        """Return the same state outside a function mode."""
        return replace(self, modes=tuple(other for other in self.modes if other is not mode))

    def restore(self, before: "TorchState") -> None:
        """Set grad mode, and everything else where it differs from `before`, the current state.

        Inference mode needs a guard, see `Coroutine.resume`."""
        if before.levels or self.levels:
            while get_dynamic_layer_stack_depth():
                pop_dynamic_layer_stack()
        if self.functions != before.functions:
            _set_torch_function_state(self.functions or _ENABLED)
        switches = self.modes != before.modes
        while switches and _len_torch_function_stack():  # first, and added last: a mode also sees what is set here
            _pop_torch_function_stack()
        while self.dispatch_modes != before.dispatch_modes and _len_torch_dispatch_stack():
            _pop_torch_dispatch_stack(None)
        torch._C._set_grad_enabled(self.grad)
        if self.saved_tensor_hooks != before.saved_tensor_hooks:
            restore_saved_tensor_hooks(self.saved_tensor_hooks)
        if self.autocast != before.autocast:
            _restore_autocast(*self.autocast)
        if self.flags != before.flags:
            _restore_flags(*self.flags)
        for mode in self.dispatch_modes if self.dispatch_modes != before.dispatch_modes else ():
            _push_on_torch_dispatch_stack(mode)
        for mode in self.modes if switches else ():
            _push_on_torch_function_stack(mode)
        for level in self.levels:
            push_dynamic_layer_stack(level)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Make this the current state within the block, except for inference mode."""
        before = TorchState.capture()
        try:
            self.restore(before)
            yield
        finally:
            before.restore(TorchState.capture())


def _flags() -> tuple:
    return get_default_dtype(), _get_flash_sdp_enabled(), _get_math_sdp_enabled(), _of_cuda() if _HAS_CUDA else None


def _restore_flags(dtype: torch.dtype, flash: bool, math: bool, of_cuda: tuple | None) -> None:
    torch.set_default_dtype(dtype)
    torch._C._set_sdp_use_flash(flash)
    torch._C._set_sdp_use_math(math)
    if of_cuda is not None:
        efficient, cudnn, stream = of_cuda
        torch._C._set_sdp_use_mem_efficient(efficient)
        torch._C._set_sdp_use_cudnn(cudnn)
        if stream is not None:
            number, device, kind = stream
            torch._C._cuda_setStream(stream_id=number, device_index=device, device_type=kind)  # sets the device as well


def _of_cuda() -> tuple:
    """Return whether the memory-efficient and the cuDNN kernels of attention are enabled, and the current stream, which
    includes the device; None as long as CUDA is not in use."""
    return _get_mem_efficient_sdp_enabled(), _get_cudnn_sdp_enabled(), _stream()


def _stream() -> tuple | None:
    if not torch.cuda.is_initialized():
        return None
    return torch._C._cuda_getCurrentStream(torch._C._cuda_getDevice())


def _restore_autocast(enabled: tuple, dtypes: tuple, is_cached: bool, nesting: int) -> None:
    torch.clear_autocast_cache()  # it is cleared where the outermost block ends, and each side has blocks of its own
    for device, is_enabled, dtype in zip(_AUTOCAST_DEVICES, enabled, dtypes):
        torch.set_autocast_enabled(device, is_enabled)
        torch.set_autocast_dtype(device, dtype)
    torch.set_autocast_cache_enabled(is_cached)
    while _autocast_nesting() < nesting:
        torch.autocast_increment_nesting()
    while _autocast_nesting() > nesting:
        torch.autocast_decrement_nesting()


def _autocast_nesting() -> int:
    return next(_AUTOCAST_NESTING)[1]


def _functorch_levels() -> tuple:
    found: list[Any] = []
    try:  # see `saved_tensor_hooks`
        found.extend(islice(iter(pop_dynamic_layer_stack, ...), get_dynamic_layer_stack_depth()))
    finally:
        _run_all(map(push_dynamic_layer_stack, reversed(found)))
    return tuple(reversed(found))


def saved_tensor_hooks() -> tuple:
    """Return the pairs of hooks that are set now, outermost first. They can only be looked at one by one."""
    found: list[tuple] = []
    try:  # each step is one call of C, so that no interrupt comes within it
        found.extend(map(_first, zip(iter(_top_hooks, None), iter(_pop_saved_tensors_default_hooks, ...))))
    finally:
        _run_all(starmap(_push_saved_tensors_default_hooks, reversed(found)))
    return tuple(reversed(found))


def restore_saved_tensor_hooks(pairs: Iterable[tuple]) -> None:
    """Set these pairs of hooks, outermost first, in place of the current ones.

    If the other side has disabled such hooks, which only refuses new ones, they are enabled for the rest of its block.
    """
    pairs = [*pairs]
    if pairs and not _saved_tensors_hooks_is_enabled():
        _saved_tensors_hooks_enable()
    try:  # as above
        _run_all(zip(iter(_top_hooks, None), iter(_pop_saved_tensors_default_hooks, ...)))
    finally:
        _run_all(starmap(_push_saved_tensors_default_hooks, pairs))


@cache
def _plain_state(grad: bool, inference: bool, dtypes: tuple, is_cached: bool, *flags: Any) -> TorchState:
    return TorchState(grad, inference, ((False,) * len(_AUTOCAST_DEVICES), dtypes, is_cached, 0), (), True, flags)


def enter_inference_mode(enabled: bool) -> Any:
    """Switch inference mode on or off; return the guard that restores everything when it is exited."""
    guard = torch._C._InferenceMode(enabled)
    try:
        guard.__enter__()
        return guard
    except BaseException:  # interrupted: otherwise the mode would end when the traceback is dropped
        guard.__exit__(None, None, None)
        raise


def call_in(state: TorchState, seed: int | None, function: Callable[[], Any]) -> Any:
    """Call a function in another state, with random numbers of its own if there is a `seed`; return its result."""
    if seed is not None:
        with kept_random_state():
            _seed(seed)
            return call_in(state, None, function)
    changes = state.inference != is_inference_mode_enabled()
    with torch.inference_mode(state.inference) if changes else nullcontext(), state.active():
        return function()


def unseen(function: Callable[..., Any], *args: Any) -> Any:
    """Call a function where no function modes are active; return its result. Even looking up an attribute of a tensor
    calls them."""
    with DisableTorchFunction():
        return function(*args)


def with_gradients(method: Callable[..., Any]) -> Callable[..., Any]:
    """Return a bound method without the `torch.no_grad()` that it is decorated with."""
    wrapped = getattr(method.__func__, "__wrapped__", None)
    return method if wrapped is None else partial(wrapped, method.__self__)


# ---- random state


def random_state() -> list[torch.Tensor]:
    """Return the state of PyTorch's global random generators: the CPU's, then the state of every GPU in use."""
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
        _seed(seed)
        return random_state()


def _seed(seed: int) -> None:
    """Do what `torch.manual_seed(seed)` does. Without a GPU, that would keep a call for each kind of GPU forever."""
    if _ACCELERATOR is None:
        torch.default_generator.manual_seed(seed)
    else:
        torch.manual_seed(seed)


@contextmanager
def kept_random_state() -> Iterator[None]:
    """Restore the global random state at the end of the block."""
    before = random_state()
    try:
        yield
    finally:
        set_random_state(before)
