"""The steps of a run: denoising steps, generated tokens, forward passes.

for step in run.steps:                   # or some of them: run.steps[10:20]
    print(step.index, run.unet.output.norm())

The run's `Clock` decides when a step begins, see `diffsight.engine.step_clock`.
"""

from collections.abc import Callable, Iterator
from typing import Any

from diffsight.engine.innermost_run import current_edit
from diffsight.engine.run_to_point import Flow
from diffsight.errors import InputError, OutOfOrderError, PointNotFoundError, suggest, warn_user


class Step:
    """One step of a run.

    Attributes:
        index: The number of the step, from 0.
        component: The path of the part of the model whose call began the step.
    """

    def __init__(self, index: int, component: str, call: tuple[tuple, dict]) -> None:
        self.__dict__.update(index=index, component=component, _call=call)

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name.startswith("_") or isinstance(getattr(type(self), name, None), property)):
            known = [one for one in dir(self) if not one.startswith("_")]
            raise PointNotFoundError(f"a step has no {name!r} to assign{suggest(name, known)}")
        super().__setattr__(name, value)

    def __repr__(self) -> str:
        return f"<step {self.index} of {self.component}>"


class Steps:
    """The steps of a run, in order. A slice of them is a `Steps` too."""

    def __init__(
        self, flow: Flow, make_step: Callable[[int, str, tuple[tuple, dict]], Step], chosen: slice = slice(None)
    ) -> None:
        for bound, least in ((chosen.start, 0), (chosen.stop, 0), (chosen.step, 1)):
            if bound is not None and (not isinstance(bound, int) or bound < least):
                raise InputError(
                    f"run.steps is sliced with whole numbers from {least} up, not {bound!r}: the number of steps is "
                    "not known in advance"
                )
        self._flow, self._make_step, self._chosen = flow, make_step, chosen

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        tree = self._flow.tree
        hint = '. The module of that name is run["steps"]' if "steps" in tree.children_of(tree.root) else ""
        raise PointNotFoundError(f"run.steps has no {name!r}: write `for step in run.steps:`{hint}")

    def __setattr__(self, name: str, value: Any) -> None:
        if not name.startswith("_"):
            self.__getattr__(name)
        super().__setattr__(name, value)

    def __getitem__(self, chosen: slice) -> "Steps":
        if not isinstance(chosen, slice):
            end = f"{chosen + 1}" if isinstance(chosen, int) else f"{chosen} + 1"
            raise TypeError(f"run.steps takes a slice, not a number: write `for step in run.steps[{chosen}:{end}]`")
        if self._chosen != slice(None):
            raise TypeError("run.steps can be sliced only once")
        return Steps(self._flow, self._make_step, chosen)

    def __len__(self) -> int:
        raise TypeError("run.steps has no length: the number of steps is known only once the model has finished")

    def __bool__(self) -> bool:
        return True

    def __repr__(self) -> str:
        where = self._flow.outcome or f"open, the model is {self._flow.where}"
        return f"<steps{self._part} of {self._flow.tree.title}: {where}>"

    @property
    def _part(self) -> str:
        """The slice as it was written, such as "[2:4]"; "" for all steps."""
        bounds = [self._chosen.start, self._chosen.stop, self._chosen.step]
        end = 3 if bounds[2] is not None else 2
        return "" if bounds == [None] * 3 else f"[{':'.join('' if b is None else str(b) for b in bounds[:end])}]"

    def __iter__(self) -> Iterator[Step]:
        flow, chosen = self._flow, self._chosen
        first, last, stride = chosen.start or 0, chosen.stop, chosen.step or 1
        if chosen != slice(None) and (flow.clock.index > first or flow.scope.step >= first):
            raise OutOfOrderError(
                f"run.steps{self._part} was asked for too late: the model is in step {flow.clock.index}"
            )
        entered = -1  # the last step that this loop has entered
        try:
            while last is None or max(flow.scope.step + 1, first) < last:
                has_ended_before = flow.outcome is not None or flow.clock.is_over
                if not flow.next_step():
                    has_ended = flow.outcome is None or flow.has_result
                    if has_ended and current_edit() is None:
                        missed = has_ended_before and (flow.clock.index > flow.scope.step or flow.scope.step < 0)
                        if missed or (chosen == slice(None) and 0 <= entered < flow.scope.step):
                            self._warn_of_early_end(len(range(first, entered + 1, stride)))
                        elif chosen != slice(None) and entered < 0:
                            self._warn_of_missed()
                    if (flow.has_result or flow.clock.is_over) and not has_ended_before:
                        flow.clock.check_counted(flow.tree.title)
                    return
                index = flow.scope.step
                if index < first:
                    self._check_exists(first)
                if index >= first and (index - first) % stride == 0 and (last is None or index < last):
                    entered = index
                    target, args, kwargs = flow.clock.call
                    yield self._make_step(index, target.path, (args, kwargs))
        finally:
            flow.leave_steps()

    def _check_exists(self, first: int) -> None:
        count = self._flow.clock.count()
        if count is not None and first >= count:
            raise InputError(f"run.steps{self._part} has no steps: the run has {count}, 0 to {count - 1}")

    def _warn_of_early_end(self, count: int) -> None:
        message = (
            f"the loop over run.steps{self._part} ended after {_counted(count)}, because something else, such as "
            "run.result or another loop over the steps, had run the model past the rest: ask for that after the loop"
        )
        warn_user(message, RuntimeWarning)

    def _warn_of_missed(self) -> None:
        count = _counted(self._flow.clock.index + 1)
        message = f"the loop over run.steps{self._part} never ran: the model ended after {count}"
        warn_user(message, RuntimeWarning)


def _counted(steps: int) -> str:
    return f"{steps} step{'s' * (steps != 1)}"
