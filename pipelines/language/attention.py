"""What happens inside an attention: its probabilities, its queries, keys and values, the output of each head.

    run.attention_probs[3]                  # (batch, heads, tokens, tokens); can be assigned
    run.q[3], run.k[3], run.v[3]            # (batch, tokens, heads, features of a head), as the projections give them
    run.heads_output[3][:, :, 5] = 0        # head 5 of layer 3 says nothing

The probabilities are no module's output. They are taken where the attention multiplies them with the values: a function
mode of PyTorch watches for the first product behind a softmax. It stands in the run's own coroutine and only in runs
that ask for them.
"""

import re
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from diffsight.errors import AssignmentError, InputError
from diffsight.extending import Tap, Target
from diffsight.pipelines.language.hidden_states import Heads
from diffsight.pipelines.language.spans import Attached

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
_BY_HEAD = re.compile(r"query_key_value")  # a head's query, key and value lie together
_IN_BLOCKS = re.compile(
    r"c_attn|qkv_proj|wqkv|attn_qkv|qkv", re.IGNORECASE
)  # all queries, then all keys, then all values
_IN_PARTS = {"CodeGenAttention": (4, "qvk")}  # laid out for so many devices
_BY_HEAD_TOO = {"MiniMaxLightningAttention"}  # under a name that says otherwise elsewhere
_OUTPUT = re.compile(
    r"o_proj|out_proj|c_proj|dense|out_lin|attention_out|wo|o|linear_out|out|resid_proj", re.IGNORECASE
)


class Probabilities(Target):
    """The attention probabilities of the attention module at `attention`, as they meet the values."""

    __slots__ = ()

    def __init__(self, attention: Target, path: str) -> None:
        super().__init__(attention.owner, "attention_probs", path, attention)

    def attach(self, tap: Tap) -> Attached:
        flow = tap.host
        watch = next((mode for mode in flow.modes if isinstance(mode, _Watch)), None)
        if watch is None:
            watch = _Watch()
            flow.add_mode(watch)
        watch.taps.append(tap)
        return Attached(partial(watch.taps.remove, tap))


class _Watch(TorchFunctionMode):
    """Sends the probabilities of the attentions that are asked for through their taps."""

    def __init__(self) -> None:
        super().__init__()
        self.taps: list[Tap] = []
        self._probs: list[torch.Tensor] = []  # what a softmax gave, and what was made of that alone

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
        """The arguments of a product; probabilities, if they are the first tensor in it, as the run has them by now."""
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
    """The probabilities after the run has read and changed them; heads in a dimension of their own for it."""
    heads = count_heads(tap.target.owner)
    probs = given.unflatten(0, (-1, heads)) if given.ndim == 3 and heads else given
    tap.enter((probs,), {})
    found = tap.leave(probs)
    if found.shape != probs.shape:
        raise AssignmentError(f"{tap.target.path} has the shape {tuple(probs.shape)}, not {tuple(found.shape)}")
    return found.reshape(given.shape)


# ---- projections


def projection(attention: nn.Module, which: str, path: str) -> tuple[str, Heads]:
    """The module that projects to queries, keys or values (`which` is "q", "k" or "v"), and where in its output they
    are. Raises InputError where it cannot be told."""
    children = dict(attention.named_children())
    heads = count_heads(attention)
    name = next((child for child in children if _SEPARATE[which].fullmatch(child)), None)
    if name is not None:
        width = _width(children[name])
        size = head_size(attention, heads)
        if which == "q" and heads and width and width % heads == 0 and (not size or width // heads >= size):
            gated = size and width == 2 * heads * size  # a gate beside each query
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
        f"{path}: {type(attention).__name__} has no projection to {which} of its own that diffsight knows; read its "
        f"modules: {', '.join(children)}"
    )


def _fused(attention: str, name: str, which: str, heads: int, size: int, width: int) -> Heads | None:
    """Where the queries, keys or values are in what a fused projection gives; `attention` is the class that has it."""
    index, total = "qkv".index(which), width // size
    if attention in _IN_PARTS:  # each for some of the heads
        count, order = _IN_PARTS[attention]
        start = order.index(which) * (heads // count)
        return Heads((count, total // count), slice(start, start + heads // count))
    others, rest = divmod(total - heads, 2)  # as many keys, and as many values
    if rest or others < 1 or width % size or heads % others:
        return None
    if attention not in _BY_HEAD_TOO and (_IN_BLOCKS.fullmatch(name) or (others == 1 and heads > 1)):
        start = (0, heads, heads + others)[index]
        return Heads((1, total), slice(start, start + (heads, others, others)[index]))
    each = heads // others  # queries that share a key
    return Heads((others, each + 2), (slice(0, each), slice(each, each + 1), slice(each + 1, each + 2))[index])


def output_projection(attention: nn.Module, path: str) -> str:
    """The module that takes the heads' outputs together."""
    names = [name for name, _ in attention.named_children() if _OUTPUT.fullmatch(name)]
    if not names:
        raise InputError(f"{path}: no output projection found in {type(attention).__name__}")
    return names[-1]


def count_heads(attention: nn.Module) -> int | None:
    """How many heads an attention module has, if it says so."""
    for holder in (attention, getattr(attention, "config", None)):
        for name in ("num_heads", "num_attention_heads", "n_heads", "n_head", "num_attn_heads"):
            count = getattr(holder, name, None)
            if isinstance(count, int) and count > 0:
                return count
    return None


def head_size(attention: nn.Module, heads: int | None) -> int | None:
    """How many features a head has: what the attention module says, else what its output projection takes."""
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
    """Raises InputError where the attention is computed by a fused kernel, in which the probabilities never exist."""
    used = getattr(getattr(attention, "config", None), "_attn_implementation", None)
    if used not in (None, "eager"):
        raise InputError(
            f"{path}: the model computes its attention with {used!r}, which never holds the probabilities. Load it "
            "with attn_implementation='eager', or call model.set_attn_implementation('eager') before the run"
        )


def probabilities(attention: Target, path: str) -> Probabilities:
    """The target of an attention's probabilities. Raises InputError where they cannot be seen."""
    eager_only(attention.owner, path)
    return Probabilities(attention, path)
