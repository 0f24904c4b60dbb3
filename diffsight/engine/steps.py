"""Counts the steps of a run: denoising steps, generated tokens, forward passes."""

from collections.abc import Callable, Sequence
from typing import Any

from diffsight.engine.taps import Tap, Target


class Clock:
    """Says when a step begins: at a call of one of `starts`, once one of `ends` has been called since the last
    beginning (where there are no `ends`, at every call). As long as no end has been called at all, a step also begins
    where the same start is called at another `moment` than before: some samplers never step their scheduler."""

    def __init__(
        self,
        starts: Sequence[Target],
        ends: Sequence[Target] = (),
        moment: Callable[[Target, tuple, dict], Any] | None = None,
    ) -> None:
        self.starts = {target.key for target in starts}
        self.ends = {target.key for target in ends}
        self.index = -1  # of the step the model is in
        self.call: tuple[Tap, tuple, dict] | None = None  # the call that began it
        self._moment = moment
        self._due = True
        self._ended = False

    @property
    def is_in_step(self) -> bool:
        """Whether a step has begun and not ended."""
        return self.index >= 0 and not (self.ends and self._due)

    def begins(self, tap: Tap, args: tuple, kwargs: dict) -> bool:
        if tap.target.key not in self.starts or not (self._due or self._has_moved_on(tap, args, kwargs)):
            return False
        self._due = not self.ends
        self.index += 1
        self.call = (tap, args, kwargs)
        return True

    def note_end(self, tap: Tap) -> None:
        if tap.target.key in self.ends:
            self._due = self._ended = True

    def _has_moved_on(self, tap: Tap, args: tuple, kwargs: dict) -> bool:
        if self._moment is None or self._ended or self.call is None or tap is not self.call[0]:
            return False
        return self._moment(tap.target, args, kwargs) != self._moment(tap.target, *self.call[1:])
