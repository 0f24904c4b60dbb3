"""Fake tensors for a scan, and the way back to real ones.

`Fakes` makes a fake tensor from a real one or from one on the meta device; `Zeros` replaces fake tensors with zeros.
Both are recorded by autograd, so a gradient passes from one side to the other, as zeros.
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map

from diffsight.engine.scan_errors import NEEDS_VALUES
from diffsight.errors import ScanError


class Fakes:
    """The fake tensors of one scan.

    Tensors on the meta device become fake tensors on `device`, where the weights are, or will be once they are loaded.
    """

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        # A fallback kernel would run an operation for real, on zeros of full size.
        self._mode = _ShapeMode(allow_non_fake_inputs=True, allow_fallback_kernels=False)

    def of(self, tensor: torch.Tensor) -> FakeTensor:
        """Return a fake tensor in place of a tensor; a fake one is returned as it is."""
        return tensor if isinstance(tensor, FakeTensor) else _ToFake.apply(tensor, self)

    def of_weight(self, tensor: torch.Tensor) -> FakeTensor:
        """Return a fake parameter or buffer in place of a real one, with a `.grad` of its own."""
        with torch.inference_mode(False):
            return self.empty_like(tensor, tensor.requires_grad)

    def empty_like(self, tensor: torch.Tensor, requires_grad: bool = False) -> FakeTensor:
        """Return a fake tensor of the same shape, strides, dtype and device, a leaf for autograd."""
        with torch._C.DisableTorchFunction():
            if tensor.layout is torch.strided:
                empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
            else:
                empty = torch.empty_like(tensor, device="meta")
            device = self.device if tensor.is_meta else tensor.device
            return FakeTensor(self._mode, empty, device, requires_grad=requires_grad)

    def created_by(self, function: Callable, args: tuple, kwargs: dict[str, Any]) -> FakeTensor:
        """Call a function that creates a tensor, and return a fake one."""
        with self._mode:
            return function(*args, **kwargs)


class _ShapeMode(FakeTensorMode):
    """The mode of fake tensors. If values are needed after a scan, it raises an error that mentions the scan."""

    def __torch_dispatch__(self, *call: Any) -> Any:
        try:
            return super().__torch_dispatch__(*call)
        except NEEDS_VALUES as error:
            raise ScanError("this tensor comes from a scan, which computes shapes only: use a real run") from error


class Zeros:
    """Replaces fake tensors with zeros on the same device.

    Lists, tuples and dictionaries are copied. Other objects, such as caches and distributions, are changed in place.
    """

    def __init__(self, fakes: Fakes) -> None:
        self._fakes = fakes
        self._seen: dict[int, tuple[Any, Any]] = {}  # by id: an object, and its replacement

    def __call__(self, value: Any) -> Any:
        return tree_map(self._leaf, value)

    def _leaf(self, leaf: Any) -> Any:
        if id(leaf) in self._seen:
            return self._seen[id(leaf)][1]
        if isinstance(leaf, torch.Tensor):
            is_fake = isinstance(leaf, FakeTensor) or leaf.is_meta
            zeros = _ToZeros.apply(self._fakes.of(leaf), self._fakes) if is_fake else leaf
            self._seen[id(leaf)] = leaf, zeros
            return zeros
        if hasattr(leaf, "__dict__") and not isinstance(leaf, (nn.Module, ModuleType)) and not callable(leaf):
            self._seen[id(leaf)] = leaf, leaf
            for name, value in vars(leaf).items():
                changed = self(value)
                if any(a is not b for a, b in zip(tree_leaves(value), tree_leaves(changed))):
                    vars(leaf)[name] = changed
        return leaf


def _zeros_like(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    with torch._C.DisableTorchFunction():
        return torch.zeros(tensor.shape, dtype=tensor.dtype, device=device)


class _ToFake(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, fakes: Fakes) -> FakeTensor:
        ctx.device = tensor.device
        return fakes.empty_like(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _zeros_like(gradient, ctx.device), None


class _ToZeros(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: FakeTensor, fakes: Fakes) -> torch.Tensor:
        ctx.fakes = fakes
        return _zeros_like(tensor, tensor.device)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[FakeTensor, None]:
        return ctx.fakes.of(gradient), None
