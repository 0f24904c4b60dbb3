"""Linear CKA: how similar two sets of representations of the same inputs are.

linear_cka(x, y)                            # 1 for the same geometry, up to rotation and scale
"""

import torch

from diffsight.errors import InputError


def linear_cka(x: torch.Tensor, y: torch.Tensor) -> float:
    """Return the linear CKA of two sets of vectors, from 0 to 1: Kornblith et al. 2019, section 3.

    Args:
        x: (n, features).
        y: (n, features). The number of features may differ.

    Returns:
        The CKA, or NaN if all vectors of one set are equal.

    Raises:
        InputError: The numbers of vectors differ, or are smaller than two.
    """
    if x.ndim != 2 or y.ndim != 2 or len(x) != len(y) or len(x) < 2:
        raise InputError(
            "linear_cka needs the same number of vectors on both sides, (n, features) with n of 2 or more, not "
            f"{tuple(x.shape)} and {tuple(y.shape)}"
        )
    return float((normed_gram(x) * normed_gram(y)).sum())


def normed_gram(x: torch.Tensor) -> torch.Tensor:
    """Return the Gram matrix of the centred vectors, (n, n), with norm 1. The inner product of two is the CKA."""
    x = x.double() - x.double().mean(0)
    gram = x @ x.T
    return gram / gram.norm()
