"""Evaluate a sparse autoencoder: what it explains, and what the model does with its reconstruction.

print(evaluate_sae(model, sae, captions, num_inference_steps=20))
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, ClassVar

import numpy as np
import torch

from diffsight.errors import InputError
from diffsight.lenses.denoising.call_checks import Steps
from diffsight.lenses.features.activation_stream import PointReader, channels_last, tensor_in, value_at
from diffsight.lenses.features.autoencoder import SAE
from diffsight.lenses.features.sae_checks import check_model, point_of
from diffsight.lenses.features.sae_trainer import figures
from diffsight.lenses.options import check_options
from diffsight.lenses.results.calls import repeatable
from diffsight.lenses.results.outputs import image_of, outputs_in
from diffsight.lenses.results.result import LensResult
from diffsight.lenses.results.sections import Cell, Section, TableSection
from diffsight.lenses.tokens.choosing import check_count
from diffsight.pipelines.argument_types import check_types
from diffsight.pipelines.diffusion.model import DiffusionModel
from diffsight.pipelines.diffusion.run import progress_bar
from diffsight.pipelines.language.model import LanguageModel
from diffsight.pipelines.seeds import as_seed
from diffsight.pipelines.shapes.reader import read_scene
from diffsight.pipelines.shapes.scenes import Scene
from diffsight.pipelines.shapes.scoring import score
from diffsight.pipelines.vision_language.model import VisionLanguageModel


@dataclass(frozen=True, eq=False)
class SAEEvaluation(LensResult):
    """The figures of an SAE. `save(folder)` writes `evaluation.json`.

    Attributes:
        point: Where the SAE was evaluated.
        features: The number of features.
        explained_variance: The share of the variance of the vectors that the reconstruction explains.
        active: The mean number of active features of a vector (L0).
        dead: The share of features that are never active.
        effect: The effect of replacing the value with the reconstruction. For a language model: "loss" and "loss with
            the SAE", over tokens of text. For a pipeline: "image distance", the root mean square difference of pixels
            from 0 to 255; and for scenes, "right" and "right with the SAE", the share of scenes that the reader of the
            shapes sees right.
        model: The name of the model.
    """

    point: str
    features: int
    explained_variance: float
    active: float
    dead: float
    effect: dict[str, float]
    model: str
    record_file: ClassVar[str] = "evaluation.json"

    def sections(self) -> list[Section]:
        figures = {
            "explained variance": self.explained_variance,
            "active features (L0)": self.active,
            "dead features": self.dead,
            **self.effect,
        }
        rows = {name: [Cell(f"{value:.4g}")] for name, value in figures.items()}
        return [TableSection("", "figure", ["value"], rows)]

    def record(self) -> dict[str, Any]:
        return {
            "lens": "evaluate_sae",
            "model": self.model,
            "point": self.point,
            "features": self.features,
            "explained_variance": self.explained_variance,
            "active": self.active,
            "dead": self.dead,
            "effect": dict(self.effect),
        }


@repeatable
@torch.no_grad()
def evaluate_sae(
    model: DiffusionModel | LanguageModel,
    sae: SAE,
    prompts: Sequence[str] | Sequence[Scene],
    *,
    steps: Steps = None,
    point: str | None = None,
    batch_size: int = 16,
    seed: int = 0,
    **arguments: Any,
) -> SAEEvaluation:
    """Evaluate an SAE on prompts.

    Args:
        model: The model.
        sae: The SAE.
        prompts: Prompts, or scenes of the packaged pipelines. Images of scenes are read back into scenes.
        steps: The denoising steps at which vectors are compared, for a point in a denoiser. Default: all. The
            reconstruction is put in place at every step, in the conditional branch.
        point: The path of the module. Default: the point that the SAE was trained at.
        batch_size: How many prompts are run together.
        seed: Image i has `seed + i`.
        arguments: Further arguments of the model.

    Raises:
        InputError: An argument is not valid.
    """
    check_model(evaluate_sae, model)
    check_options(evaluate_sae, model, arguments)
    check_types(evaluate_sae, prompts=prompts, point=point)
    seed = as_seed(seed)
    batch_size = check_count("batch_size", batch_size)
    point = point_of(sae, point)
    scenes = [one for one in prompts if isinstance(one, Scene)]
    texts = [one.caption() if isinstance(one, Scene) else one for one in prompts]
    if not texts or (scenes and len(scenes) < len(texts)) or not all(isinstance(text, str) for text in texts):
        raise InputError("prompts must be a list of strings, or a list of scenes")
    reader = PointReader(model, point, sae.of, steps, arguments)
    reader.check()
    starts = range(0, len(texts), batch_size)
    parts = [(texts[start : start + batch_size], seed + start) for start in starts]
    readers = [reader.of_part(start, len(part), len(texts)) for start, (part, _) in zip(starts, parts)]
    found = figures(sae, (own.read(*part).vectors() for own, part in zip(readers, parts)))
    edited = _with_reconstruction(model, sae, point, reader.is_in_denoiser)
    if isinstance(model, LanguageModel):
        measured = _losses(edited, readers, parts)
    else:
        measured = _images(model, edited, parts, scenes, arguments)
    name = model.source if isinstance(model, DiffusionModel) else model.label
    return SAEEvaluation(point, sae.count, **found, effect=measured, model=name)


def _with_reconstruction(model: Any, sae: SAE, point: str, is_in_denoiser: bool) -> Any:
    """Return a copy of the model in which the reconstruction replaces the value at the point."""

    def put(points: Any) -> None:
        value = value_at(points, sae.of)
        vectors = channels_last(value)
        change = (sae(vectors) - vectors).to(value.dtype)
        target = tensor_in(points.output)
        target += change.movedim(-1, 1) if value.ndim >= 4 else change

    def replaced(run: Any) -> None:
        if is_in_denoiser:
            for _ in run.steps:
                put(run.cond[point])
        elif isinstance(model, DiffusionModel):
            put(run.cond[point])
        else:
            for number in count():
                put(run[point].calls[number])

    return model.edit(replaced)


def _losses(edited: Any, readers: Sequence[PointReader], parts: Sequence) -> dict[str, float]:
    """Return the mean loss of the next token, without and with the reconstruction. Tokens of images do not count."""
    sums, tokens = [0.0, 0.0], 0
    for reader, (texts, _) in zip(readers, parts):
        for i, one in enumerate((reader.model, edited)):
            run = one.trace(list(texts), **(reader.arguments or {}))
            logits, ids, mask = run.result.logits, run.tokens, run.mask.bool()
            keep = mask[:, 1:] & mask[:, :-1]
            for row, places in enumerate(run.image_tokens if isinstance(one, VisionLanguageModel) else ()):
                keep[row, places[places > 0] - 1] = False
            losses = torch.nn.functional.cross_entropy(logits[:, :-1][keep].float(), ids[:, 1:][keep], reduction="sum")
            sums[i] += losses.item()
        tokens += int(keep.sum())
    return {"loss": sums[0] / tokens, "loss with the SAE": sums[1] / tokens}


def _images(model: Any, edited: Any, parts: Sequence, scenes: Sequence, arguments: dict[str, Any]) -> dict[str, float]:
    """Return the distance between images with and without the reconstruction, and the share of right scenes in each."""
    drawn: list[list] = [[], []]
    for texts, seed in parts:
        for images, one in zip(drawn, (model, edited)):
            with progress_bar(one.pipeline, disable=True):
                result = one.generate(list(texts), seed=seed, **arguments).result
                images += map(image_of, outputs_in(result, one.pipeline))
    errors = [np.asarray(a, dtype=float) - np.asarray(b, dtype=float) for a, b in zip(*drawn)]
    found = {"image distance": float(np.sqrt(np.mean(np.square(errors))))}
    if scenes:
        for name, images in zip(("right", "right with the SAE"), drawn):
            right = [score(scene, read_scene(image))["scene"] for scene, image in zip(scenes, images)]
            found[name] = sum(right) / len(right)
    return found
