"""Rows: the parts of a batch that belong to one input each.

    with model.trace([a, b, c]) as run:
        x, y, z = run.rows
        y.layers[2].output = x.layers[2].output      # reaches the second input only

A row has the model's envoys, narrowed to its part: reading returns views of the batch, and assigning changes only the
row's own entries. Tuples and output objects are narrowed element by element. A tensor whose first dimension is not the
batch, even if it has the same size, or is not known to be, raises an error: see `engine.batch_dimensions`. So does a
value that holds tensors in another kind of container, such as a dataclass.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from diffsight.engine.batch_slicing import Part, Selection
from diffsight.envoy import (
    ChildrenFirst,
    InRun,
    Points,
    bound_run,
    child_of,
    flow_of,
    look_at_children_first,
    root_of,
    selection_of,
    tree_of,
)
from diffsight.errors import InputError, PointNotFoundError


class View:
    """A part of a run. `view.<path>` is an envoy of the model, narrowed to that part."""

    def __init__(self, run: InRun, part: Selection) -> None:
        self.__dict__.update(_run=run, _part=part)
        if isinstance(run, ChildrenFirst):
            look_at_children_first(self)

    def _child(self, name: str) -> Any:
        """The child of the whole model called `name`, if there is one."""
        return child_of(root_of(self._run, self._part), name)

    @property
    def steps(self) -> Any:
        """The run's steps."""
        return self._run.steps

    def __getattr__(self, name: str) -> Any:
        own = self.__dict__
        try:
            return getattr(root_of(own["_run"], own["_part"]), name)
        except PointNotFoundError:
            if not hasattr(type(self._run), name):
                raise
            raise PointNotFoundError(
                f"{self._part.name} has no {name!r} of its own: use run.{name}, and take the part that belongs to "
                f"{self._part.name}"
            ) from None

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(root_of(self._run, self._part), name, value)

    def __getitem__(self, key: Any) -> Any:
        return root_of(self._run, self._part)[key]

    def __iter__(self) -> Iterator[Any]:
        return iter(root_of(self._run, self._part))

    def __reversed__(self) -> Iterator[Any]:
        return reversed(root_of(self._run, self._part))

    def __contains__(self, item: Any) -> bool:
        return item in root_of(self._run, self._part)

    def __len__(self) -> int:
        return len(root_of(self._run, self._part))

    def __bool__(self) -> bool:
        return True

    def __dir__(self) -> list[str]:
        tree = tree_of(self._run)
        return sorted({*super().__dir__(), *tree.names_in(tree.root)})

    def __repr__(self) -> str:
        return f"<{self._part.name} of {self._run!r}>"


class Row(View):
    """One input's part of a run. `index` is the number of the input."""

    def __init__(self, run: InRun, index: int, part: Selection) -> None:
        super().__init__(run, part)
        self.__dict__["index"] = index


def make_rows(run: InRun, sizes: Sequence[int]) -> tuple[Row, ...]:
    """Return the rows of inputs that take `sizes` entries of the batch each."""
    total, start, rows = sum(sizes), 0, []
    for index, size in enumerate(sizes):
        rows.append(Row(run, index, Part(start, start + size, total, name=f"rows[{index}]")))
        start += size
    return tuple(rows)


def each(rows: Sequence[Row], functions: Callable[[Row], Any] | Sequence[Callable[[Row], Any]]) -> list[Any]:
    """Run a function for every row, or one function per row, each as a body of its own; return their results.

    Raises InputError for anything but plain functions, and if the number of functions is not the number of rows."""
    given = [functions] if callable(functions) else functions
    if not isinstance(given, Sequence) or not all(map(callable, given)):
        raise InputError("run.each takes a function of a row, or a list of functions, one per row")
    if any(inspect.isgeneratorfunction(f) or inspect.iscoroutinefunction(f) for f in given):
        raise InputError("run.each takes plain functions: calling one with `yield` or `async` does not run it")
    functions = given * len(rows) if callable(functions) else given
    if len(functions) != len(rows):
        raise InputError(
            f"run.each was given {len(functions)} functions for {len(rows)} rows: pass one function, or one per row"
        )
    flow = flow_of(rows[0]._run)
    return flow.each([partial(call_body, function, row) for row, function in zip(rows, functions)])


def call_body(function: Callable[[Row], Any], row: Row) -> Any:
    """Call the function of a row. From this frame on, a traceback shows the user's code again."""
    return function(row)


def run_of(bound: View | Points) -> Any:
    """Return the run that a view is a part of, or that an envoy is bound to (None for an envoy of the model)."""
    return bound._run if isinstance(bound, View) else bound_run(bound)


def part_of(bound: View | Points) -> Selection | None:
    """Return the part of the batch that a view or an envoy is narrowed to."""
    return bound._part if isinstance(bound, View) else selection_of(bound)
