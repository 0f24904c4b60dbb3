"""Inside an attention module: its probabilities, its queries, keys and values, and the output of each head.

    run.attention_probs[3]                  # (batch, heads, tokens, tokens), assignable
    run.q[3], run.k[3], run.v[3]            # (batch, tokens, heads, features of a head), from the projections
    run.heads_output[3][:, :, 5] = 0        # remove head 5 of layer 3

The probabilities are not the output of any module. They are read where the attention multiplies them with the values: a
PyTorch function mode looks for the first product after a softmax. The mode is active only inside the run's own
coroutine, and only in runs that use the probabilities.
"""

import re
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from diffsight.errors import AssignmentError, InputError
from diffsight.extending import Tap, Target
from diffsight.pipelines.language.value_parts import Heads
from diffsight.pipelines.module_spans import HookHandle

_PRODUCTS = {"matmul", "__matmul__", "bmm", "einsum", "baddbmm"}
_KEEPS_PROBS = {"dropout", "to", "type", "type_as", "float", "half", "bfloat16", "clone", "contiguous", "__getitem__"}
_KEEPS_PROBS |= {
    "reshape",
    "view",
    "flatten",
    "unflatten",
    "unsqueeze",
    "squeeze",
    "transpose",
    "permute",
    "expand",
    "masked_fill",
}
_SEPARATE = {
    "q": re.compile(r"q_proj|q_b_proj|query|q_lin|q|project_q|wq|query_proj", re.IGNORECASE),
    "k": re.compile(r"k_proj|key|k_lin|k|project_k|wk|key_proj", re.IGNORECASE),
    "v": re.compile(r"v_proj|value|v_lin|v|project_v|wv|value_proj", re.IGNORECASE),
}
_BY_HEAD = re.compile(r"query_key_value")  # query, key and value of a head are adjacent
_IN_BLOCKS = re.compile(r"c_attn|qkv_proj|wqkv|attn_qkv|qkv", re.IGNORECASE)  # all queries, all keys, all values
_IN_PARTS = {"CodeGenAttention": (4, "qvk")}  # arranged for this many devices
_BY_HEAD_TOO = {"MiniMaxLightningAttention"}  # although its name means blocks elsewhere
_OUTPUT = re.compile(
    r"o_proj|out_proj|c_proj|dense|out_lin|attention_out|wo|o|linear_out|out|resid_proj", re.IGNORECASE
)


class Probabilities(Target):
    """The attention probabilities of an attention module, as they are multiplied with the values."""

    __slots__ = ()

    def __init__(self, attention: Target, path: str) -> None:
        super().__init__(attention.owner, "attention_probs", path, attention)

    def attach(self, tap: Tap) -> HookHandle:
        flow = tap.host
        softmaxes = next((mode for mode in flow.modes if isinstance(mode, _SoftmaxMode)), None)
        if softmaxes is None:
            softmaxes = _SoftmaxMode()
            flow.add_mode(softmaxes)
        softmaxes.taps.append(tap)
        return HookHandle(partial(softmaxes.taps.remove, tap))


class _SoftmaxMode(TorchFunctionMode):
    """Sends the probabilities of attention modules through their taps."""

    def __init__(self) -> None:
        super().__init__()
        self.taps: list[Tap] = []
        self._probs: list[torch.Tensor] = []  # outputs of a softmax, and what was computed from these alone

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = getattr(func, "__name__", "")
        tap = next((tap for tap in self.taps if _is_running(tap)), None)
        if tap is None:
            self._probs.clear()
            return func(*args, **(kwargs or {}))
        if name in _PRODUCTS:
            return func(*self._with_probs(tap, args), **(kwargs or {}))
        output = func(*args, **(kwargs or {}))
        if name == "softmax" or (name in _KEEPS_PROBS and self._are_probs(args[0])):
            self._probs.append(output)
        return output

    def _are_probs(self, value: Any) -> bool:
        return any(known is value for known in self._probs)

    def _with_probs(self, tap: Tap, args: tuple) -> tuple:
        """Return the arguments of a product. If its first tensor holds probabilities, the run may have changed them."""
        factors = args[1] if len(args) == 2 and isinstance(args[1], (list, tuple)) else args
        place = next((i for i, factor in enumerate(factors) if isinstance(factor, torch.Tensor)), None)
        if place is None or not self._are_probs(factors[place]):
            return args
        self._probs.clear()
        changed = (*factors[:place], _passed(tap, factors[place]), *factors[place + 1 :])
        return changed if factors is args else (args[0], changed)


def _is_running(tap: Tap) -> bool:
    attention = tap.host.taps.get(tap.target.outer.key)
    return attention is not None and bool(attention.active)


def _passed(tap: Tap, given: torch.Tensor) -> torch.Tensor:
    """Let the run read and change the probabilities, with a dimension for the heads, and return them."""
    heads = count_heads(tap.target.owner)
    probs = given.unflatten(0, (-1, heads)) if given.ndim == 3 and heads else given
    tap.enter((probs,), {})
    found = tap.leave(probs)
    if found.shape != probs.shape:
        raise AssignmentError(f"{tap.target.path} has the shape {tuple(probs.shape)}, not {tuple(found.shape)}")
    return found.reshape(given.shape)


# ---- projections


def projection(attention: nn.Module, which: str, path: str) -> tuple[str, Heads]:
    """Find the projection to queries, keys or values.

    Args:
        attention: The attention module.
        which: "q", "k" or "v".
        path: The path of the value, for errors.

    Returns:
        The name of the module that projects, and which part of its output is meant.

    Raises:
        InputError: The projection is unknown.
    """
    children = dict(attention.named_children())
    heads = count_heads(attention)
    name = next((child for child in children if _SEPARATE[which].fullmatch(child)), None)
    if name is not None:
        width = _width(children[name])
        size = head_size(attention, heads)
        if which == "q" and heads and width and width % heads == 0 and (not size or width // heads >= size):
            gated = size and width == 2 * heads * size  # a gate next to each query
            return name, Heads((heads, 2), slice(0, 1)) if gated else Heads((heads, 1))
        if which != "q" and size and width and width % size == 0:
            return name, Heads((width // size, 1))
    name = next((child for child in children if _BY_HEAD.fullmatch(child) or _IN_BLOCKS.fullmatch(child)), None)
    size = head_size(attention, heads)
    width = _width(children[name]) if name else None
    if name and heads and size and width:
        layout = _fused(type(attention).__name__, name, which, heads, size, width)
        if layout is not None:
            return name, layout
    raise InputError(
        f"{path}: {type(attention).__name__} has no projection to {which} that diffsight knows. Read the output of its "
        f"modules instead: {', '.join(children)}"
    )


def _fused(attention: str, name: str, which: str, heads: int, size: int, width: int) -> Heads | None:
    """Return which part of the output of a fused projection holds the queries, keys or values.

    `attention` is the name of the class of the attention module."""
    index, total = "qkv".index(which), width // size
    if attention in _IN_PARTS:  # each part for some of the heads
        count, order = _IN_PARTS[attention]
        start = order.index(which) * (heads // count)
        return Heads((count, total // count), slice(start, start + heads // count))
    others, rest = divmod(total - heads, 2)  # as many keys as values
    if rest or others < 1 or width % size or heads % others:
        return None
    if attention not in _BY_HEAD_TOO and (_IN_BLOCKS.fullmatch(name) or (others == 1 and heads > 1)):
        start = (0, heads, heads + others)[index]
        return Heads((1, total), slice(start, start + (heads, others, others)[index]))
    each = heads // others  # queries that share a key
    return Heads((others, each + 2), (slice(0, each), slice(each, each + 1), slice(each + 1, each + 2))[index])


def output_projection(attention: nn.Module, path: str) -> str:
    """Return the name of the module that combines the outputs of the heads."""
    names = [name for name, _ in attention.named_children() if _OUTPUT.fullmatch(name)]
    if not names:
        raise InputError(f"{path}: no output projection was found in {type(attention).__name__}")
    return names[-1]


def count_heads(attention: nn.Module) -> int | None:
    """Return the number of heads of an attention module, or None if it is unknown."""
    for holder in (attention, getattr(attention, "config", None)):
        for name in ("num_heads", "num_attention_heads", "n_heads", "n_head", "num_attn_heads"):
            count = getattr(holder, name, None)
            if isinstance(count, int) and count > 0:
                return count
    return None


def head_size(attention: nn.Module, heads: int | None) -> int | None:
    """Return the number of features of a head, from the attention module or from its output projection."""
    names = ("head_dim", "attention_head_size", "key_value_proj_dim", "dim_head", "head_size", "d_head")
    size = next((s for n in names if isinstance(s := getattr(attention, n, None), int)), None)
    outputs = [module for name, module in attention.named_children() if _OUTPUT.fullmatch(name)]
    weight = getattr(outputs[-1], "weight", None) if size is None and heads and outputs else None
    return size if weight is None else weight.shape[0 if hasattr(outputs[-1], "nf") else -1] // heads


def _width(module: nn.Module) -> int | None:
    for name in ("out_features", "nf"):
        if isinstance(getattr(module, name, None), int):
            return getattr(module, name)
    weight = next((w for w in module.parameters() if w.ndim == 2), None)
    return len(weight) if weight is not None else None


def eager_only(attention: nn.Module, path: str) -> None:
    """Raise InputError if a fused kernel computes the attention, because then the probabilities never exist."""
    used = getattr(getattr(attention, "config", None), "_attn_implementation", None)
    if used not in (None, "eager"):
        raise InputError(
            f"{path}: the model computes its attention with {used!r}, which never holds the probabilities. Load it "
            "with attn_implementation='eager', or call model.set_attn_implementation('eager') before the run"
        )


def probabilities(attention: Target, path: str) -> Probabilities:
    """Return the target of an attention's probabilities. Raise InputError if they are not visible."""
    eager_only(attention.owner, path)
    return Probabilities(attention, path)
