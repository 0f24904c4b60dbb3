"""Rows: the parts of a batch that belong to one input each.

    with model.trace([a, b, c]) as run:
        x, y, z = run.rows
        y.layers[2].output = x.layers[2].output      # reaches the second input only

A row has the model's envoys, narrowed: what it reads are views of the batch, what it assigns reaches its own part.
Tuples and output objects are narrowed element by element. A tensor whose batch dimension cannot be told is an error.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from diffsight.errors import AssignmentError, InputError

if TYPE_CHECKING:
    from diffsight.engine.taps import Tap
    from diffsight.run import Run


class Part:
    """The entries `start`, `start + stride` … below `stop` of a batch of `total`. `name` is what the user calls it,
    such as "rows[1]".

    This one is the same in every call; others are looked up call by call (`call` and `at`)."""

    missing = "no call of it holds that part of the batch"

    def __init__(self, start: int, stop: int, total: int, stride: int = 1, name: str = "") -> None:
        self.start, self.stop, self.total, self.stride, self.name = start, stop, total, stride, name

    def call(self, tap: "Tap", first: int, number: int, path: object) -> int:
        """Which call is number `number`, from call `first` on, of those that hold this part. Whether one does is known
        once it has begun: until then the answer is the earliest that may be it."""
        return first + number

    def at(self, tap: "Tap", index: int, path: object) -> "Part":
        """The same part, of call number `index`, which has begun and holds it."""
        return self

    def take(self, value: Any, path: object) -> Any:
        """This part of `value`: a view of a tensor, containers element by element."""
        if isinstance(value, torch.Tensor):
            return value[self._slice(value, path)]
        return tree_map(lambda leaf: self._take(leaf, path), value)

    def put(self, whole: Any, value: Any, path: object, copies: set[int]) -> Any:
        """`whole` with `value` in this part of it. Tensors are copied first, unless they are among `copies`."""
        if isinstance(whole, torch.Tensor) != isinstance(value, torch.Tensor):
            raise AssignmentError(f"{path} is a {type(whole).__name__}; it takes no {type(value).__name__}")
        if isinstance(whole, torch.Tensor):
            return self._put_in_tensor(whole, value, path, copies)
        wholes, tree = tree_flatten(whole)
        values, _ = tree_flatten(value)
        if len(wholes) != len(values):
            raise AssignmentError(
                f"{path} holds {len(wholes)} values; it takes no {type(value).__name__} of {len(values)}"
            )
        return tree_unflatten([self._put(w, v, path, copies) for w, v in zip(wholes, values)], tree)

    def _take(self, leaf: Any, path: object) -> Any:
        if isinstance(leaf, torch.Tensor):
            return leaf[self._slice(leaf, path)] if self._is_batch(leaf) else leaf
        inside = leaf if isinstance(leaf, Mapping) else getattr(leaf, "__dict__", {})
        if any(isinstance(value, torch.Tensor) for value in inside.values()):
            raise InputError(
                f"{path} holds a {type(leaf).__name__}, which cannot be cut. Read or assign it on the run itself"
            )
        return leaf

    def _put(self, whole: Any, value: Any, path: object, copies: set[int]) -> Any:
        if isinstance(whole, torch.Tensor) != isinstance(value, torch.Tensor):
            raise AssignmentError(f"{path} holds a {type(whole).__name__} where a {type(value).__name__} was assigned")
        if not isinstance(whole, torch.Tensor) or not self._is_batch(whole):
            return whole
        return self._put_in_tensor(whole, value, path, copies)

    def _put_in_tensor(self, whole: torch.Tensor, value: torch.Tensor, path: object, copies: set[int]) -> torch.Tensor:
        part = self._slice(whole, path)
        if value.shape != whole[part].shape:
            raise AssignmentError(f"{path} has the shape {tuple(whole[part].shape)}, not {tuple(value.shape)}")
        # Gradients flow through the rest in whatever mode the body is, and autograd may hold what a copy was read for.
        tracked = whole.requires_grad or value.requires_grad
        with torch.set_grad_enabled(tracked):
            if tracked or id(whole) not in copies:
                whole = whole.clone()
                copies.add(id(whole))
            whole[part] = value
        return whole

    def _is_batch(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor inside a container is one of a batch: a number, or what is the same for all, is not. Where
        the batch may be the second dimension, as in the states of an LSTM, it is, and cannot be cut."""
        is_second = tensor.ndim == 3 and tensor.shape[1] == self.total
        return tensor.ndim > 0 and (tensor.shape[0] > 1 or self.total == 1 or is_second)

    def _slice(self, tensor: torch.Tensor, path: object) -> slice:
        if tensor.ndim == 0 or tensor.shape[0] != self.total:
            raise InputError(
                f"{path} cannot be cut into rows: its shape is {tuple(tensor.shape)}, and no first dimension of "
                f"{self.total}, the batch, is there to cut. Read or assign it on the run itself"
            )
        return slice(self.start, self.stop, self.stride)


class View:
    """A part of a run: `view.<path>` are the model's envoys, narrowed to it."""

    def __init__(self, run: "Run", part: Part) -> None:
        self.__dict__.update(_run=run, _part=part)

    @property
    def steps(self) -> Any:
        """The run's steps."""
        return self._run.steps

    def __getattr__(self, name: str) -> Any:
        return getattr(self._run._model._bound(self._run, self._part), name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._run._model._bound(self._run, self._part), name, value)

    def __getitem__(self, key: Any) -> Any:
        return self._run._model._bound(self._run, self._part)[key]

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *self._run._model._names()})

    def __repr__(self) -> str:
        return f"<{self._part.name} of {self._run!r}>"


class Row(View):
    """One input's part of a run; `index` is the number of the input."""

    def __init__(self, run: "Run", index: int, part: Part) -> None:
        super().__init__(run, part)
        self.__dict__["index"] = index


def make_rows(run: "Run", sizes: list[int]) -> tuple[Row, ...]:
    """The rows of inputs that take `sizes` entries of the batch each."""
    total, start, rows = sum(sizes), 0, []
    for index, size in enumerate(sizes):
        rows.append(Row(run, index, Part(start, start + size, total, name=f"rows[{index}]")))
        start += size
    return tuple(rows)


def each(rows: Sequence[Row], functions: Callable[[Row], Any] | Sequence[Callable[[Row], Any]]) -> list[Any]:
    """Every function as a body of its own over its own row; what they return."""
    given = [functions] if callable(functions) else functions
    if not isinstance(given, Sequence) or not all(map(callable, given)):
        raise InputError("run.each takes a function of a row, or a list of functions, one a row")
    if any(inspect.isgeneratorfunction(f) or inspect.iscoroutinefunction(f) for f in given):
        raise InputError("run.each takes plain functions: calling one with `yield` or `async` does not run it")
    functions = given * len(rows) if callable(functions) else given
    if len(functions) != len(rows):
        raise InputError(f"run.each has {len(functions)} functions for {len(rows)} rows: give one, or one a row")
    flow = rows[0]._run._flow
    return flow.each([partial(call_body, function, row) for row, function in zip(rows, functions)])


def call_body(function: Callable[[Row], Any], row: Row) -> Any:
    """Calls the function of a row: from here on a traceback shows the user's code again."""
    return function(row)
