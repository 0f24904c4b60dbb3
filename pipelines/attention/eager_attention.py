"""Eager attention: a product of queries and keys, a softmax, and a product with the values, written out in PyTorch.

Attention in a single call of a fused kernel is handled in `sdpa_attention`.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from diffsight.errors import InputError
from diffsight.pipelines.attention.attention_probabilities import AttentionProduct
from diffsight.pipelines.attention.matrix_factors import MATRIX_PRODUCTS, Factors
from diffsight.pipelines.attention.passing_values import is_unchanged, state_of
from diffsight.pipelines.attention.watched_modules import Watched, let_through

_KEEPS_PROBS = {"dropout", "to", "type", "type_as", "float", "half", "bfloat16", "clone", "contiguous", "__getitem__"}
_KEEPS_PROBS |= {"reshape", "view", "flatten", "unflatten", "unsqueeze", "squeeze", "transpose", "permute", "expand"}
_KEEPS_PROBS |= {"masked_fill"}


@dataclass(frozen=True, eq=False)
class _Operation:
    func: Callable
    args: tuple
    kwargs: dict[str, Any]
    output: torch.Tensor


class EagerAttention:
    """Follows written-out attention, from the product of queries and keys to the product with the values.

    Queries and keys are recognized only when the softmax is reached. If the run changes them there, everything that
    was computed from them before the softmax is computed again."""

    def __init__(self) -> None:
        self._operations: list[_Operation] = []  # products, and operations on their results
        self._probs: list[torch.Tensor] = []  # outputs of a softmax, and tensors computed from these alone
        self._scores: list[_Operation] = []  # the operations that have led to the probabilities

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to follow."""
        return not (self._operations or self._probs)

    def clear(self) -> None:
        """Forget everything."""
        self._operations.clear()
        self._probs.clear()
        self._scores = []

    def run(self, modules: list[Watched], name: str, func: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Call a function once with the run's changes applied."""
        if name in MATRIX_PRODUCTS:
            factors = Factors.of(name, args, kwargs, modules)
            if factors is not None and self._are_probs(factors.first):
                return self._values(modules, factors, func)
        if name == "softmax" and args and self._leads_to(args[0]):
            args = (self._with_new_scores(modules, args[0]), *args[1:])
        output = func(*args, **kwargs)
        if name == "softmax" or (name in _KEEPS_PROBS and args and self._are_probs(args[0])):
            self._probs.append(output)
        elif isinstance(output, torch.Tensor) and (
            name in MATRIX_PRODUCTS or any(map(self._leads_to, _tensors(args, kwargs)))
        ):
            self._operations.append(_Operation(func, args, kwargs, output))
        return output

    def _are_probs(self, value: Any) -> bool:
        return any(known is value for known in self._probs)

    def _leads_to(self, value: Any) -> bool:
        return any(known.output is value for known in self._operations)

    def _with_new_scores(self, modules: list[Watched], scores: torch.Tensor) -> torch.Tensor:
        """Let the run read and change the queries and keys that scores were computed from; return the scores."""
        found, needed = [], {id(scores)}
        for operation in reversed(self._operations):
            if id(operation.output) in needed:
                found.append(operation)
                if operation.func.__name__ not in MATRIX_PRODUCTS:
                    needed |= {id(tensor) for tensor in _tensors(operation.args, operation.kwargs)}
        found.reverse()
        self._scores = found
        products = [operation for operation in found if operation.func.__name__ in MATRIX_PRODUCTS]
        first = products[0]
        factors = Factors.of(first.func.__name__, first.args, first.kwargs, modules)
        if factors is None or len(products) > 1:  # for example, relative positions have a separate product
            self._scores = []
            return scores
        if not any(module.wants("q", "k") for module in modules):
            for module in modules:
                module.through("q", None)
                module.through("k", None)
            return scores
        before = [factors.first, factors.second]
        states = [state_of(tensor) for tensor in before]
        layouts = [factors.first_layout, factors.keys_layout]
        given = [let_through(modules, value, *pair) for value, *pair in zip(("q", "k"), before, layouts)]
        tracked = any(tensor.requires_grad for tensor in before)
        if not tracked and all(a is b and is_unchanged(a, state) for a, b, state in zip(before, given, states)):
            return scores
        return _computed_again(found, dict(zip(map(id, before), given)))

    def _values(self, modules: list[Watched], factors: "Factors", func: Callable) -> torch.Tensor:
        """Make the product with the values, with the run's changes applied."""
        v = let_through(modules, "v", factors.second, factors.second_layout)
        if any(module.wants("attention_product") for module in modules):
            product = self._product(modules, factors, v)
        else:
            product = None
        for module in modules:
            module.through("attention_product", product)
        probs = let_through(modules, "attention_probs", factors.first, factors.first_layout)
        output = func(*factors.with_factors(probs, v), **factors.kwargs)
        output = let_through(modules, "heads_output", output, factors.output_layout)
        for module in modules:
            module.end_product()
        self.clear()
        return output

    def _product(self, modules: list[Watched], factors: "Factors", v: torch.Tensor) -> AttentionProduct:
        first = self._scores[0] if self._scores else None
        score = first and Factors.of(first.func.__name__, first.args, first.kwargs, modules)
        if not score:
            path = modules[-1].calls.target.path
            raise InputError(f"{path}.attention_product: no product of queries and keys was seen before the softmax")
        return AttentionProduct(
            score.first_layout.view(score.first),
            score.keys_layout.view(score.second),
            factors.second_layout.view(v),
            computed=factors.first_layout.view(factors.first),
        )


def _computed_again(operations: list[_Operation], new: dict[int, torch.Tensor]) -> torch.Tensor:
    """Repeat operations with new tensors, by the id of the old ones; return the output of the last."""
    output = None
    for operation in operations:
        args, kwargs = torch.utils._pytree.tree_map(
            lambda value: new.get(id(value), value), (operation.args, operation.kwargs)
        )
        output = operation.func(*args, **kwargs)
        new[id(operation.output)] = output
    return output


def _tensors(args: tuple, kwargs: dict[str, Any]) -> Iterable[torch.Tensor]:
    return (value for value in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor))
