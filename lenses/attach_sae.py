"""Attach a sparse autoencoder (SAE) to a model, so that its features can be read and changed in every run.

    opened = attach_sae(model, SAE.load("sae"))
    with opened.generate("a red circle", seed=0) as run:
        for step in run.steps:
            run.unet.up_blocks[0].sae.features.output[..., 7] = 0

A model with an SAE attached keeps what the SAE does not explain. Only changes to features reach the model: if they
are only read, the result stays the same, bit for bit.
"""

from itertools import count
from typing import Any, TypeVar

import torch
from torch import nn

from diffsight.errors import InputError
from diffsight.lenses.features.activation_stream import channels_last, difference, tensor_in
from diffsight.lenses.features.autoencoder import SAE
from diffsight.lenses.features.sae_checks import check_model, point_of
from diffsight.lenses.where_models_are import check_is_here
from diffsight.pipelines.argument_types import check_types
from diffsight.pipelines.diffusion.model import DiffusionModel
from diffsight.pipelines.language.model import LanguageModel

Wrapper = TypeVar("Wrapper", DiffusionModel, LanguageModel)


def attach_sae(model: Wrapper, sae: SAE, point: str | None = None) -> Wrapper:
    """Return a copy of the model, sharing its weights, in which the features of an SAE are points of every run.

        opened = attach_sae(model, SAE.load("sae"))
        with opened.trace("The Eiffel Tower") as run:
            run.layers[3].sae.features.output[..., 7] *= 2

    The features are at `sae.features.output` of the module at the point, (..., features), or for feature maps
    (batch, height, width, features). They can be read, changed in place and assigned in each call of the module.

    Args:
        model: The model.
        sae: The SAE.
        point: The path of the module. Default: the point that the SAE was trained at.

    Raises:
        InputError: The SAE does not say where it was trained.
        PointNotFoundError: The point does not exist.
    """
    check_model(attach_sae, model)
    check_types(attach_sae, point=point)
    check_is_here(attach_sae, model, "adds a module to", "call the SAE on what you read: sae(run[point].output)")
    point = point_of(sae, point)

    def attached(run: Any) -> None:
        for number in count():
            call = run[point].calls[number]
            given = call.input if sae.of == "difference" else None
            output = call.output
            value = run[point].sae(tensor_in(output), None if given is None else tensor_in(given), hook=True)
            call.output = _with_tensor(output, value)

    model[point]  # raises an error if it does not exist
    copy = model.edit(attached)
    copy[point].sae = FeatureTap(sae, point)
    return copy


class FeatureTap(nn.Module):
    """The module that `attach_sae` attaches. It returns its input plus the effect of changed features.

    Args:
        sae: The SAE.
        point: The path of the module that it is attached to.
    """

    def __init__(self, sae: SAE, point: str) -> None:
        super().__init__()
        self.sae, self.features = sae, nn.Identity()
        self._point = point

    def forward(self, value: torch.Tensor, given: torch.Tensor | None = None) -> torch.Tensor:
        """Return the value at the point, (..., width), plus the effect of changed features."""
        vectors = channels_last(value if given is None else difference(value, given, self._point))
        if vectors.shape[-1] != self.sae.width:
            raise InputError(
                f"the SAE is for vectors of width {self.sae.width}, but {self._point} has width {vectors.shape[-1]}"
            )
        features = self.sae.encode(vectors)
        if features.is_inference():  # changes in place are not counted
            changed = self.features(features.clone())
        else:
            version, total = features._version, features.sum()
            changed = self.features(features)
            was_changed = features._version != version
            was_changed |= not torch.equal(features.sum(), total)  # through `.data`, whose changes are not counted
            if changed is features and not was_changed:
                return value
            features = self.sae.encode(vectors) if was_changed else features
        if torch.equal(changed, features):
            return value
        added = ((changed - features) @ self.sae.decoder).to(value.dtype)
        return value + (added.movedim(-1, 1) if value.ndim >= 4 else added)


def _with_tensor(output: Any, tensor: torch.Tensor) -> Any:
    """Return a module's output with its first tensor replaced."""
    if isinstance(output, torch.Tensor):
        return tensor
    if isinstance(output, tuple):
        at = next(i for i, item in enumerate(output) if isinstance(item, torch.Tensor))
        return (*output[:at], tensor, *output[at + 1 :])
    first = next(name for name, item in output.items() if isinstance(item, torch.Tensor))
    return type(output)(**{**output, first: tensor})
