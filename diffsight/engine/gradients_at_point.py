"""Gradients that the model computes itself while the body has them off. They would leave out what the body changes.

    with torch.no_grad(), model.trace(x) as run:
        run.layers[2].output *= 2               # an error if the model returns forces, which it differentiates

A hook runs in the model's grad mode, so its changes are a part of the graph.
"""

from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

from diffsight.engine.points import Point


class GradientsAtPoint:
    """The tensors with gradients in the value at which the model stands.

    Use it where no function modes are active, see `unseen`."""

    def __init__(self, point: Point) -> None:
        self.point = point
        self._leaves = tree_leaves(point.value)
        tensors = [leaf for leaf in self._leaves if isinstance(leaf, Tensor) and leaf.grad_fn is not None]
        bases = [tensor if tensor._base is None else tensor._base for tensor in tensors]
        self._nodes = [(base, base._version, base.grad_fn) for base in bases]

    def were_bypassed(self) -> bool:
        """Whether one of the tensors was changed in place without another node of the graph, or was replaced within its
        container by one without gradients."""
        if any(base._version != version and base.grad_fn is node for base, version, node in self._nodes):
            return True
        leaves = tree_leaves(self.point.value)
        if self.point.changed or len(leaves) != len(self._leaves):  # an assignment was looked at where it was made
            return False
        return any(map(_loses_gradients, self._leaves, leaves))


def _loses_gradients(before: Any, now: Any) -> bool:
    are_tensors = isinstance(before, Tensor) and isinstance(now, Tensor)
    return before is not now and are_tensors and before.requires_grad and not now.requires_grad
