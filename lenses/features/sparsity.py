"""The activation functions of sparse autoencoders: which features are active.

"topk"          the k largest of each vector (Gao et al., "Scaling and evaluating sparse autoencoders", 2024)
"batch_topk"    in training, the k n largest of n vectors; afterwards, those above the mean threshold in training
                (Bussmann et al., "BatchTopK Sparse Autoencoders", 2024)
"jumprelu"      those above a learned threshold (Rajamanoharan et al., "Jumping Ahead", 2024)
"relu"          those above 0, with an L1 penalty in training (Bricken et al., "Towards Monosemanticity", 2023)
"""

from typing import Any

import torch

KINDS = ("topk", "batch_topk", "jumprelu", "relu")


def topk(values: torch.Tensor, k: int) -> torch.Tensor:
    """Return the k largest values along the last dimension if they are above 0, and 0 elsewhere."""
    largest = values.topk(k, dim=-1, sorted=False)
    return torch.zeros_like(values).scatter(-1, largest.indices, largest.values.relu())


def batch_topk(values: torch.Tensor, k: int) -> torch.Tensor:
    """Return the largest values over all vectors, k for each vector on average, and 0 elsewhere."""
    flat = values.relu().flatten()
    largest = flat.topk(k * (values.numel() // values.shape[-1]), sorted=False)
    return torch.zeros_like(flat).scatter(0, largest.indices, largest.values).view_as(values)


def above(values: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
    """Return the values where they are above a threshold and above 0, and 0 elsewhere."""
    return values.relu() * (values > threshold)


class JumpReLU(torch.autograd.Function):
    """`above`, with a gradient for the threshold from values within half a bandwidth of it."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, threshold: torch.Tensor, bandwidth: float) -> torch.Tensor:
        ctx.save_for_backward(values, threshold)
        ctx.bandwidth = bandwidth
        return above(values, threshold)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple:
        values, threshold = ctx.saved_tensors
        near = ((values - threshold).abs() < ctx.bandwidth / 2) * (-threshold / ctx.bandwidth)
        of_threshold = (near * gradient).flatten(0, -2).sum(0)
        return (values > threshold) * (values > 0) * gradient, of_threshold, None


class ActiveCount(torch.autograd.Function):
    """The number of features of each vector above a threshold, with a gradient for the threshold as in `JumpReLU`."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, threshold: torch.Tensor, bandwidth: float) -> torch.Tensor:
        ctx.save_for_backward(values, threshold)
        ctx.bandwidth = bandwidth
        return (values > threshold).to(values.dtype).sum(-1)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple:
        values, threshold = ctx.saved_tensors
        near = ((values - threshold).abs() < ctx.bandwidth / 2) * (-1 / ctx.bandwidth)
        return None, (near * gradient[..., None]).flatten(0, -2).sum(0), None
