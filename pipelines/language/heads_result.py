"""What each head of a language model's attention adds to the residual stream.

    run.heads_result[3]                     # (batch, tokens, heads, features of the model)
    run.heads_result[3][:, :, 5] = 0        # remove head 5 of layer 3

A head's result is its output times its columns of the output projection. The sum over the heads, plus the bias of the
projection, is the output of the attention. All other attention values are the same as in any attention module, see
`pipelines/attention/`.
"""

import re
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from diffsight.errors import InputError
from diffsight.extending import Tap, Target, current_owner, join
from diffsight.pipelines.attention.attention_modules import count_heads
from diffsight.pipelines.attention.passing_values import WithValueOf, is_unchanged, is_wanted, pass_value, state_of
from diffsight.pipelines.module_spans import HookHandle

HEADS_RESULT = "heads_result"
_OUTPUT = re.compile(
    r"o_proj|out_proj|c_proj|dense|out_lin|attention_out|wo|o|linear_out|out|resid_proj", re.IGNORECASE
)


class HeadsResult(Target):
    """What each head adds to the residual stream.

    Args:
        attention: The target of the attention module.
        projection: The target of its output projection.
        heads: The number of heads.
    """

    __slots__ = ("heads", "projection")
    is_value = True

    def __init__(self, attention: Target, projection: Target, heads: int) -> None:
        super().__init__(projection.owner, HEADS_RESULT, join(attention.path, HEADS_RESULT), projection)
        self.projection, self.heads = projection, heads

    def point(self, part: str, call: int) -> str:
        return join(self.path, f"calls[{call}]") if call else self.path

    def attach(self, tap: Tap) -> HookHandle:
        """Compute the results in every call of the projection, and let the run read and change them."""
        host, calls = tap.host, tap.host.taps[self.outer.key]
        tap.entered, tap.step_base = calls.entered - len(calls.active), calls.step_base

        def after(module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor | None:
            if current_owner() is not host or not host.taps or not calls.entered:
                return None
            call = calls.entered - 1
            if not is_wanted(tap, call):
                return pass_value(tap, call, None)
            results = _results(module, args[0], self.heads)
            state = state_of(results)
            given = pass_value(tap, call, results)
            is_changed = given is not results or not is_unchanged(results, state)
            if not is_changed and not results.requires_grad:
                return None
            total = given.sum(2) if module.bias is None else given.sum(2) + module.bias
            return total if is_changed else WithValueOf.apply(total, output.detach())

        return HookHandle(self.owner.register_forward_hook(after).remove)

    def call(self, *args: Any, **kwargs: Any) -> Any:
        raise InputError(f"{self.path} is a value and cannot be called")


def heads_result(attention: Target, path: str) -> HeadsResult:
    """Return the target of the results of an attention module's heads.

    Raises:
        InputError: The output projection or the number of heads is unknown.
    """
    module = attention.owner
    names = [name for name, _ in module.named_children() if _OUTPUT.fullmatch(name)]
    heads = count_heads(module)
    if not names:
        raise InputError(f"{path}: no output projection was found in {type(module).__name__}")
    if heads is None:
        raise InputError(f"{path}: the number of heads of {type(module).__name__} is unknown")
    projection = attention.children()[names[-1]]
    if type(projection.owner) not in (nn.Linear, Conv1D):  # one with an adapter, for example
        raise InputError(f"{path}: {projection.path} is a {type(projection.owner).__name__}, not a plain projection")
    return HeadsResult(attention, projection, heads)


def _results(projection: nn.Module, hidden: torch.Tensor, heads: int) -> torch.Tensor:
    """Return what each head adds, (batch, tokens, heads, features)."""
    weight = projection.weight if isinstance(projection, Conv1D) else projection.weight.T
    return torch.einsum("bthf,hfo->btho", hidden.unflatten(-1, (heads, -1)), weight.unflatten(0, (heads, -1)))
