"""The measurements of a trace."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Traced:
    """The metric by noise sample, site and column, and the metric of the runs with nothing restored.

    Attributes:
        metric: The name of the metric.
        sites: The names of the sites.
        columns: The names of the columns.
        values: The metric with one place restored, (samples, sites, columns).
        clean: The metric of the clean run.
        corrupted: The metric with noise and nothing restored, (samples,).
        passes: The number of forward passes, or of calls of the pipeline.
    """

    metric: str
    sites: tuple[str, ...]
    columns: tuple[str, ...]
    values: torch.Tensor
    clean: float
    corrupted: torch.Tensor
    passes: int


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
