"""Read and replace the latents in the output of `scheduler.step`, a tuple or an object of a scheduler-specific class.

sample_of(output)                           # (batch, …)
with_sample(output, latents)                # the same output with other latents
"""

from collections.abc import Mapping
from typing import Any

import torch


def sample_of(output: Any) -> torch.Tensor:
    """Return the latents in the output of `scheduler.step`."""
    return next(iter(output.values() if isinstance(output, Mapping) else output))


def with_sample(output: Any, sample: torch.Tensor) -> Any:
    """Return the output of `scheduler.step` with each sample in it replaced by other latents, of any batch size."""
    before = sample_of(output)
    sample = sample.to(before)

    def replaced(value: Any) -> Any:
        return sample if isinstance(value, torch.Tensor) and value.shape == before.shape else value

    if isinstance(output, Mapping):
        return type(output)(**{name: replaced(value) for name, value in output.items()})
    return tuple(map(replaced, output))
