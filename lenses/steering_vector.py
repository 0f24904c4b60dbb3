"""Steering vectors: the directions in which hidden states differ between prompts with a concept and without it.

    vectors = steering_vector(model, ["I love this", "What a joy"], ["I hate this", "What a pain"], layers=[10, 15])
    steer(model, vector=vectors, factor=2).generate("I think that", max_new_tokens=20).text

    vectors = steering_vector(pipeline, red_prompts, other_prompts, layers="unet.**.attn2", num_inference_steps=20)
    vectors["unet.mid_block.attentions[0].transformer_blocks[0].attn2"].shape       # (steps, features)

In a language model the vector of a layer is the difference of mean hidden states (Turner et al., "Activation Addition",
2023; Rimsky et al., "Steering Llama 2 via Contrastive Activation Addition", 2023), the first principal component of the
paired differences (Zou et al., "Representation Engineering", 2023, section 3.1), or the weights of a linear probe. In a
denoiser there is a vector for each step and module: the difference of means over the positions of the image in the
conditional branch, of length 1 (Gaintseva et al., "CASteer", 2025, section 4).
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from diffsight.errors import InputError, UnknownKeyError, suggest
from diffsight.lenses.denoising.call_checks import Steps, check_steps
from diffsight.lenses.layers import Layers
from diffsight.lenses.options import check_options
from diffsight.lenses.results.calls import repeatable
from diffsight.lenses.results.figure import write_figure
from diffsight.lenses.results.result import LensResult
from diffsight.lenses.results.sections import CurveSection, Section
from diffsight.lenses.tokens.batches import Positions
from diffsight.lenses.tokens.choosing import check_count
from diffsight.lenses.visits.contrast_plots import contrast_figure
from diffsight.lenses.visits.mean_states import ImagePrompts, mean_states_of_tokens
from diffsight.lenses.visits.named_points import NamedPoint, PointName, named_points
from diffsight.lenses.visits.visiting import is_in_steps
from diffsight.pipelines.diffusion.model import DiffusionModel
from diffsight.pipelines.language.model import LanguageModel
from diffsight.pipelines.local_paths import find_path, shortened
from diffsight.pipelines.numbers import unpacked
from diffsight.pipelines.seeds import as_seed
from diffsight.pipelines.steering_arguments import check_positions

METHODS = ("mean", "pca", "probe")
_TENSORS = "vectors.safetensors"


@dataclass(frozen=True, eq=False)
class SteeringVectors(LensResult, Mapping):
    """Vectors by layer or path: `vectors[15]`, (features,), or for a point in a denoiser (steps, features).

    `save(folder)` writes `vectors.safetensors`, `contrast.png` and `vectors.json`; `SteeringVectors.load(folder)` loads
    them.

    Attributes:
        model: The name of the model.
        vectors: The vectors by the number of the layer, "embedding", or the path of the module.
        contrast: How far apart the means of positive and negative prompts are, relative to the mean length of the
            hidden states, by layer or path: a number, or (steps,).
        method: "mean", "pca" or "probe".
        positive: The prompts with the concept.
        negative: The prompts without it.
        positions: The positions whose mean was taken.
        timesteps: The timesteps of the steps, for points in a denoiser.
        arguments: Further arguments of the model.
    """

    model: str
    vectors: Mapping[PointName, torch.Tensor] = field(repr=False)
    contrast: Mapping[PointName, torch.Tensor] = field(repr=False)
    method: str
    positive: tuple[str, ...] = field(repr=False)
    negative: tuple[str, ...] = field(repr=False)
    positions: Any = None
    timesteps: tuple[float, ...] | None = field(default=None, repr=False)
    arguments: Mapping[str, Any] = field(default_factory=dict)
    record_file: ClassVar[str] = "vectors.json"

    def __getitem__(self, name: PointName) -> torch.Tensor:
        if name not in self.vectors:
            raise UnknownKeyError(
                f"there is no vector of {name!r}{suggest(str(name), map(str, self))}: the result has "
                f"{', '.join(map(str, self))}"
            )
        return self.vectors[name]

    def __iter__(self) -> Iterator[PointName]:
        return iter(self.vectors)

    def __len__(self) -> int:
        return len(self.vectors)

    def plot(self) -> Figure:
        """Plot the contrast by layer, or by step with a curve for each module."""
        return contrast_figure(self.contrast, self._title())

    def preview(self) -> Figure:
        return self.plot()

    def sections(self) -> list[Section]:
        if self.timesteps is not None:
            steps = list(map(str, range(len(self.timesteps))))
            lines = {str(name): values.tolist() for name, values in self.contrast.items()}
            return [CurveSection(self._title(), "step", steps, lines, "contrast")]
        values = [float(value) for value in self.contrast.values()]
        return [CurveSection(self._title(), "layer", list(map(str, self)), {"contrast": values}, "contrast")]

    def files(self) -> dict[str, Callable[[Path], None]]:
        tensors = {f"vector {name}": value.contiguous() for name, value in self.vectors.items()}
        tensors |= {f"contrast {name}": value.contiguous() for name, value in self.contrast.items()}
        return {_TENSORS: partial(save_file, tensors), "contrast.png": partial(write_figure, self.plot)}

    def record(self) -> dict[str, Any]:
        return {
            "lens": "steering_vector",
            "model": self.model,
            "layers": list(self.vectors),
            "method": self.method,
            "positive": list(self.positive),
            "negative": list(self.negative),
            "positions": self.positions,
            "timesteps": None if self.timesteps is None else list(self.timesteps),
            "arguments": dict(self.arguments),
        }

    @classmethod
    def load(cls, folder: str | Path) -> "SteeringVectors":
        """Load the vectors that `save(folder)` wrote.

        Raises:
            InputError: The folder has no vectors.
        """
        found = find_path(folder)
        if found is None or not (found / cls.record_file).is_file():
            raise InputError(f"the folder {shortened(str(folder))} has no vectors: there is no {cls.record_file} in it")
        try:
            record, tensors = json.loads((found / cls.record_file).read_text("utf-8")), load_file(found / _TENSORS)
            of = {kind: {n: tensors[f"{kind} {n}"] for n in record["layers"]} for kind in ("vector", "contrast")}
            kept = {name: record[name] for name in ("model", "method", "positions", "arguments")}
            texts = {name: tuple(record[name]) for name in ("positive", "negative")}
            timesteps = None if record["timesteps"] is None else tuple(record["timesteps"])
        except (OSError, ValueError, KeyError, TypeError, RecursionError, SafetensorError) as error:
            raise InputError(f"the vectors in {found} are damaged: {type(error).__name__}: {error}") from error
        return cls(vectors=of["vector"], contrast=of["contrast"], timesteps=timesteps, **kept, **texts)

    def _title(self) -> str:
        return f"{self.method} of {len(self.positive)} and {len(self.negative)} prompts"


@repeatable
def steering_vector(
    model: LanguageModel | DiffusionModel,
    positive: Sequence[str],
    negative: Sequence[str],
    *,
    layers: Layers = None,
    method: str = "mean",
    positions: Positions = None,
    steps: Steps = None,
    branch: str | None = None,
    batch_size: int = 16,
    seed: int | None = None,
    progress: bool = True,
    **arguments: Any,
) -> SteeringVectors:
    """Return the direction from `negative` to `positive` prompts at each layer.

        steering_vector(model, happy, sad, layers=[10, 15])
        steering_vector(model, happy, sad, method="pca")                            # prompts in pairs
        steering_vector(pipeline, red, blue, layers="text_encoder.layers[*]")
        steering_vector(pipeline, red, blue, layers="unet.**.attn2", num_inference_steps=20)

    Args:
        model: The model.
        positive: Prompts with a concept.
        negative: Prompts without it, ideally alike in all other respects.
        layers: Layers of a language model: layer i is the output of `layers[i]`, -1 the last, and "embedding" the input
            of the first. In any model: paths or patterns of modules, such as "text_encoder.layers[4]" or
            "unet.**.attn2". Default: all layers of a language model.
        method: "mean": the difference of the means. "pca": the first principal component of the differences in each
            pair of prompts, of length 1, or zero where they do not differ. "probe": the weights of a logistic
            regression that tells positive from negative, of length 1. All point towards `positive`.
        positions: The positions in each prompt whose mean is taken: 0 is its first token, -1 its last; in a pipeline,
            positions in the sequence that the module reads. Default: the last token in a language model, and all
            positions in a pipeline.
        steps: The denoising steps, for modules of a denoiser. Default: all. Steering takes place in these steps.
        branch: The branch of guidance to read: "cond", "uncond" or "both". Default: "cond".
        batch_size: The number of prompts in a pass.
        seed: The seed of the first positive and of the first negative prompt of a pipeline; later prompts have later
            seeds, so that pairs share their noise. Default: 0.
        progress: Whether to show a progress bar.
        arguments: Further arguments of the model, such as `num_inference_steps`.

    Returns:
        The vectors by layer or path. Vectors of a denoiser have length 1 at every step.

    Raises:
        InputError: Before anything runs, if an argument is not valid or the prompts are not lists of strings.
        PointNotFoundError: A path does not exist.
    """
    _check(model, positive, negative, method, steps, branch, seed)
    items = None if steps is None else check_steps(steps)
    check_options(steering_vector, model, arguments)
    batch_size, points = check_count("batch_size", batch_size), named_points(model, layers)
    if isinstance(model, LanguageModel):
        positions = -1 if positions is None else unpacked(positions)
        read = partial(mean_states_of_tokens, model, points)
        sides = [read(side, positions, batch_size, progress, arguments) for side in (positive, negative)]
    else:
        _check_one_kind(model, points)
        positions = None if positions is None else check_positions(positions)
        first = as_seed(seed or 0)
        reader = ImagePrompts(model, points, positions, items, branch, batch_size, first, progress, arguments)
        sides = [reader.read(side) for side in (positive, negative)]
    with_it, without = sides
    vectors = {name: _vectors(method, with_it.values[name], without.values[name]) for name in with_it.values}
    if with_it.timesteps is not None:
        vectors = {name: F.normalize(value, dim=-1) for name, value in vectors.items()}
    return SteeringVectors(
        model=model.label if isinstance(model, LanguageModel) else model.source,
        vectors=vectors,
        contrast={name: _contrast(with_it.values[name], without.values[name]) for name in with_it.values},
        method=method,
        positive=tuple(positive),
        negative=tuple(negative),
        positions=positions,
        timesteps=with_it.timesteps,
        arguments=arguments,
    )


def _check(model: Any, positive: Any, negative: Any, method: str, steps: Steps, branch: Any, seed: Any) -> None:
    if not isinstance(model, (LanguageModel, DiffusionModel)):
        raise InputError(f"steering_vector takes a LanguageModel or a DiffusionModel, not {type(model).__name__}")
    for name, texts in (("positive", positive), ("negative", negative)):
        if isinstance(texts, str) or not isinstance(texts, Sequence) or not all(isinstance(t, str) for t in texts):
            raise InputError(f"{name} must be a list of prompts")
        if not texts:
            raise InputError(f"{name} is empty: pass prompts")
    if method not in METHODS:
        raise InputError(f"method must be one of {', '.join(map(repr, METHODS))}, not {method!r}")
    if method == "pca" and len(positive) != len(negative):
        raise InputError(
            f'method="pca" compares prompts in pairs, but there are {len(positive)} positive and {len(negative)} '
            "negative ones"
        )
    if isinstance(model, LanguageModel):
        given = {"steps": steps, "branch": branch, "seed": seed}
        for name, value in given.items():
            if value is not None:
                raise InputError(f"{name} is for pipelines: a language model reads each prompt in one pass")


def _check_one_kind(model: DiffusionModel, points: Sequence[NamedPoint]) -> None:
    """Check that all points are passed in denoising steps, or that none are."""
    kinds = {is_in_steps(model, point): point for point in points}
    if len(kinds) > 1:
        raise InputError(
            f"{kinds[True].name} runs in every denoising step, but {kinds[False].name} runs before the steps: call "
            "steering_vector once for each"
        )


# ---- directions


def _vectors(method: str, positive: torch.Tensor, negative: torch.Tensor) -> torch.Tensor:
    """Return the direction, (..., features), between states, (prompts, ..., features)."""
    difference = positive.mean(0) - negative.mean(0)
    if method == "mean":
        return difference
    if positive.ndim == 3:  # at each step
        return torch.stack([_vectors(method, positive[:, i], negative[:, i]) for i in range(positive.shape[1])])
    found = _component(positive - negative) if method == "pca" else _probe(positive, negative)
    return found * torch.where(found @ difference < 0, -1.0, 1.0)


def _component(differences: torch.Tensor) -> torch.Tensor:
    """Return the direction that explains most of the differences, (pairs, features), whatever their signs; zeros if
    there are none."""
    if not differences.any():
        return torch.zeros_like(differences[0])
    return torch.linalg.svd(differences, full_matrices=False).Vh[0]


def _probe(positive: torch.Tensor, negative: torch.Tensor) -> torch.Tensor:
    """Return the unit weights of a logistic regression with an L2 penalty, on states scaled to mean length 1."""
    states = torch.cat([positive, negative]).double()
    labels = torch.cat([torch.ones(len(positive)), torch.zeros(len(negative))]).double()
    states = states / states.norm(dim=-1).mean()
    with torch.enable_grad():
        weights = torch.zeros(states.shape[-1] + 1, dtype=torch.double, requires_grad=True)
        optimizer = torch.optim.LBFGS([weights], max_iter=500, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

        def loss() -> torch.Tensor:
            optimizer.zero_grad()
            logits = states @ weights[:-1] + weights[-1]
            fit = F.binary_cross_entropy_with_logits(logits, labels, reduction="sum")
            value = fit + weights[:-1].square().sum() / 2
            value.backward()
            return value

        optimizer.step(loss)
    return F.normalize(weights.detach()[:-1], dim=0).float()


def _contrast(positive: torch.Tensor, negative: torch.Tensor) -> torch.Tensor:
    """Return the distance of the means relative to the mean length of the states."""
    length = torch.cat([positive, negative]).norm(dim=-1).mean(0)
    return (positive.mean(0) - negative.mean(0)).norm(dim=-1) / length
