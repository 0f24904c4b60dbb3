"""Schedulers, whose attributes a run changes: they are read on the server."""

from typing import Any

from torch import nn


def is_scheduler(part: Any) -> bool:
    """Return whether a part of a model is a scheduler, whose attributes a run changes."""
    return hasattr(part, "set_timesteps") and not isinstance(part, nn.Module)
