"""The noise on the embeddings of a subject, which causal tracing adds."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Noise:
    """The noise on the embeddings of a subject.

    Attributes:
        scale: The standard deviation, as a multiple of the standard deviation of the token embeddings.
        samples: The number of samples.
        seed: Its seed.
    """

    scale: float
    samples: int
    seed: int

    def draw(self, weights: torch.Tensor, tokens: int, width: int) -> torch.Tensor:
        """Return the noise for some tokens, (samples, tokens, features). `weights` are all token embeddings."""
        generator = torch.Generator().manual_seed(self.seed)
        noise = torch.randn(self.samples, tokens, width, generator=generator)
        return noise * self.scale * weights.detach().float().std().cpu()
