"""The activation functions of sparse autoencoders: which features are active.

"topk"          the k largest of each vector (Gao et al., "Scaling and evaluating sparse autoencoders", 2024)
"batch_topk"    in training, the k n largest of n vectors; afterwards, those above the mean threshold in training
                (Bussmann et al., "BatchTopK Sparse Autoencoders", 2024)
"jumprelu"      those above a learned threshold (Rajamanoharan et al., "Jumping Ahead", 2024)
"relu"          those above 0, with an L1 penalty in training (Bricken et al., "Towards Monosemanticity", 2023)
"""

from typing import Any

import torch
from torch import nn

KINDS = ("topk", "batch_topk", "jumprelu", "relu")


def topk_(values: torch.Tensor, k: int) -> torch.Tensor:
    """Keep the k largest values along the last dimension if they are above 0, and set the others to 0, in place."""
    largest = values.topk(k, dim=-1, sorted=False)
    return values.zero_().scatter_(-1, largest.indices, largest.values.relu())


def batch_topk_(values: torch.Tensor, k: int) -> torch.Tensor:
    """Keep the largest values over all vectors, k for each vector on average, if they are above 0, and set the others
    to 0, in place."""
    flat = values.view(-1)
    largest = flat.topk(k * (values.numel() // values.shape[-1]), sorted=False)
    flat.zero_().scatter_(0, largest.indices, largest.values.relu())
    return values


def above(values: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
    """Return the values where they are above a threshold and above 0, and 0 elsewhere."""
    with torch.no_grad():  # 1 where a value is above, and 0 elsewhere: faster than a mask
        gate = (values - threshold.clamp(min=0)).relu_().sign_()
    return values * gate


class ActiveFeatures(torch.autograd.Function):
    """The active features of "topk" and "batch_topk" alone, for training: what the other features would cost is saved.

        values, rows, numbers = ActiveFeatures.apply(x, encoder, encoder_bias, "topk", k)

    Returns the value of each active feature, the row of its vector, and its number, (active,), sorted by row. The
    vectors get no gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, encoder: torch.Tensor, bias: torch.Tensor, kind: str, k: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        before = torch.addmm(bias, x, encoder)
        count = before.shape[1]
        if kind == "topk":
            largest = before.topk(k, dim=-1, sorted=False)
            values, numbers = (part.flatten() for part in largest)
            rows = torch.arange(len(x), device=x.device).repeat_interleave(k)
        else:
            values, places = before.flatten().topk(k * len(x), sorted=False)
            places, order = places.sort()
            values, rows, numbers = values[order], places // count, places % count
        ctx.save_for_backward(x, values, rows, numbers)
        ctx.count = count
        ctx.mark_non_differentiable(rows, numbers)
        return values.relu(), rows, numbers

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor, *_: Any) -> tuple:
        x, values, rows, numbers = ctx.saved_tensors
        gradient = gradient * (values > 0)
        places, size = torch.stack([numbers, rows]), (ctx.count, len(x))
        by_feature = torch.sparse_coo_tensor(places, gradient, size, check_invariants=False)
        of_bias = gradient.new_zeros(ctx.count).index_add_(0, numbers, gradient)
        return None, (by_feature @ x).T, of_bias, None, None


def decode_active(
    values: torch.Tensor, rows: torch.Tensor, numbers: torch.Tensor, decoder: torch.Tensor, count: int
) -> torch.Tensor:
    """Return the sums of the directions of active features, (count, width), for the result of `ActiveFeatures`."""
    starts = torch.searchsorted(rows, torch.arange(count, device=rows.device))
    return nn.functional.embedding_bag(numbers, decoder, starts, mode="sum", per_sample_weights=values)


class JumpReLU(torch.autograd.Function):
    """`above`, and how many features of each vector are active, (vectors,). The gradients for the threshold come from
    values within half a bandwidth of it."""

    @staticmethod
    def forward(
        ctx: Any, values: torch.Tensor, threshold: torch.Tensor, bandwidth: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        features = above(values, threshold)
        ctx.save_for_backward(values, threshold, features)
        ctx.bandwidth = bandwidth
        return features, features.sign().sum(-1)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor, of_count: torch.Tensor) -> tuple:
        values, threshold, features = ctx.saved_tensors
        near = ((values - threshold).abs_() < ctx.bandwidth / 2).to(values.dtype)
        of_threshold = of_count @ near + threshold * near.mul_(gradient).sum(0)
        return features.sign().mul_(gradient), of_threshold / -ctx.bandwidth, None
