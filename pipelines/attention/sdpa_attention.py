"""Attention in one call of a fused kernel, `F.scaled_dot_product_attention`.

The kernel stays in place. Probabilities are computed alongside it, and are multiplied by the values outside the kernel
only if they were changed.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from types import FunctionType
from typing import Any

import torch

from diffsight.errors import InputError
from diffsight.pipelines.attention.attention_modules import count_heads
from diffsight.pipelines.attention.attention_probabilities import AttentionProduct
from diffsight.pipelines.attention.heads_layout import HeadsLayout
from diffsight.pipelines.attention.passing_values import WithValueOf, is_unchanged, state_of
from diffsight.pipelines.attention.watched_modules import VALUES, Watched, let_through

SCALED_DOT_PRODUCT = "scaled_dot_product_attention"
MULTI_HEAD_ATTENTION = "multi_head_attention_forward"


@dataclass(frozen=True, eq=False)
class FusedCall:
    """One call of a fused kernel in watched modules.

    When a transformers model generates one token at a time, the heads that share a key head are passed as if they were
    several queries of one head. `layout` undoes that."""

    modules: list[Watched]
    product: AttentionProduct
    layout: HeadsLayout
    rest: dict[str, Any]  # the arguments besides queries, keys and values

    @classmethod
    def of(cls, modules: list[Watched], args: tuple, kwargs: dict[str, Any]) -> "FusedCall":
        """Return the call with these arguments."""
        q, k, v, rest = _sdpa_arguments(*args, **kwargs)
        owner = modules[-1].calls.target.owner
        groups = getattr(owner, "num_key_value_groups", 1)
        packed = q.ndim == 4 and groups > 1 and q.shape[2] == groups and q.shape[1] == k.shape[1]
        packed = packed and not rest["enable_gqa"] and count_heads(owner) == groups * k.shape[1]
        layout = HeadsLayout(packed=groups if packed else 1)
        mask = rest["attn_mask"]
        if packed and mask is not None and mask.ndim == 4 and mask.shape[2] == groups:
            mask = layout.view(mask)
        product = AttentionProduct(q, k, v, mask, rest["scale"], rest["is_causal"], rest["dropout_p"])
        return cls(modules, product, layout, rest)

    def run(self, func: Callable) -> torch.Tensor:
        """Make the call with the run's changes applied."""
        product, plain = self.product, HeadsLayout()
        if not any(module.wants(*VALUES) for module in self.modules):
            for module in self.modules:
                module.pass_by()
            return func(product.q, product.k, product.v, **self.rest)
        if product.q.ndim not in (3, 4):
            path, shape = self.modules[-1].calls.target.path, tuple(product.q.shape)
            raise InputError(f"{path}: the heads cannot be found in queries of shape {shape}")
        q = let_through(self.modules, "q", product.q, self.layout)
        k = let_through(self.modules, "k", product.k, plain)
        v = let_through(self.modules, "v", product.v, plain)
        is_changed = q is not product.q or k is not product.k or v is not product.v
        if is_changed or self.layout.packed > 1 or q.ndim == 3:
            product = replace(product, q=self.layout.view(q), k=plain.view(k), v=plain.view(v))
        for module in self.modules:
            module.through("attention_product", product)
        output = self._output(product, lambda: func(q, k, v, **self.rest))
        if output.requires_grad and any(module.wants("heads_output") for module in self.modules):
            output = output.clone()  # the kernel keeps its own output for the backward pass, so nobody may change it
        output = let_through(self.modules, "heads_output", output, self.layout)
        for module in self.modules:
            module.end_product()
        return output

    def _output(self, product: AttentionProduct, fused: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Return the output of the fused kernel, or the output recomputed from probabilities that the run has
        changed."""
        if not any(module.wants("attention_probs") for module in self.modules):
            for module in self.modules:
                module.through("attention_probs", None)
            return fused()
        probs = given = product.probabilities()
        state = state_of(probs)
        for module in self.modules:
            given = module.through("attention_probs", given)
        is_changed = given is not probs or not is_unchanged(probs, state)
        if not is_changed and not probs.requires_grad:
            return fused()
        if product.dropout and not is_changed:
            path = self.modules[-1].calls.target.path
            raise InputError(f"{path}.attention_probs has no gradient under dropout: call model.eval() before the run")
        output = self.layout.back(product.times_values(given.to(probs.dtype)), self.product.q)
        if is_changed:
            return output
        with torch.no_grad():
            value = fused()
        return WithValueOf.apply(output, value)


def _sdpa_arguments(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, dict[str, Any]]:
    rest = {"attn_mask": attn_mask, "dropout_p": dropout_p, "is_causal": is_causal}
    return query, key, value, rest | {"scale": scale, "enable_gqa": enable_gqa}


@cache
def without_dispatch(func: FunctionType) -> FunctionType:
    """Return a copy of a `torch.nn.functional` function that does not dispatch to modes itself, so a mode sees the
    functions that it calls."""
    return FunctionType(
        func.__code__,
        {**func.__globals__, "has_torch_function": lambda _: False},
        func.__name__,
        func.__defaults__,
        func.__closure__,
    )
