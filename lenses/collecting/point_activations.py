"""The result of `collect_activations` for a pipeline: vectors by point, and where each comes from."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch

from diffsight.errors import UnknownKeyError, suggest

ORIGINS = ("prompts", "steps", "positions", "branches")  # the columns of `origins`


@dataclass(frozen=True, eq=False)
class PointActivations(Mapping):
    """The vectors at points of a pipeline: `activations["unet.mid_block"]`, (vectors, features).

    Attributes:
        model: The name of the model.
        vectors: The vectors by point, (vectors, features).
        origins: Where each vector comes from, (vectors, 4): the number of its prompt, the denoising step (-1 in a text
            encoder), the position in the sequence or in the feature map (row by row), and the branch (0 conditional, 1
            unconditional).
    """

    model: str
    vectors: Mapping[str, torch.Tensor] = field(repr=False)
    origins: Mapping[str, torch.Tensor] = field(repr=False)

    __eq__, __hash__ = object.__eq__, object.__hash__  # mappings of tensors cannot be compared

    def __getitem__(self, point: str) -> torch.Tensor:
        if point not in self.vectors:
            raise UnknownKeyError(
                f"there are no activations of {point!r}{suggest(str(point), self)}: there are {', '.join(self)}"
            )
        return self.vectors[point]

    def __iter__(self) -> Iterator[str]:
        return iter(self.vectors)

    def __len__(self) -> int:
        return len(self.vectors)

    def where(
        self, point: str, *, prompt: int | None = None, step: int | None = None, branch: str | None = None
    ) -> torch.Tensor:
        """Return the vectors at a point for one prompt, step or branch, (vectors, features)."""
        wanted = {0: prompt, 1: step, 3: None if branch is None else ("cond", "uncond").index(branch)}
        chosen = torch.ones(len(self[point]), dtype=torch.bool)
        for column, value in wanted.items():
            if value is not None:
                chosen &= self.origins[point][:, column] == value
        return self[point][chosen]
