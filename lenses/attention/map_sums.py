"""The maps of words in a product, and their sums, whose memory does not grow with the number of steps or layers.

means = WordMeans([[1], [2, 3]], 77)    # the second word has two tokens
values = means.values(product, attention, None, False)[0]
sums = MapSums()
sums.add("", attention, values)         # (words, positions of the image)
maps = sums.mean("")                    # (words, rows, columns): the mean of all, each in the size of the largest
"""

from collections.abc import Sequence

import torch
from torch.nn import functional as F

from diffsight.pipelines.attention.attention_probabilities import AttentionProduct
from diffsight.pipelines.diffusion.attention import Attention


class WordMeans:
    """The map of each word in a product: the mean over the keys of its tokens.

    Args:
        words: The keys of each word.
        keys: The number of keys in the product.
    """

    def __init__(self, words: list[list[int]], keys: int) -> None:
        self._average = torch.zeros(keys, len(words))
        for number, word in enumerate(words):
            self._average[word, number] = 1 / len(word)

    def values(
        self, product: AttentionProduct, attention: Attention, heads: Sequence[int] | None, by_head: bool
    ) -> torch.Tensor:
        """Return how much each word is attended to, (heads, words, positions of the image), or the mean over heads."""
        if self._average.device != product.q.device:
            self._average = self._average.to(product.q.device)
        blocks = product.blocks(slice(None), attention.image, heads)
        parts = [(probs[0] if by_head else probs[0].mean(0, keepdim=True)) @ self._average for _, probs in blocks]
        return (parts[0] if len(parts) == 1 else torch.cat(parts, 1)).transpose(1, 2)


class MapSums:
    """Sums of maps, one for each group and size. They stay on the device of the model until `mean` is called."""

    def __init__(self) -> None:
        self._sums: dict[str, dict[tuple[int, ...], torch.Tensor]] = {}
        self._counts: dict[str, int] = {}

    @property
    def groups(self) -> tuple[str, ...]:
        """The groups, in the order in which their first maps were added."""
        return tuple(self._sums)

    def add(self, group: str, attention: Attention, values: torch.Tensor) -> None:
        """Add the maps of one product, (words, positions of the image) in float32."""
        sums = self._sums.setdefault(group, {})
        known = sums.get(attention.grid)
        if known is None:
            sums[attention.grid] = values.detach().clone()
        else:
            known += values.to(known.device)
        self._counts[group] = self._counts.get(group, 0) + 1

    def mean(self, group: str | None = None) -> torch.Tensor:
        """Return the mean map of a group, or of all groups, (words, rows, columns), with frames before the rows."""
        groups = self.groups if group is None else (group,)
        size = max((grid for one in self._sums.values() for grid in one), key=lambda grid: grid[-1])
        kept = (maps for one in groups for maps in self._sums[one].items())
        total = sum(_resized(maps.cpu().unflatten(-1, grid), size) for grid, maps in kept)
        return total / sum(self._counts[one] for one in groups)


def _resized(maps: torch.Tensor, size: tuple[int, ...]) -> torch.Tensor:
    """Return maps in another size, by bicubic interpolation."""
    if maps.shape[1:] == size:
        return maps
    flat = maps.reshape(-1, 1, *maps.shape[-2:])
    resized = F.interpolate(flat, size=size[-2:], mode="bicubic", align_corners=False)
    return resized.reshape(*maps.shape[:-2], *size[-2:])
