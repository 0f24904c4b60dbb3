"""Find the features of a sparse autoencoder that stand for a concept: those that are stronger in prompts with it.

    score = concept_features(model, sae, ["a red circle", "a red square"], ["a blue circle", "a green square"])
    score.topk(5).indices

The mean of each feature over all vectors and steps is divided by the sum of all features' means. The score of a feature
is this share with the concept minus the share without it (Cywiński and Deja, "SAeUron: Interpretable Concept Unlearning
in Diffusion Models with Sparse Autoencoders", 2025, section 4.2).
"""

from collections.abc import Sequence
from typing import Any

import torch

from diffsight.errors import InputError
from diffsight.lenses.denoising.call_checks import Steps
from diffsight.lenses.features.activation_stream import PointReader
from diffsight.lenses.features.autoencoder import SAE
from diffsight.lenses.features.sae_checks import check_model, point_of
from diffsight.lenses.options import check_options
from diffsight.lenses.tokens.choosing import check_count
from diffsight.pipelines.argument_types import check_types
from diffsight.pipelines.diffusion.model import DiffusionModel
from diffsight.pipelines.language.model import LanguageModel
from diffsight.pipelines.seeds import as_seed


def concept_features(
    model: DiffusionModel | LanguageModel,
    sae: SAE,
    prompts: Sequence[str],
    others: Sequence[str],
    *,
    steps: Steps = None,
    point: str | None = None,
    batch_size: int = 16,
    seed: int = 0,
    **arguments: Any,
) -> torch.Tensor:
    """Return a score for each feature, (features,): how much stronger it is with a concept than without.

    Args:
        model: The model.
        sae: The SAE.
        prompts: Prompts with the concept.
        others: Prompts without it, ideally alike in all other respects.
        steps: The denoising steps, for a point in a denoiser. Default: all.
        point: The path of the module. Default: the point that the SAE was trained at.
        batch_size: How many prompts are run together.
        seed: The seed of the first image.
        arguments: Further arguments of the model. `images` holds the images for `prompts`, then those for `others`.

    Raises:
        InputError: The prompts are not lists of strings, or the SAE does not say where it was trained.
    """
    check_model(concept_features, model)
    check_options(concept_features, model, arguments)
    check_types(concept_features, prompts=prompts, others=others, point=point)
    seed = as_seed(seed)
    batch_size = check_count("batch_size", batch_size)
    if not prompts or not others:
        raise InputError("pass two lists of strings: prompts with the concept, and others without it")
    reader = PointReader(model, point_of(sae, point), sae.of, steps, arguments)
    reader.check()
    shares = []
    for texts, before in ((prompts, 0), (others, len(prompts))):
        total = torch.zeros(sae.count, dtype=torch.double)
        for start in range(0, len(texts), batch_size):
            part = list(texts[start : start + batch_size])
            own = reader.of_part(before + start, len(part), len(prompts) + len(others))
            with torch.no_grad():
                total += sae.encode(own.read(part, seed=seed + start).vectors()).double().sum(0).cpu()
        shares.append(total / total.sum().clamp(min=1e-12))
    return (shares[0] - shares[1]).float()
