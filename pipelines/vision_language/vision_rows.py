"""Rows of a vision-language model: which images belong to which input, in the modules of the vision tower.

In the language model, a row of a run is an entry of the batch. In the vision tower, the entries are the images, tiles
or patches of all rows one after the other. There, a row's share of the entries equals its share of the image tokens.
"""

from collections.abc import Sequence

import torch
from torch import nn

from diffsight.errors import InputError
from diffsight.extending import Part, Tap


class ImageRowPart(Part):
    """The part of a row: an entry of the batch in the language model, and the images in the vision tower."""

    def __init__(self, entry: Part, vision: set[int], tokens: Sequence[int], index: int) -> None:
        super().__init__(entry.start, entry.stop, entry.total, entry.stride, entry.name)
        self._vision, self._images = vision, _ImagesPart(entry, tokens, index)

    def at(self, tap: Tap, index: int, path: str) -> Part:
        owners = [tap.target, *tap.target.around()]
        return self._images if any(id(target.owner) in self._vision for target in owners) else self


class _ImagesPart(Part):
    """The images of row `index`. `tokens` holds the number of image tokens in each row."""

    def __init__(self, entry: Part, tokens: Sequence[int], index: int) -> None:
        super().__init__(entry.start, entry.stop, entry.total, entry.stride, entry.name)
        self._tokens, self._index = tokens, index

    def _is_batch(self, tensor: torch.Tensor) -> bool:
        return tensor.ndim > 0 and (len(tensor) > 1 or len(self._tokens) == 1)

    def _slice(self, tensor: torch.Tensor, path: str) -> slice:
        size, whole = len(tensor) if tensor.ndim else 0, sum(self._tokens)
        if not size or not whole or any(count * size % whole for count in self._tokens):
            raise InputError(
                f"{path} cannot be cut into rows, since it is unknown which of its entries belong to which image: its "
                f"shape is {tuple(tensor.shape)}, and the rows have {', '.join(map(str, self._tokens))} image tokens. "
                "Read or assign it on the run itself"
            )
        bounds = [sum(self._tokens[:end]) * size // whole for end in (self._index, self._index + 1)]
        return slice(*bounds)


def vision_modules(net: nn.Module, layers: str, head: str | None) -> set[int]:
    """Return the ids of the vision tower's modules and of the modules that turn its output into tokens.

    `layers` is the path of the layers of the language model, `head` the path of its head."""
    trunk = layers.rpartition(".")[0]
    paths = filter(None, (trunk, *(head or "").split(":")))
    language = {id(module) for path in paths for module in net.get_submodule(path).modules()}
    around = {id(module) for path, module in net.named_modules() if not path or f"{trunk}.".startswith(f"{path}.")}
    return {id(module) for module in net.modules()} - language - around
