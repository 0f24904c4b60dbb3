"""A site: a point of a model, or a single head at this point.

    site = Site("layers[3].self_attn.heads_output", layer=3, head=2)
    value = site.read(run)                      # (batch, tokens, heads, features)
    site.write(run, value * 0)                  # the model continues with it
    site.part(value, range(4, 6))               # a view of head 2 at these tokens, (batch, 2, features)

`find_sites` returns the sites that a user's names and patterns stand for.
"""

import re
from dataclasses import dataclass
from typing import Any

import torch

from diffsight.lenses.layers import EMBEDDING, Layer
from diffsight.lenses.sites.items import tensor_of, with_tensor

_ITEM = re.compile(r"(?<=\.output)\[(\d+)\]$")
_PARTS = ("input", "output")
_BY_HEAD = {"q": 2, "k": 2, "v": 2, "heads_output": 2, "heads_result": 2, "attention_probs": 1}  # value: dim of heads


@dataclass(frozen=True)
class Site:
    """A point of a model.

    Attributes:
        point: The path of the point, such as "layers[3].output" or "unet.mid_block.attentions[0].q". For a tuple, it
            may end with the number of the tensor: "transformer.transformer_blocks[0].output[1]".
        layer: The number of the layer of a language model that the point is in, or "embedding".
        head: The number of the head. None stands for all heads, or a point without heads.
    """

    point: str
    layer: Layer | None = None
    head: int | None = None

    @property
    def module(self) -> str:
        """The path of the module."""
        return self.path.rpartition(".")[0]

    @property
    def path(self) -> str:
        """The path of the point, without the number of a tensor."""
        return _ITEM.sub("", self.point)

    @property
    def item(self) -> int | None:
        """The number of the tensor in a tuple; None if there is only one."""
        found = _ITEM.search(self.point)
        return None if found is None else int(found[1])

    @property
    def value(self) -> str:
        """The name of the value: "input", "output", "q", "heads_output" and so on."""
        return self.path.rpartition(".")[2]

    @property
    def head_dim(self) -> int | None:
        """The dimension of the value that counts heads, or None if there are no heads."""
        return _BY_HEAD.get(self.value)

    @property
    def token_dim(self) -> int:
        """The dimension of the value that counts tokens, or queries in attention probabilities."""
        return 2 if self.value == "attention_probs" else 1

    @property
    def token_dim_of_part(self) -> int:
        """The dimension that counts tokens in what `part` returns."""
        return 1 if self.head is not None else self.token_dim

    @property
    def name(self) -> str:
        """The name of the site in figures and tables."""
        module, _, value = self.point.rpartition(".")
        place = module if value == "output" else self.point
        if self.layer == EMBEDDING:
            place = EMBEDDING
        return place if self.head is None else f"{place} head {self.head}"

    @property
    def named_in_layer(self) -> str | None:
        """The name of the point within its layer, such as "self_attn.heads_output"; None for a point outside layers."""
        if self.layer is None:
            return None
        part = self.point.partition("].")[2]
        return "layers" if part in _PARTS else part.removesuffix(".output")

    def read(self, handle: Any, call: int = 0) -> torch.Tensor:
        """Return the tensor at the point: the value, or the tensor in it.

        Args:
            handle: A run, or a row or branch of it.
            call: The number of the call of the module in the current scope.
        """
        return self.tensor(getattr(self._points(handle, call), self.value))

    def tensor(self, whole: Any) -> torch.Tensor:
        """Return the tensor of the site from the value at the point, which may be a tuple.

        Raises:
            InputError: The value holds several tensors of the same kind, and the point does not say which one.
        """
        return tensor_of(whole, self.path, self.item)

    def write(self, handle: Any, tensor: torch.Tensor, call: int = 0) -> None:
        """Let the model continue with another tensor at the point. The rest of a tuple stays as it is.

        For arguments, see `read`."""
        points = self._points(handle, call)
        if self.value == "output":
            tensor = with_tensor(points.output, tensor, self.path, self.item)
        setattr(points, self.value, tensor)

    def track(self, handle: Any, call: int = 0) -> torch.Tensor:
        """Return the tensor at the point that the model continues with, so that gradients reach it.

        For arguments, see `read`."""
        value = self.read(handle, call)
        tracked = value.clone() if value.requires_grad else value.clone().requires_grad_()
        self.write(handle, tracked.clone(), call)  # the model may change its own tensor in place
        return tracked

    def part(self, tensor: torch.Tensor, tokens: range | None = None) -> torch.Tensor:
        """Return a view of the site's head in a tensor of the point, at some tokens (None: all)."""
        index: list[Any] = [slice(None)] * tensor.ndim
        if tokens is not None:
            index[self.token_dim] = slice(tokens.start, tokens.stop)
        if self.head is not None:
            index[self.head_dim] = self.head
        return tensor[tuple(index)]

    def _points(self, handle: Any, call: int) -> Any:
        points = handle[self.module]
        return points.calls[call] if call else points


def patched_row(prompt: str, site: Site, column: str) -> str:
    """Return what a row of a sweep is, for messages: the run of a prompt with one site changed."""
    return f"{prompt} with {site.name} changed at {column!r}"
