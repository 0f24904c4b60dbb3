"""Attention maps: where in the image each word of the prompt is attended to.

    result = attention_maps(model, "a red circle above a blue square", words=["circle", "square"])
    result.maps, result["circle"]           # (words, rows, columns), (rows, columns)
    result.overlay("circle"), result.grid() # over the image
    result.mask("circle", 0.5)              # where it is attended to at least half as much as at its maximum

    attention_from(model, "a red circle above a blue square", position=(0.5, 0.2)).grid()   # where one place looks

The probabilities with which the positions of the image attend to the tokens of a word are averaged over heads, layers
and denoising steps, each layer brought to one size, in the conditional branch of guidance (Tang et al., "What the
DAAM: Interpreting Stable Diffusion Using Cross Attention", ACL 2023, section 3). In joint attention, the probabilities
are the block of image queries and text keys.

With `method="concept"`, words need not be in the prompt. They go through the text stream of a model with joint
attention as a prompt of their own, and attend to themselves and to the image of the prompt, which does not attend to
them. A map is the product of the attention's outputs at the positions of the image and at the word, as shares of all
words (a softmax) if there are several (Helbling et al., "ConceptAttention: Diffusion Transformers Learn Highly
Interpretable Features", ICML 2025, section 4).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from safetensors.torch import save_file

from diffsight.errors import InputError, UnknownKeyError, suggest
from diffsight.lenses.attention.concepts import Concepts
from diffsight.lenses.attention.map_sums import MapSums
from diffsight.lenses.attention.word_keys import WordKeys
from diffsight.lenses.denoising.call_checks import Steps, check_steps_ahead, choose_steps
from diffsight.lenses.encoders.checks import check_call, check_diffusion_model
from diffsight.lenses.layers import Layers, choose_layers
from diffsight.lenses.options import check_options
from diffsight.lenses.results.calls import repeatable
from diffsight.lenses.results.figure import Plot, set_heading, write_figure
from diffsight.lenses.results.image_grid import image_grid
from diffsight.lenses.results.outputs import frames_of, image_of
from diffsight.lenses.results.overlays import at_size, overlay
from diffsight.lenses.results.result import LensResult
from diffsight.lenses.results.sections import OverlaySection, Section, distinct
from diffsight.lenses.where_models_are import where_the_model_is
from diffsight.pipelines.argument_types import check_types, fits
from diffsight.pipelines.attention.attention_product import AttentionProduct
from diffsight.pipelines.diffusion.attention import Attention, find_attentions, follow_products
from diffsight.pipelines.diffusion.model import DiffusionModel
from diffsight.pipelines.diffusion.run import DiffusionRun

_KEPT = ("steps", "layers", "heads")
_METHODS = ("cross", "concept")


@dataclass(frozen=True)
class AttentionMaps(LensResult):
    """Where in an image words are attended to.

    `save(folder)` writes `image.png`, `grid.png`, an overlay for each word (`word_00.png`, …), `maps.png`,
    `maps.safetensors` and `lens.json`.

    Attributes:
        maps: (words, rows, columns); (words, frames, rows, columns) for a video.
        words: The words. For `attention_from`, the position.
        image: The image; the middle frame of a video.
        frames: The frames of a video.
        prompt: The prompt.
        seed: The seed of the image.
        model: The name of the model.
        arguments: The arguments of the pipeline.
        method: "cross", "concept" or "from".
        layers: The paths of the attention modules.
        kept: What `parts` are: "steps", "layers" or "heads". None if nothing was kept apart.
        parts: The maps of each step, layer or head, by its name.
    """

    maps: torch.Tensor = field(repr=False)
    words: tuple[str, ...]
    image: Image.Image = field(repr=False)
    frames: tuple[Image.Image, ...] = field(repr=False)
    prompt: str
    seed: int
    model: str
    arguments: Mapping[str, Any]
    method: str
    layers: tuple[str, ...] = field(repr=False)
    kept: str | None = None
    parts: Mapping[str, torch.Tensor] = field(default_factory=dict, repr=False)

    def overlay(self, word: str, frame: int | None = None) -> Image.Image:
        """Return the image under the map of a word. For a video, `frame` is one of its frames (default: the middle)."""
        heat = self[word]
        if heat.ndim == 2:
            return overlay(self.image, heat)
        number = len(self.frames) // 2 if frame is None else range(len(self.frames))[frame]
        return overlay(self.frames[number], heat[number * len(heat) // len(self.frames)])

    def grid(self) -> Image.Image:
        """Return the image and the overlays of all words in one image."""
        images = [self.image, *(self.overlay(word) for word in self.words)]
        return image_grid(images, titles=["", *self.words], title=f"{self.prompt} (seed {self.seed})")

    def plot(self, word: str | None = None) -> Figure:
        """Return the maps as a matplotlib figure: of all words, or of one, by step, layer or head if they were kept."""
        if word is None:
            rows = {"": dict(zip(self.words, self.maps))}
        elif not self.parts:
            rows = {"": {word: self[word]}}
        else:
            rows = {"": {name: maps[self._index(word)] for name, maps in self.parts.items()}}
        heats = list(rows[""].items())
        columns = min(len(heats), 8)
        lines = -(-len(heats) // columns)
        figure = Plot(figsize=(1.3 * columns + 0.2, 1.5 * lines + 0.5), layout="constrained")
        set_heading(figure, self.prompt if word is None else f"{word}: {self.prompt}")
        most = max(float(heat.max()) for _, heat in heats)
        for number, axes in enumerate(figure.subplots(lines, columns, squeeze=False).flat):
            axes.set_axis_off()
            if number < len(heats):
                name, heat = heats[number]
                axes.imshow((heat if heat.ndim == 2 else heat.mean(0)).numpy(), cmap="inferno", vmin=0, vmax=most)
                axes.set_title(name if len(name) < 24 else f"…{name[-23:]}", fontsize=7)
        return figure

    def mask(self, word: str, threshold: float = 0.5, frame: int | None = None) -> np.ndarray:
        """Return where a word's map, from 0 at its smallest to 1 at its largest value, reaches a threshold.

        Returns:
            Booleans in the size of the image, (height, width).

        Raises:
            InputError: The threshold is not between 0 and 1, or the word is not in the result.
        """
        if isinstance(threshold, bool) or not isinstance(threshold, (int, float)) or not 0 <= threshold <= 1:
            raise InputError(f"a threshold is a number between 0 and 1, not {threshold!r}")
        heat = self[word]
        if heat.ndim == 3:
            number = len(self.frames) // 2 if frame is None else range(len(self.frames))[frame]
            heat = heat[number * len(heat) // len(self.frames)]
        return (at_size(heat, self.image.size[::-1]) >= threshold).numpy()

    def __getitem__(self, word: str) -> torch.Tensor:
        """Return the map of a word, (rows, columns), or (frames, rows, columns) for a video."""
        return self.maps[self._index(word)]

    def __iter__(self) -> Iterator[str]:
        return iter(self.words)

    def __len__(self) -> int:
        return len(self.words)

    def _index(self, word: str) -> int:
        if word not in self.words:
            raise UnknownKeyError(
                f"there is no map of {word!r}{suggest(str(word), self.words)}: {', '.join(self.words)}"
            )
        return self.words.index(word)

    def preview(self) -> Image.Image:
        return self.grid()

    def sections(self) -> list[Section]:
        words = distinct(self.words)
        found: list[Section] = [self._section("Attention by word", dict(zip(words, self.maps)))]
        for number, word in enumerate(words):
            if self.parts:
                maps = {name: part[number] for name, part in self.parts.items()}
                found.append(self._section(f"“{word}” by {self.kept.removesuffix('s')}", maps))
        return found

    def _section(self, title: str, maps: Mapping[str, torch.Tensor]) -> OverlaySection:
        """Return maps on the image; of a video, those of its middle frame."""
        shown = {name: heat if heat.ndim == 2 else heat[len(heat) // 2] for name, heat in maps.items()}
        return OverlaySection(title, self.image, shown, label="attention")

    def files(self) -> dict[str, Callable[[Path], None]]:
        files: dict[str, Callable[[Path], None]] = {"image.png": self.image.save, "grid.png": self.grid().save}
        files |= {f"word_{number:02}.png": self.overlay(word).save for number, word in enumerate(self.words)}
        tensors = {"maps": self.maps.contiguous()}
        tensors |= {f"{self.kept}.{name}": maps.contiguous() for name, maps in self.parts.items()}
        return files | {
            "maps.png": partial(write_figure, self.plot),
            "maps.safetensors": partial(save_file, tensors),
        }

    def record(self) -> dict[str, Any]:
        return {
            "lens": "attention_from" if self.method == "from" else "attention_maps",
            "model": self.model,
            "prompt": self.prompt,
            "words": list(self.words),
            "method": self.method,
            "layers": list(self.layers),
            "kept": self.kept,
            "seed": self.seed,
            "arguments": dict(self.arguments),
        }


@repeatable
@where_the_model_is
def attention_maps(
    model: DiffusionModel,
    prompt: str,
    words: Sequence[str] | str | None = None,
    *,
    method: str = "cross",
    layers: Layers = None,
    heads: Iterable[int] | None = None,
    steps: Steps = None,
    keep: str | None = None,
    encoder: str | None = None,
    seed: int = 0,
    **arguments: Any,
) -> AttentionMaps:
    """Draw `prompt`, and show where in the image each word is attended to.

        attention_maps(model, "a red circle above a blue square")
        attention_maps(model, "a red circle above a blue square", words=["red circle"], keep="steps")
        attention_maps(flux, "a cat on a mat", words=["animal", "floor"], method="concept")

    Sums are kept, not maps: memory depends on neither the number of steps nor that of layers.

    Args:
        model: The pipeline.
        prompt: The prompt.
        words: The words, each of one or several words of the prompt. With "concept", any words. Default: all words of
            the prompt.
        method: "cross": probabilities in cross-attention, or of the image's queries and the text's keys in joint
            attention. "concept": products of outputs, for models with joint attention.
        layers: Which of the attention modules, numbered in the order in which they run: an integer, a slice, or a list
            of them. `model.attentions.of_kind("cross", "joint")` lists them. Default: all.
        heads: Which heads. Default: all.
        steps: Which denoising steps: an integer, a slice, or a list of them. Default: all.
        keep: Keep the maps of "steps", "layers" or "heads" apart too.
        encoder: The text encoder whose tokens count. Default: those of all.
        seed: The seed of the image.
        arguments: Arguments of the pipeline.

    Returns:
        The maps and the image.

    Raises:
        InputError: Before an image is drawn: a word is not in the prompt, a layer or head does not exist, or the
            pipeline has no attention between image and text.
    """
    check_diffusion_model("attention_maps", model)
    check_options(attention_maps, model, arguments)
    check_types(attention_maps, words=words, heads=heads, encoder=encoder)
    _check("attention_maps", model, prompt, steps, seed, keep, arguments)
    if words is not None and not words:
        raise InputError("words: there are none. Write some, or omit them for all words of the prompt")
    if method not in _METHODS:
        raise InputError(f"method: there is no {method!r}{suggest(str(method), _METHODS)}, only 'cross' and 'concept'")
    found = find_attentions(model, prompt, **arguments)
    chosen = _chosen(found.of_kind("cross", "joint"), layers, "attention between image and text", model)
    picked = _picked_heads(chosen, heads)
    reading = _Reading(steps, keep, chosen)
    if method == "concept":
        concepts = Concepts(model, prompt, words, encoder, found.of_kind("joint"), arguments)
        run = _run_concepts(model, concepts, reading, picked, seed)
        return _result(run, reading, concepts.names, prompt, seed, model, arguments, method)
    named = WordKeys(model, prompt, words, encoder, arguments)
    wanted = {attention.name: _Wanted(named.keys(attention)) for attention in chosen}

    def read(attention: Attention, product: AttentionProduct) -> torch.Tensor:
        return wanted[attention.name].values(product, attention, picked)

    run = _run_prompt(model, prompt, reading, read, seed, arguments)
    return _result(run, reading, named.names, prompt, seed, model, arguments, method)


@repeatable
@where_the_model_is
def attention_from(
    model: DiffusionModel,
    prompt: str,
    position: tuple[float, float],
    *,
    layers: Layers = None,
    heads: Iterable[int] | None = None,
    steps: Steps = None,
    keep: str | None = None,
    seed: int = 0,
    **arguments: Any,
) -> AttentionMaps:
    """Draw `prompt`, and show where in the image one of its places looks: the self-attention of that place.

        attention_from(model, "a red circle above a blue square", position=(0.5, 0.25))

    Args:
        model: The pipeline.
        prompt: The prompt.
        position: The place, (x, y), as shares of the width and the height: (0, 0) is the upper left corner, (1, 1) the
            lower right one.
        layers: Which of `model.attentions.of_kind("self", "joint")`. Default: all.
        heads: Which heads. Default: all.
        steps: Which denoising steps. Default: all.
        keep: Keep the maps of "steps", "layers" or "heads" apart too.
        seed: The seed of the image.
        arguments: Arguments of the pipeline.

    Returns:
        The map and the image.

    Raises:
        InputError: The position is not in the image, a layer or head does not exist, or the pipeline has no
            self-attention.
    """
    check_diffusion_model("attention_from", model)
    check_options(attention_from, model, arguments)
    check_types(attention_from, heads=heads)
    _check("attention_from", model, prompt, steps, seed, keep, arguments)
    if not fits(position, tuple[float, float]) or not all(0 <= share <= 1 for share in position):
        raise InputError(f"position is (x, y), shares of width and height from 0 to 1, not {position!r}")
    found = find_attentions(model, prompt, **arguments)
    chosen = _chosen(found.of_kind("self", "joint"), layers, "attention from the image to itself", model)
    picked = _picked_heads(chosen, heads)

    def read(attention: Attention, product: AttentionProduct) -> torch.Tensor:
        *frames, rows, columns = attention.grid
        place = min(int(position[1] * rows), rows - 1) * columns + min(int(position[0] * columns), columns - 1)
        place += attention.image.start + (frames[0] // 2 * rows * columns if frames else 0)
        keys = slice(attention.image_keys.start, attention.image_keys.stop)
        ((_, probs),) = product.blocks(keys, range(place, place + 1), picked)
        return probs[0]  # (heads, 1, keys)

    reading = _Reading(steps, keep, chosen)
    run = _run_prompt(model, prompt, reading, read, seed, arguments)
    name = f"from ({position[0]:g}, {position[1]:g})"
    return _result(run, reading, (name,), prompt, seed, model, arguments, "from")


class _Wanted:
    """The keys of words in a product, and how they are averaged."""

    def __init__(self, words: list[list[int]]) -> None:
        self._keys = sorted({key for word in words for key in word})
        self._average = torch.zeros(len(words), len(self._keys))
        for number, word in enumerate(words):
            self._average[number, [self._keys.index(key) for key in word]] = 1 / len(word)

    def values(self, product: AttentionProduct, attention: Attention, heads: Sequence[int] | None) -> torch.Tensor:
        """Return how much each word is attended to, (heads, words, positions of the image)."""
        parts = product.blocks(torch.tensor(self._keys, device=product.q.device), attention.image, heads)
        average = self._average.to(product.q.device)
        return torch.cat([torch.einsum("hqk,wk->hwq", probs[0], average) for _, probs in parts], -1)


class _Reading:
    """What is read in a run: in which steps and modules, and the sums of it."""

    def __init__(self, steps: Steps, keep: str | None, chosen: Sequence[Attention]) -> None:
        self.keep, self.chosen, self.sums = keep, chosen, MapSums()
        self._asked = steps
        self._steps: tuple[int, ...] = ()

    def is_in(self, run: DiffusionRun, step: int) -> bool:
        """Return whether a step of a run is read. How many steps there are is known by then."""
        self._steps = self._steps or choose_steps(self._asked, len(run.scheduler.timesteps))
        return step in self._steps

    def add(self, step: int, attention: Attention, values: torch.Tensor) -> None:
        """Add what was read of a product, (heads, words, positions of the image)."""
        if self.keep == "heads":
            for number, part in enumerate(values):
                self.sums.add(f"head {number}", attention, part)
            return
        group = {None: "", "steps": f"step {step}", "layers": attention.name}[self.keep]
        self.sums.add(group, attention, values.mean(0))


def _run_prompt(
    model: DiffusionModel,
    prompt: str,
    reading: _Reading,
    read: Callable[[Attention, AttentionProduct], torch.Tensor],
    seed: int,
    arguments: Mapping[str, Any],
) -> DiffusionRun:
    """Draw the prompt, and add what is read of every product."""

    def add(attention: Attention, step: int, product: AttentionProduct) -> None:
        if reading.is_in(run, step):
            reading.add(step, attention, read(attention, product))

    with torch.no_grad(), model.generate(prompt=prompt, seed=seed, **arguments) as run:
        follow_products(run, reading.chosen, add)
    return run


def _run_concepts(
    model: DiffusionModel, concepts: Concepts, reading: _Reading, heads: Sequence[int] | None, seed: int
) -> DiffusionRun:
    """Draw the prompt, and add the products of the outputs of image and words."""
    chosen = {attention.name for attention in reading.chosen}
    with torch.no_grad(), model.generate(**concepts.arguments, seed=[seed, seed]) as run:
        for step in run.steps:

            def is_read(attention: Attention, index: int = step.index) -> bool:
                return attention.name in chosen and reading.is_in(run, index)

            def add(attention: Attention, values: torch.Tensor, index: int = step.index) -> None:
                values = values if heads is None else values[heads]
                values = values if reading.keep == "heads" else values.sum(0, keepdim=True)
                reading.add(index, attention, values.softmax(1) if len(concepts.names) > 1 else values)

            concepts.read(run, is_read, add)
    return run


def _result(
    run: DiffusionRun,
    reading: _Reading,
    words: tuple[str, ...],
    prompt: str,
    seed: int,
    model: DiffusionModel,
    arguments: Mapping[str, Any],
    method: str,
) -> AttentionMaps:
    output, sums, keep = (run.frames if "frames" in run.result else run.images)[0], reading.sums, reading.keep
    lowest = -torch.inf if method == "concept" else 0.0  # enlarging may give probabilities below 0
    return AttentionMaps(
        maps=sums.mean().clamp_min(lowest),
        words=words,
        image=image_of(output),
        frames=() if isinstance(output, Image.Image) else tuple(frames_of(output)),
        prompt=prompt,
        seed=int(seed),
        model=model.source,
        arguments=arguments,
        method=method,
        layers=tuple(attention.name for attention in reading.chosen),
        kept=keep,
        parts={group: sums.mean(group).clamp_min(lowest) for group in sums.groups} if keep else {},
    )


# ---- what was chosen


def _check(
    lens: str, model: Any, prompt: Any, steps: Steps, seed: Any, keep: Any, arguments: Mapping[str, Any]
) -> None:
    check_call(lens, model, prompt, seed, None, arguments)
    if keep is not None and keep not in _KEPT:
        raise InputError(f"keep: there is no {keep!r}{suggest(str(keep), _KEPT)}, only {', '.join(_KEPT)}")
    model.check(prompt=prompt, seed=seed, **arguments)
    check_steps_ahead(steps, model, arguments)


def _chosen(found: Sequence[Attention], layers: Layers, what: str, model: DiffusionModel) -> list[Attention]:
    placed = [attention for attention in found if attention.grid is not None and attention.unplaced is None]
    if not placed:
        reasons = f": {found[0]}" if found else ""
        raise InputError(f"{type(model.pipeline).__name__} has no {what} that was found{reasons}")
    numbers = range(len(placed)) if layers is None else choose_layers(layers, len(placed))
    if "embedding" in numbers:
        raise InputError('layers: "embedding" is not an attention module. Write numbers')
    return [placed[number] for number in sorted(numbers)]


def _picked_heads(chosen: Sequence[Attention], heads: Iterable[int] | None) -> list[int] | None:
    if heads is None:
        return None
    picked, count = list(heads), min(attention.heads for attention in chosen)
    for head in picked:
        if isinstance(head, bool) or not isinstance(head, int) or not 0 <= head < count:
            raise InputError(f"heads: there is no head {head!r}. The modules have {count} heads, 0 to {count - 1}")
    if not picked:
        raise InputError("heads: the selection is empty")
    return picked
