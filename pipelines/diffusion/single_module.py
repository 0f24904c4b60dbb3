"""A component of a pipeline as a model of its own, such as the denoiser for one more call."""

from torch import nn

from diffsight.extending import Model


def as_model(module: nn.Module) -> Model:
    """Return a model of one module, whose runs are calls of this module."""
    return Model(module)
