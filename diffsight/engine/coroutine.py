"""The coroutine in which a model runs.

A run has two sides: the body, which is the user's code, and the model. Each has its own stack (a greenlet) and its own
PyTorch state (see `torch_state`). `Coroutine.resume` exchanges the states whenever control changes sides, along with
the global random state if the run has one of its own. The model gets a copy of its creator's `contextvars` context.

Lockstep needs nothing more: while one run's model is parked, another run's model can be resumed. Pipelines have state,
so each run calls a copy of it, see `pipelines/diffusion/pipelines_in_use.py`.
"""

import atexit
import operator
import sys
from collections.abc import Callable
from contextvars import copy_context
from threading import get_ident, main_thread
from types import FrameType
from typing import Any

import torch
from greenlet import GreenletExit, getcurrent, greenlet

from diffsight.engine.torch_state import TorchState, enter_inference_mode, random_state, set_random_state


class InnerCall:
    """A call that a body asks for. It is made where the function is parked, in the body's grad mode and autocast."""

    def __init__(self, function: Callable[[], Any], asker: Any) -> None:
        self.asker = asker
        self.state = TorchState.capture()
        self.result: Any = None
        self.error: Exception | None = None
        self._function = function

    def make(self) -> None:
        """Make the call; keep its result, or the error that it raised."""
        with self.state.active():
            try:
                self.result = self._function()
            except Exception as error:  # for the body to handle: the parked function continues
                self.error = error


_MAIN_THREAD = main_thread().ident
_MOST_IDLE = 100
_SHALLOW = 100  # Python frames
_idle: list["Stack"] = []
_kept_guards: list[Any] = []  # of inference mode: a guard restores the mode that it found when it is freed
# A PyTorch error records the 64 innermost frames of the C stack. Memory beyond the frames of a greenlet holds
# whatever others have put there since it started, and reading it as frames may crash. So each stack has more frames of
# its own than PyTorch looks at.
_DEEPER = (operator.call,) * 64


class Stack(greenlet):
    """The stack that a coroutine runs on.

    Creating a stack takes longer than most runs. So a stack that was started in the main thread with few frames open
    is kept when its coroutine has ended, and used again."""

    coroutine: "Coroutine | None" = None  # the coroutine that runs here
    owner: Any = None  # the coroutine's owner

    def __init__(self, is_kept: bool) -> None:
        super().__init__()
        self.is_kept = is_kept

    @classmethod
    def take(cls, coroutine: "Coroutine") -> "Stack":
        """Return an idle stack, or a new one, for a coroutine that starts."""
        is_kept = getcurrent().parent is None and get_ident() == _MAIN_THREAD
        if is_kept and _idle:
            stack = _idle.pop()
        else:
            stack = cls(is_kept and _is_shallow())
            stack.switch()  # up to where it waits for a coroutine
        stack.coroutine, stack.owner, stack.gr_context = coroutine, coroutine.owner, coroutine.context
        return stack

    def give_back(self) -> None:
        """Keep the stack for another coroutine if possible, after its own has ended."""
        self.coroutine = self.owner = self.gr_context = None
        if not self.dead and self.parent.parent is None and len(_idle) < _MOST_IDLE:
            _idle.append(self)

    def run(self) -> None:
        """Run coroutines, one after the other (called by greenlet)."""
        operator.call(*_DEEPER, self._run)

    def _run(self) -> None:
        while True:
            call = self.parent.switch()  # waits for a coroutine
            self.coroutine.run(call)
            del call
            if not self.is_kept:
                return


def _is_shallow() -> bool:
    """Whether few frames are open. The frames in which a stack was started always count towards its recursion limit."""
    try:
        sys._getframe(_SHALLOW)
    except ValueError:
        return True
    return False


atexit.register(_idle.clear)  # so that they end while Python still has all it needs to end them


class Coroutine:
    """A function that runs until it parks, and continues from there when it is resumed."""

    is_edit = False  # True for coroutines that run edits, see `diffsight.engine.turns`

    def __init__(self, function: Callable[[], Any], owner: Any, state: TorchState) -> None:
        """Prepare to run `function`; `state` is the PyTorch state that it starts in."""
        self._function = function
        self.owner = owner  # the flow whose model runs here: taps recognise their run by it
        self.state = state
        self.context = copy_context()
        self.random: list[torch.Tensor] | None = None  # the function's own random state, if it has one
        self.dead = False  # whether it has ended, in any way
        self.result: Any = None  # what the function returned
        self._stack: Stack | None = None  # from start to end
        self._unwinds = False  # whether it was told to end
        self._parked_in: TorchState | None = None  # the state in which it has just parked, if that is known
        self._guard: Any = None  # takes the body out of the inference mode in which the function parked
        self._inner_guard: Any = None  # the function's own inference mode, while it runs
        self._bodys_random: list[torch.Tensor] | None = None  # the body's random state, while the function has its own

    @property
    def has_begun(self) -> bool:
        """Whether it has started and not ended."""
        return self._stack is not None

    @property
    def is_running(self) -> bool:
        """Whether it, or a coroutine that it started, is running now."""
        stack = getcurrent()
        while stack is not None and stack is not self._stack:
            stack = stack.parent
        return stack is not None

    @property
    def frame(self) -> FrameType | None:
        """The frame in which the function is parked."""
        return None if self._stack is None else self._stack.gr_frame

    def resume(
        self,
        call: InnerCall | None = None,
        error: type[BaseException] | None = None,
        body: TorchState | None = None,
    ) -> Any:
        """Let the function run until it parks or ends. Called from the body.

        Args:
            call: Make this call where the function is parked, instead of letting the function continue.
            error: Raise this error where the function is parked.
            body: The current state, if it is known.

        Returns:
            The value that the function parked with, or the call once it has been made. If the function has ended,
            `dead` is True."""
        if body is None:
            body = self.state.now()
        if self._stack is None:
            self._stack = Stack.take(self)
        stack = self._stack
        stack.parent = getcurrent()  # where control goes when the function ends or raises
        try:
            alike = (body is self.state or body == self.state) and self._guard is None and self.random is None
            if not alike:
                self._enter(body)
            self._parked_in = None
            try:
                return stack.switch(call) if error is None else stack.throw(error)
            finally:
                if not alike or self._parked_in is not body:  # otherwise it has parked in the body's state
                    self.state = self._parked_in or body.now()
                    if not alike or (body is not self.state and body != self.state):
                        self._leave(body)
                    if self.dead or stack.dead:
                        self._end()
                        stack.give_back()
        except BaseException:
            self._settle(body)
            raise

    def _enter(self, body: TorchState) -> None:
        """Switch from the body's state to the function's."""
        # Inference mode is changed by guards, each of which restores the mode it found. They are used only where
        # needed: under a guard every operation takes longer.
        if self._guard is not None:
            guard, self._guard = self._guard, None
            guard.__exit__(None, None, None)
        elif self.state.inference != body.inference:
            self._inner_guard = enter_inference_mode(self.state.inference)
        self.state.restore(body)
        if self.random is not None:
            self._bodys_random = random_state()
            set_random_state(self.random)

    def _leave(self, body: TorchState) -> None:
        """Switch back to the body's state."""
        if self._bodys_random is not None:
            self.random = random_state()
        self._go_back(body)

    def _go_back(self, body: TorchState) -> None:
        if self._bodys_random is not None:
            set_random_state(self._bodys_random)
            self._bodys_random = None
        if self._inner_guard is not None:
            guard, self._inner_guard = self._inner_guard, None
            guard.__exit__(None, None, None)
        elif torch.is_inference_mode_enabled() != body.inference:  # the function has parked inside its own mode
            self._guard = enter_inference_mode(body.inference)
        body.restore(self.state)

    def _settle(self, body: TorchState) -> None:
        """Switch back to the body's state after an error, which may be a KeyboardInterrupt between any two lines."""
        if self._bodys_random is not None or self._inner_guard is not None or body.now() != body:
            self._go_back(body)
            body.restore(TorchState.capture())
        if self._stack is not None and (self.dead or self._stack.dead):
            self._end()

    def _end(self) -> None:
        self._stack, self.dead = None, True
        if self._guard is not None:  # the body has entered a mode of its own meanwhile, which this guard must not end
            _kept_guards.append(self._guard)
            self._guard = None

    def park(self, value: Any, state: TorchState | None = None) -> None:
        """Hand `value` to the body and wait to be resumed. Called from the function.

        `state` is the current state, if it is known."""
        self._parked_in = state
        call = self._stack.parent.switch(value)
        if call is not None:
            self._make(call)

    def unwind(self) -> None:
        """End the function where it is parked; its `finally` blocks and context managers run."""
        if self._stack is None:
            self.dead = True
            return
        self._unwinds = True
        try:
            self.resume(error=GreenletExit)
        finally:
            self._unwinds = False

    def run(self, call: InnerCall | None) -> None:
        """Run the function from start to end. Called on its stack."""
        try:
            self._make(call)
            self.result = self._function()
        except GreenletExit:
            if not self._unwinds:  # nobody asked for it: the stack itself is being destroyed
                raise
        self.dead = True

    def _make(self, call: InnerCall | None) -> None:
        while call is not None:
            call.make()
            call = self._stack.parent.switch(call)


def current() -> Coroutine | None:
    """Return the coroutine that is running now, if there is one."""
    return getattr(getcurrent(), "coroutine", None)


def current_owner() -> Any:
    """Return the owner of the coroutine that is running now; None in a body."""
    return getattr(getcurrent(), "owner", None)
