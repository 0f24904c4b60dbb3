"""Counts the steps of a run: denoising steps, generated tokens, forward passes."""

from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any

from diffsight.engine.target import Target

_key = attrgetter("key")
_NONE: frozenset = frozenset()


def _never(target: Target, args: tuple, kwargs: dict) -> bool:
    return False


def _unknown() -> None:
    return None


class Clock:
    """Determines when a step begins.

    A step begins at a call of one of `starts`, once one of `ends` has been called since the last step began; without
    `ends`, at every call. Some samplers never step their scheduler: until one of `ends` is called for the first time,
    a step also begins where the same start is called at a different `moment` than before.

    Args:
        starts: The calls that begin a step, such as the denoiser's.
        ends: The calls that end a step, such as `scheduler.step`.
        moment: Returns the moment of a start, such as the timestep, from the target, args and kwargs of its call.
        behind: Calls that come after the last step, if it is known which step is the last.

    Attributes:
        is_last: Returns whether a step is the last one, from the target, args and kwargs of the call that began it.
        count: Returns the maximum number of steps, if it is known once the first step has begun.
        is_over: Whether the loops over the steps have been told that the last step has ended.
    """

    def __init__(
        self,
        starts: Sequence[Target],
        ends: Sequence[Target] = (),
        moment: Callable[[Target, tuple, dict], Any] | None = None,
        behind: Sequence[Target] = (),
    ) -> None:
        self.starts = frozenset(map(_key, starts))
        self.ends = frozenset(map(_key, ends)) if ends else _NONE
        self.watched = self.starts | self.ends if ends else self.starts
        self.index = -1  # number of the step that the model is in
        self.call: tuple[Target, tuple, dict] | None = None  # the call that began the step
        self.is_last: Callable[[Target, tuple, dict], bool] = _never
        self.count: Callable[[], int | None] = _unknown
        self.is_over = False
        self._moment = moment
        self._behind = frozenset(map(_key, behind)) if behind else _NONE
        self._due = True
        self._ended = False

    @property
    def is_in_step(self) -> bool:
        """Whether a step has begun and not ended."""
        return self.index >= 0 and not (self.ends and self._due)

    @property
    def has_ended_one(self) -> bool:
        """Whether one of `ends` has been called."""
        return self._ended

    @property
    def ending(self) -> str:
        """More about how the model ended, in words that follow "ended"."""
        return ""

    def check_counted(self, title: str) -> None:
        """Called after the last step of a model called `title`. Raises InputError if the steps cannot be counted."""

    def begins(self, target: Target, args: tuple, kwargs: dict) -> bool:
        """Take note of a call that begins; return whether a step begins with it."""
        if target.key not in self.starts or not (self._due or self._has_moved_on(target, args, kwargs)):
            return False
        self._due = not self.ends
        self.index += 1
        self.call = (target, args, kwargs)
        return True

    def set(self, index: int, is_in_step: bool, is_over: bool) -> None:
        """Set this clock to the position of the clock on the server."""
        self.index, self._due, self.is_over = index, not is_in_step, is_over

    def is_behind(self, target: Target) -> bool:
        """Return whether a call that begins comes after the last step."""
        if target.key not in self._behind or not (self._ended and self._due) or self.call is None:
            return False
        return self.is_last(*self.call)

    def note_end(self, target: Target) -> None:
        """Take note of a call that has ended."""
        if target.key in self.ends:
            self._due = self._ended = True

    def _has_moved_on(self, target: Target, args: tuple, kwargs: dict) -> bool:
        if self._moment is None or self._ended or self.call is None or target.key != self.call[0].key:
            return False
        return self._moment(target, args, kwargs) != self._moment(target, *self.call[1:])
