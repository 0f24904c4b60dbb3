"""Rows of a vision-language model. In the language model a row is an entry of the batch. Before it, in the vision
tower, entries are pictures, tiles or patches of all rows one after the other: there a row's part is its pictures',
which is to the whole as its image tokens are to all."""

from collections.abc import Sequence

import torch
from torch import nn

from diffsight.errors import InputError
from diffsight.extending import Part, Tap


class RowPart(Part):
    """The part of a row: an entry of the batch in the language model, its pictures in the modules `sees`."""

    def __init__(self, entry: Part, sees: set[int], tokens: Sequence[int], index: int) -> None:
        super().__init__(entry.start, entry.stop, entry.total, entry.stride, entry.name)
        self._sees, self._pictures = sees, _Pictures(entry, tokens, index)

    def at(self, tap: Tap, index: int, path: str) -> Part:
        owners = [tap.target, *tap.target.around()]
        return self._pictures if any(id(target.owner) in self._sees for target in owners) else self


class _Pictures(Part):
    """The pictures of row number `index`, where the rows have `tokens` image tokens each."""

    def __init__(self, entry: Part, tokens: Sequence[int], index: int) -> None:
        super().__init__(entry.start, entry.stop, entry.total, entry.stride, entry.name)
        self._tokens, self._index = tokens, index

    def _is_batch(self, tensor: torch.Tensor) -> bool:
        return tensor.ndim > 0 and (len(tensor) > 1 or len(self._tokens) == 1)

    def _slice(self, tensor: torch.Tensor, path: str) -> slice:
        size, whole = len(tensor) if tensor.ndim else 0, sum(self._tokens)
        if not size or not whole or any(count * size % whole for count in self._tokens):
            raise InputError(
                f"{path} cannot be cut into rows: which of its entries belong to which picture cannot be told, its "
                f"shape is {tuple(tensor.shape)} and the rows have {', '.join(map(str, self._tokens))} image tokens. "
                "Read or assign it on the run itself"
            )
        bounds = [sum(self._tokens[:end]) * size // whole for end in (self._index, self._index + 1)]
        return slice(*bounds)


def modules_that_see(net: nn.Module, layers: str, head: str | None) -> set[int]:
    """The ids of the modules that lie before the language model, whose list of layers is at the path `layers`: the
    vision tower, and what makes image tokens of its output."""
    trunk = layers.rpartition(".")[0]
    paths = filter(None, (trunk, *(head or "").split(":")))
    language = {id(module) for path in paths for module in net.get_submodule(path).modules()}
    around = {id(module) for path, module in net.named_modules() if not path or f"{trunk}.".startswith(f"{path}.")}
    return {id(module) for module in net.modules()} - language - around
