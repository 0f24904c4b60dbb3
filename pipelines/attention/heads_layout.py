"""How the heads of a module are laid out in its tensors."""

from collections.abc import Sequence

import torch


class HeadsLayout:
    """Converts a tensor with heads to (batch, heads, tokens, features), and back.

    Args:
        order: For a tensor of four dimensions, its dimensions in the order (batch, heads, tokens, features).
        heads: For a tensor of three dimensions, the number of heads in its first dimension.
        packed: For a tensor of four dimensions, how many of its queries are really heads, see `FusedCall`.
    """

    def __init__(self, order: Sequence[int] = (0, 1, 2, 3), heads: int = 1, packed: int = 1) -> None:
        self.order, self.heads, self.packed = tuple(order), heads, packed

    def view(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the tensor as (batch, heads, tokens, features)."""
        if tensor.ndim == 3:
            return tensor.unflatten(0, (-1, self.heads))
        tensor = tensor.permute(self.order)
        return tensor if self.packed == 1 else tensor.flatten(1, 2).unsqueeze(2)

    def back(self, tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """Undo `view`: return a tensor from `view`, possibly with other values, in the layout of `like`."""
        if like.ndim == 3:
            return tensor.flatten(0, 1)
        if self.packed > 1:
            tensor = tensor.squeeze(2).unflatten(1, (-1, self.packed))
        return tensor.permute([self.order.index(i) for i in range(4)])


class TransposedLayout(HeadsLayout):
    """The layout of a tensor in a matrix product whose last two dimensions are swapped."""

    def __init__(self, layout: HeadsLayout) -> None:
        super().__init__(layout.order, layout.heads)

    def view(self, tensor: torch.Tensor) -> torch.Tensor:
        return super().view(tensor).transpose(-1, -2)

    def back(self, tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        return super().back(tensor.transpose(-1, -2), like)
