"""Checks of functions that take an SAE, made before anything runs. Every function raises InputError."""

from collections.abc import Callable, Sequence
from typing import Any

from diffsight.errors import InputError
from diffsight.lenses.features.autoencoder import SAE
from diffsight.pipelines.diffusion.model import DiffusionModel
from diffsight.pipelines.language.model import LanguageModel
from diffsight.pipelines.numbers import as_integer, unpacked


def check_model(function: Callable, model: Any) -> None:
    """Check that a model is a pipeline or a language model."""
    if not isinstance(model, (DiffusionModel, LanguageModel)):
        kind = type(model).__name__
        raise InputError(f"{function.__name__} takes a DiffusionModel or a LanguageModel, not {kind}")


def point_of(sae: SAE, point: str | None) -> str:
    """Return the given point, or the point at which the SAE was trained."""
    if not isinstance(sae, SAE):
        raise InputError(f"sae must be an SAE, not {type(sae).__name__}: load one with SAE.load(folder)")
    if point is None and sae.point is None:
        raise InputError('the SAE does not say at which point it was trained: pass point="unet.mid_block" or another')
    return point or sae.point


def check_features(sae: SAE, features: int | Sequence[int]) -> tuple[int, ...]:
    """Return features as a tuple."""
    features = unpacked(features)
    given = tuple(features) if isinstance(features, Sequence) else (features,)
    chosen = tuple(map(as_integer, given))
    for feature, number in zip(given, chosen):
        if number is None or not 0 <= number < sae.count:
            raise InputError(f"there is no feature {feature!r}: the SAE has {sae.count}, 0 to {sae.count - 1}")
    if not chosen:
        raise InputError("no features are chosen")
    return chosen
