"""The coroutine in which a model runs, and the PyTorch state that is switched along with it.

A run has two sides: the body, which is the user's code, and the model. Each has its own stack (greenlet) and its own
grad mode, inference mode, autocast and function modes, which PyTorch keeps per thread; `Coroutine.resume` exchanges
them on every change of sides, along with the global random state where the run has one of its own, and gives the model
a copy of the `contextvars` of its creator.
"""

import atexit
import operator
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import copy_context
from functools import cache
from threading import get_ident, main_thread
from types import FrameType
from typing import Any, NamedTuple

import torch
from greenlet import GreenletExit, getcurrent, greenlet
from torch._C import (
    _get_function_stack_at,
    _is_any_autocast_enabled,
    _len_torch_function_stack,
    _pop_torch_function_stack,
    _push_on_torch_function_stack,
)

_ACCELERATOR = torch.accelerator.current_accelerator()
_AUTOCAST_DEVICES = ("cpu", *([_ACCELERATOR.type] if _ACCELERATOR else []))


class TorchState(NamedTuple):
    """What PyTorch keeps per thread and a user sets with `with`. `autocast` holds the settings of each device, and
    whether casts are cached; `modes` are the function modes that are on, such as `torch.device(...)`; `is_plain` says
    that there is neither."""

    grad: bool
    inference: bool
    autocast: tuple
    modes: tuple
    is_plain: bool

    @classmethod
    def capture(cls) -> "TorchState":
        grad, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        settings = tuple(map(torch.get_autocast_dtype, _AUTOCAST_DEVICES)), torch.is_autocast_cache_enabled()
        if not (_is_any_autocast_enabled() or _len_torch_function_stack()):
            return _plain_state(grad, inference, settings)
        enabled = tuple(map(torch.is_autocast_enabled, _AUTOCAST_DEVICES))
        modes = tuple(map(_get_function_stack_at, range(_len_torch_function_stack())))
        return cls(grad, inference, (enabled, *settings), modes, False)

    def now(self) -> "TorchState":
        """The state that is on: this one where nothing differs, which is soon told of a plain one."""
        if (
            self.is_plain
            and torch.is_grad_enabled() is self.grad
            and not (_is_any_autocast_enabled() or _len_torch_function_stack())
            and torch.is_inference_mode_enabled() is self.inference
        ):
            return self
        return TorchState.capture()

    def restore(self, before: "TorchState") -> None:
        """Sets grad mode, and autocast and function modes where they differ from `before`, the state that is on;
        inference mode needs a guard, see `Coroutine.resume`."""
        switches = self.modes != before.modes
        for _ in before.modes if switches else ():  # first off and last on: a mode sees what is set here as well
            _pop_torch_function_stack()
        torch._C._set_grad_enabled(self.grad)
        if self.autocast != before.autocast:
            *devices, cache = self.autocast
            for device, enabled, dtype in zip(_AUTOCAST_DEVICES, *devices):
                torch.set_autocast_enabled(device, enabled)
                torch.set_autocast_dtype(device, dtype)
            torch.set_autocast_cache_enabled(cache)
        for mode in self.modes if switches else ():
            _push_on_torch_function_stack(mode)

    @contextmanager
    def on(self) -> Iterator[None]:
        """For a while this is the state that is on, but for inference mode."""
        before = TorchState.capture()
        self.restore(before)
        try:
            yield
        finally:
            before.restore(TorchState.capture())


@cache
def _plain_state(grad: bool, inference: bool, settings: tuple) -> TorchState:
    return TorchState(grad, inference, ((False,) * len(_AUTOCAST_DEVICES), *settings), (), True)


class Call:
    """A call that a body asks for, made where the function is parked, in the body's own grad mode and autocast."""

    def __init__(self, function: Callable[[], Any], asker: Any) -> None:
        self.asker = asker
        self.state = TorchState.capture()
        self.result: Any = None
        self.error: Exception | None = None
        self._function = function

    def make(self) -> None:
        with self.state.on():
            try:
                self.result = self._function()
            except Exception as error:  # the body's to deal with: the function that is parked goes on
                self.error = error


_MAIN_THREAD = main_thread().ident
_MOST_IDLE = 100
_SHALLOW = 100  # frames of Python's
_idle: list["Stack"] = []
# An error of PyTorch's notes the 64 innermost frames of the C stack. Beyond those of a greenlet lies what others have
# put there since it began, and reading that for frames may crash: so each has more of its own than are looked at.
_DEEPER = (operator.call,) * 64


class Stack(greenlet):
    """What a coroutine runs on. Making one takes longer than most runs need it: those begun near the bottom of the main
    thread are kept when their coroutine has ended, for the next."""

    coroutine: "Coroutine | None" = None  # what runs here
    owner: Any = None  # of the coroutine

    def __init__(self, is_kept: bool) -> None:
        super().__init__()
        self.is_kept = is_kept

    @classmethod
    def take(cls, coroutine: "Coroutine") -> "Stack":
        """One that was idle, or a new one, for a coroutine that begins."""
        is_kept = getcurrent().parent is None and get_ident() == _MAIN_THREAD
        if is_kept and _idle:
            stack = _idle.pop()
        else:
            stack = cls(is_kept and _is_shallow())
            stack.switch()  # to where it waits for a coroutine
        stack.coroutine, stack.owner, stack.gr_context = coroutine, coroutine.owner, coroutine.context
        return stack

    def give_back(self) -> None:
        """Its coroutine has ended."""
        self.coroutine = self.owner = self.gr_context = None
        if not self.dead and self.parent.parent is None and len(_idle) < _MOST_IDLE:
            _idle.append(self)

    def run(self) -> None:
        operator.call(*_DEEPER, self._run)

    def _run(self) -> None:
        while True:
            call = self.parent.switch()  # waits for a coroutine
            self.coroutine.run(call)
            del call
            if not self.is_kept:
                return


def _is_shallow() -> bool:
    """Whether few frames are open. Those that a stack began in count towards its recursion limit for good."""
    try:
        sys._getframe(_SHALLOW)
    except ValueError:
        return True
    return False


atexit.register(_idle.clear)  # they end while all that Python needs for it is there


class Coroutine:
    """A function that runs until it parks, and goes on from there when it is resumed."""

    def __init__(self, function: Callable[[], Any], owner: Any, state: TorchState) -> None:
        """`state` is what the function begins in."""
        self._function = function
        self.owner = owner  # the Flow whose model runs here: taps recognise their run by it
        self.state = state
        self.context = copy_context()
        self.random: list[torch.Tensor] | None = None  # the function's own random state, where it has one
        self.dead = False  # whether it has ended, however
        self.result: Any = None  # what the function returned
        self._stack: Stack | None = None  # from its beginning to its end
        self._unwinds = False  # whether its end is asked for
        self._guard: Any = None  # keeps the body out of the mode inside which the function is parked

    @property
    def has_begun(self) -> bool:
        """Whether it has begun, and not ended."""
        return self._stack is not None

    @property
    def is_running(self) -> bool:
        """Whether it runs now, or something that it has started itself does."""
        stack = getcurrent()
        while stack is not None and stack is not self._stack:
            stack = stack.parent
        return stack is not None

    @property
    def frame(self) -> FrameType | None:
        """Where the function is parked."""
        return None if self._stack is None else self._stack.gr_frame

    def resume(self, call: Call | None = None, error: type[BaseException] | None = None) -> Any:
        """From the body: lets the function run on until it parks (gives what it parked with) or ends (`self.dead` then
        says so). With a call, makes it where the function is parked, and gives it back when it is made; with an error,
        raises it there."""
        body = self.state.now()
        if self._stack is None:
            self._stack = Stack.take(self)
        stack = self._stack
        stack.parent = getcurrent()  # where the function's end, or its exception, comes out
        alike = body == self.state and self._guard is None and self.random is None
        guard, random = (None, None) if alike else self._enter(body)
        try:
            return stack.switch(call) if error is None else stack.throw(error)
        finally:
            self.state = body.now()
            if not alike or body != self.state:
                self._leave(body, guard, random)
            if self.dead or stack.dead:
                self._stack, self.dead = None, True
                stack.give_back()

    def _enter(self, body: TorchState) -> tuple[Any, list[torch.Tensor] | None]:
        """Goes from the body's state to the function's. Gives the guard, if there is one, and the random state that
        `_leave` goes back with."""
        # Inference mode is changed by guards, each of which puts back all that it found. None is used where none is
        # needed: under a guard every operation takes longer.
        guard = None
        if self._guard is not None:
            self._guard.__exit__(None, None, None)
            self._guard = None
        elif self.state.inference != body.inference:
            guard = _enter_inference_mode(self.state.inference)
        self.state.restore(body)
        if self.random is None:
            return guard, None
        random = random_state()
        set_random_state(self.random)
        return guard, random

    def _leave(self, body: TorchState, guard: Any, random: list[torch.Tensor] | None) -> None:
        """Goes back to the body's state."""
        if random is not None:
            self.random = random_state()
            set_random_state(random)
        if guard is not None:
            guard.__exit__(None, None, None)
        elif self.state.inference != body.inference:  # the function has parked inside a mode that it entered itself
            self._guard = _enter_inference_mode(body.inference)
        body.restore(self.state)

    def park(self, value: Any) -> None:
        """From the function: goes back to the body with `value` until it is resumed."""
        call = self._stack.parent.switch(value)
        if call is not None:
            self._make(call)

    def unwind(self) -> None:
        """Ends the function where it is parked; its `finally` blocks and context managers run."""
        if self._stack is None:
            self.dead = True
            return
        self._unwinds = True
        try:
            self.resume(error=GreenletExit)
        finally:
            self._unwinds = False

    def run(self, call: Call | None) -> None:
        """From its stack: all of it."""
        try:
            self._make(call)
            self.result = self._function()
        except GreenletExit:
            if not self._unwinds:  # but its stack is taken away
                raise
        self.dead = True

    def _make(self, call: Call | None) -> None:
        while call is not None:
            call.make()
            call = self._stack.parent.switch(call)


def _enter_inference_mode(on: bool) -> Any:
    guard = torch._C._InferenceMode(on)
    guard.__enter__()
    return guard


def random_state() -> list[torch.Tensor]:
    """The state of PyTorch's global random generators: the CPU's, then every GPU's in use."""
    gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return [torch.get_rng_state(), *gpus]


def set_random_state(state: list[torch.Tensor]) -> None:
    """Sets what `random_state` gave."""
    torch.set_rng_state(state[0])
    if state[1:]:
        torch.cuda.set_rng_state_all(state[1:])


def seeded_random_state(seed: int) -> list[torch.Tensor]:
    """The random state that `torch.manual_seed(seed)` makes; the present one stays."""
    before = random_state()
    try:
        torch.manual_seed(seed)
        return random_state()
    finally:
        set_random_state(before)


def current() -> Coroutine | None:
    """The coroutine that runs now, if one does."""
    return getattr(getcurrent(), "coroutine", None)


def current_owner() -> Any:
    """The owner of the coroutine that runs now, or None in a body."""
    return getattr(getcurrent(), "owner", None)
