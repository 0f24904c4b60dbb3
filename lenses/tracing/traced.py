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
