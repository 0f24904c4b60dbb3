"""One attention product: softmax(q kᵀ · scale + mask) v, and all or some of its probabilities.

    product.probabilities()                                     # (batch, heads, queries, keys)
    for queries, probs in product.blocks(keys=[2, 5]):          # (batch, heads, queries, 2), a few queries at a time
        total[:, queries] += probs.mean(1)

Everything is computed from the queries, keys and mask that are passed to the fused kernel, so the kernel itself stays
in place.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch.nn import functional as F

_BLOCK = 2**23  # number of scores in a block: 32 MB in float32


@dataclass(frozen=True, eq=False)
class AttentionProduct:
    """The arguments of one product of queries, keys and values.

    Attributes:
        q: The queries, (batch, heads, queries, features).
        k: The keys, (batch, heads or key heads, keys, features).
        v: The values, (batch, heads or key heads, keys, features).
        mask: True where a key may be attended to, or numbers that are added to the scores; None without a mask.
        scale: The factor of the scores. None stands for one over the square root of the number of features.
        is_causal: Whether queries cannot attend to later keys.
        dropout: The fraction of probabilities that is dropped.
        computed: The probabilities, (batch, heads, queries, keys), if the module computed them itself, or else None.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    mask: torch.Tensor | None = None
    scale: float | None = None
    is_causal: bool = False
    dropout: float = 0.0
    computed: torch.Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the probabilities."""
        return (*self.q.shape[:-1], self.k.shape[-2])

    def part(self, entries: Sequence[int]) -> "AttentionProduct":
        """Return the product of some entries of the batch."""
        size = len(self.q)
        if len(entries) == size:
            return self
        start, stop = entries[0], entries[-1] + 1
        at = slice(start, stop) if stop - start == len(entries) else list(entries)
        cut = {name: getattr(self, name) for name in ("q", "k", "v", "mask", "computed")}
        return replace(self, **{n: x if x is None or len(x) != size else x[at] for n, x in cut.items()})

    def probabilities(self, heads: Sequence[int] | None = None) -> torch.Tensor:
        """Return all probabilities, (batch, heads, queries, keys), in the dtype of the queries."""
        if self.computed is not None:
            return self.computed if heads is None else self.computed[:, heads]
        part = self if heads is None else self._of_heads(heads)
        return part._probabilities(slice(0, self.q.shape[-2])).to(self.q.dtype)

    def blocks(
        self,
        keys: Sequence[int] | torch.Tensor | slice,
        queries: range | None = None,
        heads: Sequence[int] | None = None,
        size: int = _BLOCK,
    ) -> Iterator[tuple[slice, torch.Tensor]]:
        """Yield the probabilities of some keys, a block of queries at a time.

        Args:
            keys: The keys.
            queries: The queries, a contiguous range. Default: all.
            heads: The heads. Default: all.
            size: How many scores are in memory at a time.

        Yields:
            The queries of the block, and their probabilities, (batch, heads, queries of the block, keys), in float32.
        """
        part = self if heads is None else self._of_heads(heads)
        batch, count, length, total = part.shape
        queries = range(length) if queries is None else queries
        step = max(1, size // (batch * count * total))
        for start in range(queries.start, queries.stop, step):
            block = slice(start, min(start + step, queries.stop))
            yield block, part._probabilities(block)[..., keys]

    def _of_heads(self, heads: Sequence[int]) -> "AttentionProduct":
        heads = list(heads)
        every = self.mask is None or self.mask.ndim < 4 or self.mask.shape[1] == 1
        return replace(
            self,
            q=self.q[:, heads],
            k=self._for_every_head(self.k)[:, heads],
            v=self._for_every_head(self.v)[:, heads],
            mask=self.mask if every else self.mask[:, heads],
            computed=None if self.computed is None else self.computed[:, heads],
        )

    def _probabilities(self, queries: slice) -> torch.Tensor:
        """Return the probabilities of some queries in float32."""
        if self.computed is not None:
            return self.computed[..., queries, :].float()
        scale = self.q.shape[-1] ** -0.5 if self.scale is None else self.scale
        scores = self.q[..., queries, :] * scale @ self._for_every_head(self.k).transpose(-1, -2)
        mask = self._mask(queries)
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype is torch.bool else scores + mask
        softmax = torch.softmax if mask is None else torch._safe_softmax  # a mask may leave a query without keys
        return softmax(scores, -1, dtype=torch.promote_types(scores.dtype, torch.float32))

    def _mask(self, queries: slice) -> torch.Tensor | None:
        if self.is_causal:
            places = torch.arange(self.q.shape[-2], device=self.q.device)[queries]
            return places[:, None] >= torch.arange(self.k.shape[-2], device=self.q.device)
        if self.mask is None or self.mask.shape[-2] == 1:
            return self.mask
        return self.mask[..., queries, :]

    def times_values(self, probs: torch.Tensor) -> torch.Tensor:
        """Return the product of probabilities with the values, (batch, heads, queries, features)."""
        return F.dropout(probs, self.dropout) @ self._for_every_head(self.v).to(probs.dtype)

    def _for_every_head(self, tensor: torch.Tensor) -> torch.Tensor:
        """Repeat keys or values that several heads share."""
        heads, own = self.q.shape[1], tensor.shape[1]
        return tensor if own == heads or own == 1 else tensor.repeat_interleave(heads // own, 1)


# A pytree node, so that each row and branch of a product is a product too.
torch.utils._pytree.register_pytree_node(
    AttentionProduct,
    lambda product: (
        [product.q, product.k, product.v, product.mask, product.computed],
        (product.scale, product.is_causal, product.dropout),
    ),
    lambda tensors, rest: AttentionProduct(*list(tensors)[:4], *rest, list(tensors)[4]),
)
