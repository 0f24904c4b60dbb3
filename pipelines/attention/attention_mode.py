"""Watch attention modules while they compute, on any backend.

A PyTorch function mode is active only in the coroutine of a run that asks for attention. It sees calls of
`F.scaled_dot_product_attention`, by transformers ("sdpa") and diffusers' dispatch, and attention that is written out.
No processor is replaced.
"""

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.overrides import TorchFunctionMode

from diffsight.errors import InputError
from diffsight.extending import INPUTS, Tap, current_owner
from diffsight.pipelines.attention.eager_attention import EagerAttention
from diffsight.pipelines.attention.product_count import count_products
from diffsight.pipelines.attention.product_dispatch import WATCHED, call_watched
from diffsight.pipelines.attention.watched_modules import Watched


class AttentionMode(TorchFunctionMode):
    """Sends the attention values of the watched modules through their taps."""

    def __init__(self) -> None:
        super().__init__()
        self._watched: dict[int, Watched] = {}
        self._eager = EagerAttention()
        self._inside: list[nn.Module] = []  # the watched modules whose calls activated the mode, outermost first
        self._is_always_active = False

    def watched(self, calls: Tap) -> Watched:
        """Return the watched module that `calls` taps."""
        return self._watched[calls.target.key[0]]

    def add(self, tap: Tap, calls: Tap, key: tuple[int | None, str]) -> Callable[[], None]:
        """Watch the module that `calls` taps for one of its values; return a function that undoes this."""
        number = calls.target.key[0]
        if number not in self._watched:
            if calls.active:
                _check_first(tap, calls)
            self._watched[number] = Watched(calls, self._active_in(calls))
        watched = self._watched[number]
        watched.taps[key] = tap

        def undo() -> None:
            watched.taps.pop(key, None)
            if not watched.taps and self._watched.pop(number, None) is not None:
                for handle in watched.handles:
                    handle.remove()

        return undo

    def _active_in(self, calls: Tap) -> list[Any]:
        """Activate the mode only in calls of a module, because it slows down all functions called while it is active.
        If a call of the module is already in progress, the mode stays active from now on."""
        host, module = calls.host, calls.target.owner
        if calls.active and not (self._is_always_active or self._inside):
            self._is_always_active = True
            host.add_mode(self)

        def is_ours(called: nn.Module) -> bool:  # copies of the module have the hooks too
            return called is module and current_owner() is host and bool(host.taps)

        def before(called: nn.Module, args: tuple) -> None:
            if is_ours(called) and not self._is_always_active:
                if not self._inside:
                    self.__enter__()
                self._inside.append(module)

        def after(called: nn.Module, args: tuple, output: Any) -> None:
            if is_ours(called) and self._inside and self._inside[-1] is module:
                self._inside.pop()
                if not self._inside:
                    self.__exit__(None, None, None)

        return [module.register_forward_pre_hook(before), module.register_forward_hook(after, always_call=True)]

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        if name not in WATCHED and self._eager.is_empty:
            return func(*args, **kwargs)
        running = [watched for watched in self._watched.values() if watched.is_running]
        if not running:
            self._eager.clear()
            return func(*args, **kwargs)
        return call_watched(self, running, self._eager, func, args, kwargs)


def _check_first(tap: Tap, calls: Tap) -> None:
    """Raise InputError if the current call of a module may already have made a product."""
    parked = calls.host.parked
    if parked is not None and parked.tap is calls and parked.key == (INPUTS, calls.active[-1]):
        return
    if count_products(calls.target.owner, calls.host.coroutine.frame) != 1:
        raise InputError(
            f"{tap.target.path} was requested in the middle of a call of {calls.target.path}, which may make several "
            f"products in one call, so it is not known which products are still to come. Request it before any value "
            f"inside {calls.target.path}"
        )
