"""Wrap a component of a pipeline as a separate model, for example to call the denoiser once more."""

from torch import nn

from diffsight.extending import Model


def as_model(module: nn.Module) -> Model:
    """Return a model of a single module. Its runs are calls of the module."""
    return Model(module)
