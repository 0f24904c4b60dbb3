"""Counts the steps of a run: denoising steps, generated tokens, forward passes."""

from collections.abc import Sequence

from .taps import Tap, Target


class Clock:
    """Says when a step begins: at a call of one of `starts`, once one of `ends` has been called since the last
    beginning (where there are no `ends`, at every call)."""

    def __init__(self, starts: Sequence[Target], ends: Sequence[Target] = ()) -> None:
        self.starts = {target.key for target in starts}
        self.ends = {target.key for target in ends}
        self.index = -1  # of the step the model is in
        self.call: tuple[Tap, tuple, dict] | None = None  # the call that began it
        self._due = True

    def begins(self, tap: Tap, args: tuple, kwargs: dict) -> bool:
        if not self._due or tap.target.key not in self.starts:
            return False
        self._due = not self.ends
        self.index += 1
        self.call = (tap, args, kwargs)
        return True

    def note_end(self, tap: Tap) -> None:
        if tap.target.key in self.ends:
            self._due = True
