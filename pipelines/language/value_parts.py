"""Parts of the values that pass a point: the first item of a tuple, the logits of an output.

    hidden = FIRST.take(output, path)                    # from the tuple that a layer returns
    output = FIRST.put(output, hidden * 2, path, {})  # the rest of the tuple stays

These parts are selections, see `Selection` in `diffsight.extending`. They can be combined with a part of a batch, for
example to select one row of the first item of a tuple.
"""

from collections.abc import Mapping
from typing import Any

import torch

from diffsight.errors import AssignmentError, InputError
from diffsight.extending import Selection, Tap
from diffsight.remote import sent_as


class ValuePart(Selection):
    """A part that is only missing if there is no call."""

    missing = "it is not called"


@sent_as("first")
class FirstTensor(ValuePart):
    """The first tensor of a tuple, a list or an output object. The rest is left as it is."""

    def take(self, value: Any, path: object) -> Any:
        if isinstance(value, torch.Tensor):
            return value
        if isinstance(value, Mapping) and value:
            return next(iter(value.values()))
        if isinstance(value, (tuple, list)) and value and isinstance(value[0], torch.Tensor):
            return value[0]
        raise InputError(f"{path} is a {type(value).__name__} that does not begin with a tensor")

    def put(self, whole: Any, value: Any, path: object, copies: dict[int, torch.Tensor]) -> Any:
        _check_tensor(self.take(whole, path), value, path)
        if isinstance(whole, torch.Tensor):
            return value
        if isinstance(whole, Mapping):
            return type(whole)(**{**whole, next(iter(whole)): value})
        return type(whole)((value, *whole[1:]))


@sent_as("logits")
class Logits(ValuePart):
    """The logits in the model's output."""

    def take(self, value: Any, path: object) -> Any:
        if not isinstance(value, Mapping):
            return FIRST.take(value, path)
        if "logits" not in value:
            raise InputError(f"the model returns no logits: its {type(value).__name__} has {', '.join(value)}")
        return value["logits"]

    def put(self, whole: Any, value: Any, path: object, copies: dict[int, torch.Tensor]) -> Any:
        if not isinstance(whole, Mapping):
            return FIRST.put(whole, value, path, copies)
        _check_tensor(self.take(whole, path), value, path)
        return type(whole)(**{**whole, "logits": value})


@sent_as("next_logits", "last")
class NextLogits(Logits):
    """The logits at the last token of each row: at position `last[row]`, or at -1 where `last` is None."""

    def __init__(self, last: torch.Tensor | None) -> None:
        self.last = last

    def take(self, value: Any, path: object) -> torch.Tensor:
        logits = super().take(value, path)
        if self.last is None or len(logits) != len(self.last) or logits.shape[1] <= self.last.max():
            return logits[:, -1]
        return logits[torch.arange(len(logits), device=logits.device), self.last.to(logits.device)]


@sent_as("hidden_input")
class HiddenInput(ValuePart):
    """The hidden states among the inputs of a layer, `(args, kwargs)`."""

    def take(self, value: Any, path: object) -> Any:
        args, kwargs = value
        return FIRST.take(args[0] if args else kwargs[_hidden_name(kwargs, path)], path)

    def put(self, whole: Any, value: Any, path: object, copies: dict[int, torch.Tensor]) -> Any:
        args, kwargs = whole
        if args:
            return (FIRST.put(args[0], value, path, copies), *args[1:]), kwargs
        name = _hidden_name(kwargs, path)
        return args, {**kwargs, name: FIRST.put(kwargs[name], value, path, copies)}


FIRST = FirstTensor()


@sent_as("within", "outer", "inner", "name", "missing")
class Within(ValuePart):
    """A part of a part: `inner` is taken from the result of `outer`. One of them may be a part of a batch."""

    def __init__(self, outer: Any, inner: Any) -> None:
        self.outer, self.inner = outer, inner
        self.name = outer.name or inner.name
        self.missing = inner.missing if inner.name else outer.missing

    def call(self, tap: Tap, first: int, number: int, path: object) -> int:
        return (self.inner if self.inner.name else self.outer).call(tap, first, number, path)

    def at(self, tap: Tap, index: int, path: object) -> "Within":
        return Within(self.outer.at(tap, index, path), self.inner.at(tap, index, path))

    def take(self, value: Any, path: object) -> Any:
        return self.inner.take(self.outer.take(value, path), path)

    def take_own(self, value: Any, path: object) -> tuple[Any, bool]:
        part, is_own = self.outer.take_own(value, path)
        taken, is_inner_own = self.inner.take_own(part, path)
        return taken, is_own or is_inner_own

    def put(self, whole: Any, value: Any, path: object, copies: dict[int, torch.Tensor]) -> Any:
        part = self.outer.take(whole, path)
        return self.outer.put(whole, self.inner.put(part, value, path, copies), path, copies)


@sent_as("added", "positions", "mask", "cached")
class Added(ValuePart):
    """Adds the assigned tensor to the value instead of replacing the value, at some or all positions.

    Args:
        positions: The positions, or None for all.
        mask: 1 for real tokens and 0 for padding, `(rows, tokens)`. In a value with the same number of tokens,
            positions count only the real tokens of each row. None if there is no padding.
        cached: How many tokens come before those of the value, because they are in a cache. Positions and the mask
            include them.
    """

    def __init__(self, positions: list[int] | None, mask: torch.Tensor | None = None, cached: int = 0) -> None:
        self.positions, self.mask, self.cached = positions, mask, cached

    def put(
        self, whole: torch.Tensor, value: torch.Tensor, path: object, copies: dict[int, torch.Tensor]
    ) -> torch.Tensor:
        value = value.to(whole.device, whole.dtype)
        if value.shape[-1] != whole.shape[-1]:
            raise AssignmentError(
                f"{path} has {whole.shape[-1]} features per token, but the vector has {value.shape[-1]}"
            )
        tokens = whole.shape[-2] if self.positions is None else len(self.positions)
        shape = (*whole.shape[:-2], tokens, whole.shape[-1])
        if not _fits(value.shape, shape):
            raise AssignmentError(
                f"{path}: a vector of the shape {tuple(value.shape)} cannot be added to the shape {shape}"
                + (" of the positions" if self.positions is not None else "")
            )
        whole = whole.clone()
        if self.positions is None:
            return whole + value
        if whole.ndim < 3:  # (tokens, features)
            whole[self.places(1, whole.shape[-2], path)[0]] += value
            return whole
        for row, places in enumerate(self.places(len(whole), whole.shape[-2], path)):
            whole[row, ..., places, :] += value if value.ndim < whole.ndim else value[row if len(value) > 1 else 0]
        return whole

    def places(self, rows: int, length: int, path: object) -> list[list[int]]:
        """Return the indices of the positions in each row of a value. Unlike positions, indices count padding.

        Raises InputError if there is no such position, or the value does not have it since it is in a cache."""
        mask, tokens = self.mask, self.cached + length
        if mask is None or mask.shape[-1] != tokens or rows % len(mask):
            mask = torch.ones(rows, tokens)
        mask = mask.repeat_interleave(rows // len(mask), 0)  # a row for each beam
        return [self._in_row(row.nonzero().flatten().tolist(), path) for row in mask]

    def _in_row(self, real: list[int], path: object) -> list[int]:
        for position in self.positions:
            if not -len(real) <= position < len(real):
                raise InputError(
                    f"{path}: there is no position {position}, because the sequence has {len(real)} tokens"
                )
            if real[position] < self.cached:
                raise InputError(
                    f"{path}: the token at position {position} is not read, because the first {self.cached} tokens of "
                    "the prompt are in past_key_values: omit past_key_values, or choose a later position"
                )
        return [real[position] - self.cached for position in self.positions]


def _check_tensor(before: torch.Tensor, value: Any, path: str) -> None:
    if not isinstance(value, torch.Tensor):
        raise AssignmentError(f"{path} takes a tensor, not {type(value).__name__}")
    if value.ndim != before.ndim:
        raise AssignmentError(f"{path} has the shape {tuple(before.shape)}, but {tuple(value.shape)} was assigned")


def _fits(shape: torch.Size, whole: tuple[int, ...]) -> bool:
    """Return whether a tensor can be added to one of the shape `whole` in place."""
    try:
        return torch.broadcast_shapes(shape, whole) == whole
    except RuntimeError:
        return False


def _hidden_name(kwargs: Mapping[str, Any], path: object) -> str:
    names = [name for name, value in kwargs.items() if isinstance(value, torch.Tensor)]
    if not names:
        raise InputError(f"{path}: no tensor is passed")
    return "hidden_states" if "hidden_states" in names else names[0]
