"""Find where features of a sparse autoencoder are strongest: the images or texts, and the places in them.

result = top_examples(model, sae, captions, features=[417, 88], num_inference_steps=20)
result.grid()           # a row for each feature; warm colours where it is active
result.plot()           # each feature by denoising step
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from tqdm.auto import tqdm

from diffsight.errors import InputError
from diffsight.lenses.denoising.call_checks import Steps, choose_steps
from diffsight.lenses.features.activation_stream import PointReader, channels_last, value_at
from diffsight.lenses.features.autoencoder import SAE
from diffsight.lenses.features.sae_checks import check_features, check_model, point_of
from diffsight.lenses.options import check_options
from diffsight.lenses.results.calls import repeatable
from diffsight.lenses.results.denoising_plots import step_curves
from diffsight.lenses.results.figure import write_figure
from diffsight.lenses.results.image_grid import image_grid
from diffsight.lenses.results.outputs import image_of, outputs_in
from diffsight.lenses.results.result import LensResult
from diffsight.lenses.results.sections import Cell, CurveSection, ImageSection, Section, TableSection, distinct
from diffsight.lenses.tokens.choosing import check_count
from diffsight.lenses.tokens.seen_image import SeenImage, seen_images
from diffsight.pipelines.argument_types import check_types
from diffsight.pipelines.diffusion.model import DiffusionModel
from diffsight.pipelines.diffusion.run import progress_bar
from diffsight.pipelines.language.model import LanguageModel
from diffsight.pipelines.seeds import as_seed


@dataclass(frozen=True, eq=False)
class Example:
    """A prompt in which a feature is strong.

    Attributes:
        prompt: The prompt.
        strength: The largest activation.
        activations: At each place: (tokens,), (patches,) in a vision tower, or (height, width) at the strongest step.
        tokens: The tokens, for a point in a text encoder or a language model.
        image: The drawn image, for a point in a denoiser; the image of the prompt, in a vision-language model.
        heat: The activations on the image, (rows, columns). None if there is no image, or several, or if the model's
            image tokens or patches lie on no known grid.
    """

    prompt: str
    strength: float
    activations: torch.Tensor = field(repr=False)
    tokens: tuple[str, ...] = ()
    image: Image.Image | None = field(default=None, repr=False)
    heat: torch.Tensor | None = field(default=None, repr=False)

    def shown(self) -> Image.Image:
        """Return the image with the activations as a heat map over it."""
        if self.image is None or self.heat is None:
            raise InputError("this example has no heat map, because it is not one image: print the example instead")
        heat = (self.heat / max(self.strength, 1e-12)).clamp(0, 1).numpy()
        heat = np.asarray(Image.fromarray((heat * 255).astype(np.uint8)).resize(self.image.size)) / 255
        gray = np.asarray(self.image.convert("L").convert("RGB"), dtype=float)
        color = matplotlib.colormaps["inferno"](heat)[..., :3] * 255
        mixed = gray * (1 - 0.8 * heat[..., None]) + color * 0.8 * heat[..., None]
        return Image.fromarray(mixed.round().astype(np.uint8))

    def __str__(self) -> str:
        if not self.tokens:
            return f"{self.strength:.2f}  {self.prompt}"
        values = self.activations.tolist()
        marked = (f"[{token} {value:.1f}]" if value > 0 else token for token, value in zip(self.tokens, values))
        return f"{self.strength:.2f}  {' '.join(marked)}"


@dataclass(frozen=True, eq=False)
class TopExamples(LensResult):
    """The strongest examples of features.

    `save(folder)` writes `examples.txt` and `lens.json`, `grid.png` if there are images, and `steps.png` if there are
    several denoising steps.

    Attributes:
        examples: By feature, the strongest first.
        by_step: By feature, the mean activation at each step, (steps,).
        steps: The denoising steps.
        point: The path of the module.
        model: The name of the model.
    """

    examples: Mapping[int, tuple[Example, ...]] = field(repr=False)
    by_step: Mapping[int, torch.Tensor] = field(repr=False)
    steps: tuple[int, ...]
    point: str
    model: str

    def grid(self) -> Image.Image:
        """Return the images with their heat maps: a row for each feature, and below it the images alone."""
        rows, titles, names = [], [], []
        for feature, examples in self.examples.items():
            rows += [[one.shown() for one in examples], [one.image for one in examples]]
            titles += [[f"{one.strength:.1f}" for one in examples], [one.prompt for one in examples]]
            names += [f"feature {feature}", ""]
        return image_grid(rows, titles=titles, row_titles=names, cell=128)

    def plot(self) -> Figure:
        """Plot the mean activation of each feature by denoising step."""
        curves = {f"feature {feature}": values.tolist() for feature, values in self.by_step.items()}
        return step_curves(curves, self.steps, "mean activation", self.point)

    def preview(self) -> Image.Image | None:
        return self.grid() if self._has_images else None

    def sections(self) -> list[Section]:
        found: list[Section] = [self._images()] if self._has_images else []
        if len(self.steps) > 1:
            found.append(self._curves())
        return found if self._has_images and not self._has_tokens else [*found, self._table()]

    def _images(self) -> ImageSection:
        rows = {}
        for feature, examples in self.examples.items():
            names = distinct([f"{one.prompt}, {one.strength:.1f}" for one in examples])
            rows[f"feature {feature}"] = dict(zip(names, (one.shown() for one in examples)))
            rows[f"feature {feature}, images"] = dict(zip(names, (one.image for one in examples)))
        return ImageSection("", rows)

    def _curves(self) -> CurveSection:
        curves = {f"feature {feature}": values.tolist() for feature, values in self.by_step.items()}
        return CurveSection("Steps", "step", [str(step) for step in self.steps], curves, "mean activation")

    def _table(self) -> TableSection:
        rows = {}
        for feature, examples in self.examples.items():
            most = max(max(one.strength for one in examples), 1e-12)
            rows[f"feature {feature}"] = [Cell(str(one), one.strength / most) for one in examples]
        columns = [str(place) for place in range(1, len(next(iter(rows.values()))) + 1)]
        return TableSection("", "", columns, rows, "share of the largest activation")

    def files(self) -> dict[str, Callable[[Path], None]]:
        files: dict[str, Callable[[Path], None]] = {
            "examples.txt": lambda path: path.write_text(f"{self}\n", encoding="utf-8")
        }
        if self._has_images:
            files["grid.png"] = self.grid().save
        if len(self.steps) > 1:
            files["steps.png"] = partial(write_figure, self.plot)
        return files

    def record(self) -> dict[str, Any]:
        examples = {
            str(feature): [{"prompt": one.prompt, "strength": one.strength} for one in found]
            for feature, found in self.examples.items()
        }
        return {"lens": "top_examples", "model": self.model, "point": self.point, "examples": examples}

    def __str__(self) -> str:
        lines = []
        for feature, examples in self.examples.items():
            lines += [f"feature {feature}", *(f"  {one}" for one in examples)]
        return "\n".join(lines)

    @property
    def _has_images(self) -> bool:
        return all(one.heat is not None for examples in self.examples.values() for one in examples)

    @property
    def _has_tokens(self) -> bool:
        return any(one.tokens for examples in self.examples.values() for one in examples)


@repeatable
@torch.no_grad()
def top_examples(
    model: DiffusionModel | LanguageModel,
    sae: SAE,
    prompts: Sequence[str],
    features: int | Sequence[int],
    *,
    count: int = 6,
    steps: Steps = None,
    point: str | None = None,
    batch_size: int = 16,
    seed: int = 0,
    progress: bool = True,
    **arguments: Any,
) -> TopExamples:
    """Find the prompts in which features are strongest, and where.

    Args:
        model: The model.
        sae: The SAE.
        prompts: The prompts to look at.
        features: One feature or several.
        count: How many examples to return for each feature.
        steps: The denoising steps, for a point in a denoiser. Default: all.
        point: The path of the module. Default: the point that the SAE was trained at.
        batch_size: How many prompts are run together.
        seed: Image i has `seed + i`.
        progress: Whether to show a progress bar.
        arguments: Further arguments of the model.

    Raises:
        InputError: Before anything runs, if an argument is not valid.
    """
    check_model(top_examples, model)
    check_options(top_examples, model, arguments)
    check_types(top_examples, prompts=[prompts] if isinstance(prompts, str) else prompts, point=point)
    seed = as_seed(seed)
    count = check_count("count", count)
    batch_size = check_count("batch_size", batch_size)
    point, chosen = point_of(sae, point), check_features(sae, features)
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not texts:
        raise InputError("there is no prompt: the list is empty")
    reader = PointReader(model, point, sae.of, steps, arguments)
    reader.check()
    found: dict[int, list[Example]] = {feature: [] for feature in chosen}
    sums, read = torch.zeros(0), ()
    look = _images if reader.is_in_denoiser else _tokens
    for start in tqdm(range(0, len(texts), batch_size), desc="prompts", disable=not progress):
        part = texts[start : start + batch_size]
        own = reader.of_part(start, len(part), len(texts))
        means, read, examples = look(own, sae, part, chosen, seed + start)
        sums = means if not len(sums) else sums + means
        for feature, new in zip(chosen, examples):
            found[feature] = sorted([*found[feature], *new], key=lambda one: -one.strength)[:count]
    by_step = dict(zip(chosen, (sums / len(texts)).T))
    name = model.source if isinstance(model, DiffusionModel) else model.label
    return TopExamples({f: tuple(some) for f, some in found.items()}, by_step, read, point, name)


def _images(
    reader: PointReader, sae: SAE, prompts: Sequence[str], features: tuple[int, ...], seed: int
) -> tuple[torch.Tensor, tuple[int, ...], list[list[Example]]]:
    """Return the activations summed over prompts, (steps, features), the steps, and an example for each prompt."""
    model, kept, chosen = reader.model, [], None
    with (
        progress_bar(model.pipeline, disable=True),
        model.generate(list(prompts), seed=seed, **dict(reader.arguments or {})) as run,
    ):
        for step in run.steps:
            chosen = chosen or choose_steps(reader.steps, len(run.scheduler.timesteps))
            if step.index in chosen:
                vectors = channels_last(value_at(run.cond[reader.point], sae.of))
                kept.append(sae.encode(vectors)[..., list(features)].cpu())
    maps = torch.stack(kept, 1)  # (prompts, steps, height, width, features)
    images = list(map(image_of, outputs_in(run.result, model.pipeline)))
    means = maps.mean(tuple(range(2, maps.ndim - 1))).sum(0)
    examples = []
    for i in range(len(features)):
        strongest = maps[..., i].flatten(2).amax(-1)  # (prompts, steps)
        at = strongest.argmax(1)
        heats = [own[step, ..., i] for own, step in zip(maps, at)]
        values = strongest.amax(1).tolist()
        examples.append(
            [
                Example(prompt, value, heat, image=image, heat=heat)
                for prompt, value, heat, image in zip(prompts, values, heats, images)
            ]
        )
    return means, chosen, examples


def _tokens(
    reader: PointReader, sae: SAE, prompts: Sequence[str], features: tuple[int, ...], seed: int
) -> tuple[torch.Tensor, tuple[int, ...], list[list[Example]]]:
    """Return the same as `_images` for texts, which have no steps."""
    values = reader.read(prompts, seed)
    activations = sae.encode(values.steps[0])[..., list(features)].cpu()
    seen = seen_images(reader.model, prompts, (reader.arguments or {}).get("images"))
    if values.tokens is None:
        return _patches(reader.point, activations, prompts, seen)
    mask = torch.ones_like(values.tokens, dtype=torch.bool) if values.mask is None else values.mask
    tokenizer = _tokenizer(reader)
    texts = [tuple(tokenizer.convert_ids_to_tokens(ids[keep].tolist())) for ids, keep in zip(values.tokens, mask)]
    examples: list[list[Example]] = [[] for _ in features]
    for prompt, own, keep, tokens, image in zip(prompts, activations, mask.cpu(), texts, seen):
        for i, found in enumerate(examples):
            row, heat = own[keep, i], None if image is None else own[image.places, i]
            found.append(Example(prompt, row.max().item(), row, tokens, image and image.image, heat))
    return activations.mean(1).sum(0)[None], (0,), examples


def _patches(
    point: str, activations: torch.Tensor, prompts: Sequence[str], seen: Sequence[SeenImage | None]
) -> tuple[torch.Tensor, tuple[int, ...], list[list[Example]]]:
    """Return the same as `_tokens` for the patches of one image for each prompt."""
    if activations.ndim < 3 or len(activations) != len(prompts):
        raise InputError(
            f"the vectors at {point} have the shape {tuple(activations.shape[:-1])} for {len(prompts)} prompts: pass "
            "one image for each prompt, to a model whose vision tower returns (images, patches, features)"
        )
    activations = activations.flatten(1, -2)
    examples: list[list[Example]] = [[] for _ in range(activations.shape[-1])]
    for prompt, own, image in zip(prompts, activations, seen):
        shape = None if image is None else image.places.shape
        extra = None if shape is None else len(own) - shape.numel()  # a class token precedes the patches
        for i, found in enumerate(examples):
            heat = own[extra:, i].reshape(shape) if extra in (0, 1) else None
            found.append(Example(prompt, own[:, i].max().item(), own[:, i], (), image and image.image, heat))
    return activations.mean(1).sum(0)[None], (0,), examples


def _tokenizer(reader: PointReader) -> Any:
    if isinstance(reader.model, LanguageModel):
        return reader.model.tokenizer
    name = reader.point.split(".")[0].replace("text_encoder", "tokenizer")
    return reader.model.pipeline.components[name]
