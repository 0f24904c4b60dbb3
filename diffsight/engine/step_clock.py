"""Counts the steps of a run: denoising steps, generated tokens, forward passes."""

from collections.abc import Callable, Sequence
from operator import attrgetter

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
    `ends`, at every call.

    Args:
        starts: The calls that begin a step, such as the denoiser's.
        ends: The calls that end a step, such as `scheduler.step`.

    Attributes:
        is_last: Returns whether a step is the last one, from the target, args and kwargs of the call that began it.
        count: Returns the maximum number of steps, if it is known once the first step has begun.
        is_over: Whether the loops over the steps have been told that the last step has ended.
    """

    def __init__(self, starts: Sequence[Target], ends: Sequence[Target] = ()) -> None:
        self.starts = frozenset(map(_key, starts))
        self.ends = frozenset(map(_key, ends)) if ends else _NONE
        self.watched = self.starts | self.ends if ends else self.starts
        self.index = -1  # number of the step that the model is in
        self.call: tuple[Target, tuple, dict] | None = None  # the call that began the step
        self.is_last: Callable[[Target, tuple, dict], bool] = _never
        self.count: Callable[[], int | None] = _unknown
        self.is_over = False
        self.has_ended_one = False  # whether one of `ends` has been called
        self._due = True

    @property
    def is_in_step(self) -> bool:
        """Whether a step has begun and not ended."""
        return self.index >= 0 and not (self.ends and self._due)

    @property
    def has_steps(self) -> bool:
        """Whether steps are known to exist; a single forward pass is not counted as one."""
        return self.index > 0 or (self.index == 0 and bool(self.ends))

    @property
    def ending(self) -> str:
        """More about how the model ended, in words that follow "ended"."""
        return ""

    def check_counted(self, title: str) -> None:
        """Called after the last step of a model called `title`. Raises InputError if the steps cannot be counted."""

    def begins(self, target: Target, args: tuple, kwargs: dict) -> bool:
        """Take note of a call that begins; return whether a step begins with it."""
        if target.key not in self.starts or not (self._due or self.has_moved_on(target, args, kwargs)):
            return False
        self._due = not self.ends
        self.index += 1
        self.call = (target, args, kwargs)
        return True

    def set(self, index: int, is_in_step: bool, is_over: bool) -> None:
        """Set this clock to the position of the clock on the server."""
        self.index, self._due, self.is_over = index, not is_in_step, is_over

    def has_moved_on(self, target: Target, args: tuple, kwargs: dict) -> bool:
        """Return whether a step begins with a call of one of `starts`, although the last step has not been ended."""
        return False

    def is_behind(self, target: Target) -> bool:
        """Return whether a call that begins comes after the last step."""
        return False

    def note_end(self, target: Target) -> None:
        """Take note of a call that has ended."""
        if target.key in self.ends:
            self._due = self.has_ended_one = True
