"""The attention modules whose values a run has asked for, and the products that each computes in a call.

The values of a product pass in this order: `q`, `k`, `v`, `attention_product`, `attention_probs`, `heads_output`.
Values that nobody waits for are not computed.
"""

from typing import Any

import torch

from diffsight.errors import InputError
from diffsight.extending import Tap
from diffsight.pipelines.attention.heads_layout import HeadsLayout
from diffsight.pipelines.attention.passing_values import can_change_in_place, is_wanted, pass_value

VALUES = ("q", "k", "v", "attention_product", "attention_probs", "heads_output")


class Watched:
    """An attention module whose values a run has asked for.

    Args:
        calls: The tap of the module.
        handles: The hooks that make the mode active.
    """

    def __init__(self, calls: Tap, handles: list[Any]) -> None:
        self.calls, self.handles = calls, handles
        self.taps: dict[tuple[int | None, str], Tap] = {}  # number of the product (None: the only one) and value
        self._call, self._count = -1, 0  # the call in progress, and how many products it has made
        self._only: Tap | None = None  # a value taken without a product number in this call

    @property
    def is_running(self) -> bool:
        """Whether the module is being called."""
        return bool(self.calls.active)

    def has_taken(self, tap: Tap) -> bool:
        """Return whether a value was taken without a product number in the current call."""
        return self._only is tap and self.calls.active[-1:] == [self._call]

    def has_taps(self, value: str) -> bool:
        """Return whether the run has asked for a value of any product."""
        return any(asked == value for _, asked in self.taps)

    def wants(self, *values: str) -> bool:
        """Return whether the run needs any of these values of the next product."""
        self._enter()
        return any(is_wanted(tap, self._call) for value in values for tap in self._taps(value))

    def through(self, value: str, current: Any) -> Any:
        """Let the run read and change a value of the next product; return the result."""
        self._enter()
        for tap in self._taps(value):
            if tap.target.number is None and is_wanted(tap, self._call):
                self._only = tap
            current = pass_value(tap, self._call, current)
        return current

    def pass_by(self) -> None:
        """Count the next product, whose values nobody wants."""
        for value in VALUES:
            self.through(value, None)
        self._count += 1

    def end_product(self) -> None:
        """Count a product that has been made."""
        self._enter()
        self._count += 1

    def _taps(self, value: str) -> list[Tap]:
        keys = [(self._count, value)] if self._count else [(None, value), (0, value)]
        return [self.taps[key] for key in keys if key in self.taps]

    def _enter(self) -> None:
        call = self.calls.active[-1]
        if call != self._call:
            self._call, self._count, self._only = call, 0, None
        if self._count and self._only is not None:
            target = self._only.target
            raise InputError(
                f"{target.path} is ambiguous: {target.outer.path} makes several products in one call. Write "
                f"{target.outer.path}.products[0].{target.value} for the first, products[1] for the second"
            )


def let_through(modules: list[Watched], value: str, tensor: torch.Tensor, layout: HeadsLayout) -> torch.Tensor:
    """Let the run read and change a tensor; return the result, or the same tensor if nothing has changed.

    Queries, keys, values and outputs are handed out as (batch, tokens, heads, features), probabilities as (batch,
    heads, queries, keys). Once the run has read the tensor, the model continues with the one that was handed out,
    because it is on the graph."""
    if not any(module.has_taps(value) for module in modules):
        return tensor
    if not any(module.wants(value) for module in modules):
        for module in modules:
            module.through(value, None)
        return tensor
    by_token = value != "attention_probs"
    shown = layout.view(tensor)
    shown = can_change_in_place(shown.transpose(1, 2) if by_token else shown)
    given = shown
    for module in modules:
        given = module.through(value, given)
    if given is shown and not tensor.requires_grad:
        return tensor
    return layout.back(given.transpose(1, 2) if by_token else given, tensor)
