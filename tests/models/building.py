"""How the small models are built: each time with the same random weights, whatever ran before."""

from typing import Any

import torch


def build(cls: Any, config: Any) -> Any:
    """Return `cls(config)` in evaluation mode, with weights from a random stream of its own."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return cls(config).eval()
