"""Keep a change in the input of a denoiser from reaching other places, and record what attention gets there.

Attention adds nothing, a convolution uses only the middle of its kernel, and a group norm normalizes each place alone.
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import FrameType, SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from diffsight.pipelines.attention.attention_modules import is_named_attention
from diffsight.pipelines.attention.attention_probabilities import AttentionProduct
from diffsight.pipelines.attention.eager_attention import EagerAttention
from diffsight.pipelines.attention.product_dispatch import WATCHED
from diffsight.pipelines.attention.sdpa_attention import (
    MULTI_HEAD_ATTENTION,
    SCALED_DOT_PRODUCT,
    FusedCall,
    without_dispatch,
)
from diffsight.pipelines.diffusion.batch_layouts import COND, UNCOND

_FEATURES = 16  # the number of features kept of a query or key
Key = tuple[str, int]  # the path of a module in the denoiser, and the number of its product in a call


@dataclass(eq=False)
class Trace:
    """A product in one call of the denoiser.

    Attributes:
        shape: (batch, heads, queries, keys).
        queries: A random projection of the queries of the conditional branch, (queries, features).
        keys: A random projection of the keys, (keys, features).
    """

    shape: tuple[int, ...]
    queries: torch.Tensor = field(repr=False)
    keys: torch.Tensor = field(repr=False)


class Inseparable(Exception):
    """The entries of a batch cannot be assigned to its prompts."""


class CutAttention(TorchFunctionMode):
    """Records the queries and keys of every product in a module, and cuts all operations that mix places.

    A product belongs to the innermost running module, not counting processors and softmax layers.

    Args:
        module: The denoiser.
        entries: Returns the places of a branch in its batch, or None if they are not known.
        count: The number of prompts.

    Attributes:
        traces: The products that were made for each prompt.
    """

    def __init__(self, module: nn.Module, entries: Callable[[str], list[int] | None], count: int) -> None:
        super().__init__()
        self._entries = entries
        self.traces: list[dict[Key, Trace]] = [{} for _ in range(count)]
        self._paths = {id(part): path for path, part in module.named_modules()}
        self._root = module
        self._eager = EagerAttention()
        self._attention: nn.Module | None = None  # the module whose products are followed now

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        if name not in WATCHED and name not in _PLACE_BY_PLACE and self._eager.is_empty:
            return func(*args, **kwargs)
        running = [*_running(sys._getframe(1))]
        if self._root not in running:
            self._eager.clear()
            return func(*args, **kwargs)
        if name in _PLACE_BY_PLACE:
            return _PLACE_BY_PLACE[name](func, *args, **kwargs)
        owner = next(m for m in running if not isinstance(m, nn.Softmax) and "Processor" not in type(m).__name__)
        self._forget_others(owner, running)
        probe = _Probe(self, owner, self._paths[id(owner)])
        if name == MULTI_HEAD_ATTENTION:
            with self:
                return without_dispatch(func)(*args, **kwargs)
        if name == SCALED_DOT_PRODUCT:
            return FusedCall.of([probe], args, kwargs).run(func)
        return self._eager.run([probe], name, func, args, kwargs)

    def _forget_others(self, owner: nn.Module, running: list[nn.Module]) -> None:
        """Forget the products of other modules, which would keep alive everything computed from them: a product without
        a softmax, as in linear attention, is never used up."""
        attention = next(filter(is_named_attention, running), None)
        if self._attention not in running or attention not in (None, self._attention):
            self._eager.clear()
            self._attention = owner if attention is None else attention

    def keep(self, path: str, product: AttentionProduct) -> None:
        """Record a product of the module at a path."""
        number = sum(known == path for known, _ in self.traces[0])
        entries = self._entries(COND)
        if len(self.traces) == 1:
            entries = entries[:1] if entries and entries[-1] < len(product.q) else [-1]
        elif not self._follow_each_other(entries, self._entries(UNCOND), len(product.q)):
            raise Inseparable
        q, k = (_projected(tensor[entries]) for tensor in (product.q, product.k))
        for traces, *projected in zip(self.traces, q, k):
            traces[path, number] = Trace(product.shape, *projected)

    def _follow_each_other(self, cond: list[int] | None, uncond: list[int] | None, size: int) -> bool:
        """Whether a batch has one entry for each prompt in each branch, in the order of the prompts."""
        count = len(self.traces)
        if cond is None or uncond is None or size != len(cond) + len(uncond):
            return False
        return all([entry % count for entry in entries] == [*range(count)] for entries in (cond, uncond) if entries)


def _convolution(
    func: Callable,
    tensor: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> torch.Tensor:
    """Convolve with only the middle of the kernel: a kernel of size 1, which is fast and needs no copy of the weights.

    A convolution that uses each place once is left unchanged."""
    sizes = tuple(weight.shape[2:])
    strides, dilations, paddings = (_of_axes(value, len(sizes)) for value in (stride, dilation, padding))
    if sizes == strides:
        return func(tensor, weight, bias, stride, padding, dilation, groups)
    margins = []  # what is added to each axis, or cut off if negative, so that every output reads its middle
    for axis in reversed(range(len(sizes))):  # the order of `pad`
        length, reach = tensor.shape[tensor.ndim - len(sizes) + axis], dilations[axis] * (sizes[axis] - 1)
        padded = {"same": reach, "valid": 0}[padding] if isinstance(padding, str) else 2 * paddings[axis]
        before = padded // 2 - dilations[axis] * (sizes[axis] // 2)
        outputs = (length + padded - reach - 1) // strides[axis] + 1
        margins += [before, (outputs - 1) * strides[axis] + 1 - length - before]
    middle = weight[(..., *(slice(size // 2, size // 2 + 1) for size in sizes))]
    return func(nn.functional.pad(tensor, margins), middle, bias, stride, 0, 1, groups)


def _of_axes(value: Any, count: int) -> tuple:
    """Return a value for each axis."""
    values = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    return values * count if len(values) == 1 else values


def _group_norm(
    func: Callable,
    tensor: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
) -> torch.Tensor:
    """Normalize each place alone, instead of all places together."""
    return nn.functional.layer_norm(tensor.movedim(1, -1), tensor.shape[1:2], weight, bias, eps).movedim(-1, 1)


_PLACE_BY_PLACE = {"conv1d": _convolution, "conv2d": _convolution, "conv3d": _convolution, "group_norm": _group_norm}


class _Probe:
    """Stands in for the watched modules of a run, see `watched_modules.Watched`."""

    def __init__(self, mode: CutAttention, owner: nn.Module, path: str) -> None:
        self.calls = SimpleNamespace(target=SimpleNamespace(owner=owner, path=path))
        self._mode, self._path = mode, path

    def has_taps(self, value: str) -> bool:
        return self.wants(value)

    def wants(self, *values: str) -> bool:
        return "attention_product" in values or "heads_output" in values

    def through(self, value: str, current: Any) -> Any:
        if value == "attention_product":
            self._mode.keep(self._path, current)
        return torch.zeros_like(current) if value == "heads_output" else current

    def end_product(self) -> None:
        pass


def _running(frame: FrameType | None) -> Iterator[nn.Module]:
    """Yield the modules whose calls are in progress, innermost first."""
    while frame is not None:
        if frame.f_code is nn.Module._call_impl.__code__:
            yield frame.f_locals["self"]
        frame = frame.f_back


def _projected(tensor: torch.Tensor) -> torch.Tensor:
    """Return a random projection of (batch, heads, tokens, features) to (batch, tokens, 16), on the CPU."""
    flat = tensor.transpose(1, 2).flatten(2).detach().float().cpu()
    matrix = torch.randn(flat.shape[-1], _FEATURES, generator=torch.Generator().manual_seed(0))
    return flat @ matrix
