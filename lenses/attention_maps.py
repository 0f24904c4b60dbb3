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

import inspect
import math
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
from diffsight.lenses.attention.given_image import GivenImage
from diffsight.lenses.attention.image_looks import looks_at_image
from diffsight.lenses.attention.map_memory import check_memory
from diffsight.lenses.attention.map_sums import MapSums
from diffsight.lenses.attention.word_keys import WordKeys
from diffsight.lenses.denoising.call_checks import Steps, check_steps_ahead, choose_steps, count_steps
from diffsight.lenses.denoising.inverted_images import takes_inverted
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
from diffsight.pipelines.attention.attention_probabilities import AttentionProduct
from diffsight.pipelines.diffusion.attention import Attention, Attentions, find_attentions, follow_products
from diffsight.pipelines.diffusion.model import DiffusionModel
from diffsight.pipelines.diffusion.run import DiffusionRun
from diffsight.pipelines.vision_language.model import VisionLanguageModel

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
            heats, titles = list(self.maps), list(self.words)
        elif not self.parts:
            heats, titles = [self[word]], [word]
        else:
            heats = [maps[self._index(word)] for maps in self.parts.values()]
            titles = _titles(list(self.parts)) if self.kept == "layers" else list(self.parts)
        columns = min(len(heats), 8)
        lines = -(-len(heats) // columns)
        figure = Plot(figsize=(1.3 * columns + 0.2, 1.6 * lines + 0.5), layout="constrained")
        set_heading(figure, self.prompt if word is None else f"{word}: {self.prompt}")
        most = max(float(heat.max()) for heat in heats)
        panels = figure.subplots(lines, columns, squeeze=False).flatten()
        for axes in panels:
            axes.set_axis_off()
        for axes, heat, title in zip(panels, heats, titles):
            axes.imshow((heat if heat.ndim == 2 else heat.mean(0)).numpy(), cmap="inferno", vmin=0, vmax=most)
            axes.set_title(title, fontsize=7)
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


@takes_inverted
@repeatable
@where_the_model_is
def attention_maps(
    model: DiffusionModel | VisionLanguageModel,
    prompt: str,
    words: Sequence[str] | str | None = None,
    *,
    method: str = "cross",
    layers: Layers = None,
    heads: Iterable[int] | None = None,
    steps: Steps = None,
    keep: str | None = None,
    encoder: str | None = None,
    image: Any = None,
    seed: int = 0,
    **arguments: Any,
) -> AttentionMaps:
    """Draw `prompt`, and show where in the image each word is attended to.

        attention_maps(model, "a red circle above a blue square")
        attention_maps(model, "a red circle above a blue square", words=["red circle"], keep="steps")
        attention_maps(flux, "a cat on a mat", words=["animal", "floor"], method="concept")
        attention_maps(model, "a red circle", image=Image.open("scene.png"), steps=12)      # of a given image
        attention_maps(llava, "What is this?", image="cat.png", max_new_tokens=20)  # where each token looks

    Sums are kept, not maps: memory depends on neither the number of steps nor that of layers.

    With a vision-language model, text is generated, and the words are its tokens. A token is chosen at the position
    before it, so its map is the attention of that position to the tokens of the image.

    Args:
        model: The pipeline, or a vision-language model.
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
        image: Look at this image instead of drawing one: a PIL image in mode RGB, or a float tensor (3, height, width)
            from 0 to 1. At every step the denoiser is shown the image with the noise of this step, so `steps` chooses
            how noisy it is. A pipeline that takes an image itself gets it as its own argument.
        seed: The seed of the image, or of the noise that is added to it.
        inverted: What `invert` returned for an image, to apply the lens to that image. Omit the seed and the number
            of steps, see [inversion](../lenses/inversion.md).
        arguments: Arguments of the pipeline, or of `generate`.

    Returns:
        The maps and the image.

    Raises:
        InputError: Before an image is drawn: a word is not in the prompt, a layer or head does not exist, the
            pipeline has no attention between image and text, or it cannot be shown the image.
    """
    if isinstance(model, VisionLanguageModel):
        own = {"words": words, "method": method, "steps": steps, "encoder": encoder}
        return _of_generated_tokens(model, prompt, image, layers, heads, keep, seed, own, arguments)
    check_diffusion_model("attention_maps", model)
    if image is not None and "image" in model.argument_names:
        arguments, image = {**arguments, "image": image}, None
    check_options(attention_maps, model, arguments)
    check_types(attention_maps, words=words, heads=heads, encoder=encoder)
    _check("attention_maps", model, prompt, steps, seed, keep, arguments)
    if words is not None and not words:
        raise InputError("words: there are none. Write some, or omit them for all words of the prompt")
    if method not in _METHODS:
        raise InputError(f"method: there is no {method!r}{suggest(str(method), _METHODS)}, only 'cross' and 'concept'")
    given = None if image is None else GivenImage(model, image, seed, arguments)
    arguments = arguments if given is None else given.arguments
    found = find_attentions(model, prompt, **arguments)
    chosen = _chosen(found, ("cross", "joint"), layers, "attention between image and text", model)
    picked = _picked_heads(chosen, heads)
    reading = _Reading(steps, keep, chosen, given)
    if method == "concept":
        concepts = Concepts(model, prompt, words, encoder, found.of_kind("joint"), arguments)
        _check_size(model, chosen, len(concepts.names), keep, arguments)
        run = _run_concepts(model, concepts, reading, picked, seed)
        return _result(run, reading, concepts.names, prompt, seed, model, arguments, method)
    named = WordKeys(model, prompt, words, encoder, arguments)
    _check_size(model, chosen, len(named.names), keep, arguments)
    wanted = {attention.name: _Wanted(named.keys(attention), attention.keys) for attention in chosen}

    def read(attention: Attention, product: AttentionProduct) -> torch.Tensor:
        return wanted[attention.name].values(product, attention, picked, keep == "heads")

    run = _run_prompt(model, prompt, reading, read, seed, arguments)
    return _result(run, reading, named.names, prompt, seed, model, arguments, method)


def _of_generated_tokens(
    model: VisionLanguageModel,
    prompt: Any,
    image: Any,
    layers: Layers,
    heads: Iterable[int] | None,
    keep: str | None,
    seed: int,
    others: Mapping[str, Any],
    arguments: Mapping[str, Any],
) -> AttentionMaps:
    """Return where the tokens that a vision-language model generates look in its image."""
    check_options(attention_maps, model, arguments, also=model.generation_argument_names)
    check_types(attention_maps, heads=heads)
    defaults = inspect.signature(attention_maps).parameters
    for name, value in others.items():
        if value != defaults[name].default:
            raise InputError(f"{name}: a VisionLanguageModel has no such choice. The words are the tokens it generates")
    if keep not in (None, "layers", "heads"):
        raise InputError(f"keep: a VisionLanguageModel keeps 'layers' or 'heads' apart, not {keep!r}")
    if image is None or isinstance(image, (list, tuple)):
        raise InputError("image: a VisionLanguageModel needs one image")
    numbers = range(len(model.layers)) if layers is None else choose_layers(layers, len(model.layers))
    if "embedding" in numbers:
        raise InputError('layers: "embedding" is not an attention module. Write numbers')
    numbers = sorted(numbers)
    picked = None if heads is None else _checked_heads(heads, None)
    model.check(prompt, images=image, seed=seed, **arguments)
    found = looks_at_image(model, prompt, image, numbers, picked, keep, seed, arguments)
    names = [f"layers[{number}]" for number in numbers]
    parts = names if keep == "layers" else [f"head {number}" for number in picked or range(found.maps.shape[1])]
    return AttentionMaps(
        maps=found.maps.mean(1),
        words=tuple(distinct(found.words)),
        image=found.image,
        frames=(),
        prompt=prompt if isinstance(prompt, str) else str(prompt),
        seed=int(seed),
        model=model.label,
        arguments=arguments,
        method="cross",
        layers=tuple(names),
        kept=keep,
        parts=dict(zip(parts, found.maps.movedim(1, 0))) if keep else {},
    )


@takes_inverted
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
        inverted: What `invert` returned for an image, to apply the lens to that image. Omit the seed and the number
            of steps, see [inversion](../lenses/inversion.md).
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
    chosen = _chosen(found, ("self", "joint"), layers, "attention from the image to itself", model)
    picked = _picked_heads(chosen, heads)

    def read(attention: Attention, product: AttentionProduct) -> torch.Tensor:
        *frames, rows, columns = attention.grid
        place = min(int(position[1] * rows), rows - 1) * columns + min(int(position[0] * columns), columns - 1)
        place += attention.image.start + (frames[0] // 2 * rows * columns if frames else 0)
        keys = slice(attention.image_keys.start, attention.image_keys.stop)
        ((_, probs),) = product.blocks(keys, range(place, place + 1), picked)
        return probs[0]  # (heads, 1, keys)

    _check_size(model, chosen, 1, keep, arguments)
    reading = _Reading(steps, keep, chosen, None)
    run = _run_prompt(model, prompt, reading, read, seed, arguments)
    name = f"from ({position[0]:g}, {position[1]:g})"
    return _result(run, reading, (name,), prompt, seed, model, arguments, "from")


class _Wanted:
    """The keys of words in a product, and how they are averaged."""

    def __init__(self, words: list[list[int]], keys: int) -> None:
        self._average = torch.zeros(keys, len(words))
        for number, word in enumerate(words):
            self._average[word, number] = 1 / len(word)

    def values(
        self, product: AttentionProduct, attention: Attention, heads: Sequence[int] | None, by_head: bool
    ) -> torch.Tensor:
        """Return how much each word is attended to, (heads, words, positions of the image), or the mean over heads."""
        if self._average.device != product.q.device:
            self._average = self._average.to(product.q.device)
        blocks = product.blocks(slice(None), attention.image, heads)
        parts = [(probs[0] if by_head else probs[0].mean(0, keepdim=True)) @ self._average for _, probs in blocks]
        return (parts[0] if len(parts) == 1 else torch.cat(parts, 1)).transpose(1, 2)


class _Reading:
    """What is read in a run: of which image, in which steps and modules, and the sums of it."""

    def __init__(self, steps: Steps, keep: str | None, chosen: Sequence[Attention], given: GivenImage | None) -> None:
        self.keep, self.chosen, self.given, self.sums = keep, chosen, given, MapSums()
        self._asked = steps
        self._steps: tuple[int, ...] = ()

    def is_in(self, run: DiffusionRun, step: int) -> bool:
        """Return whether a step of a run is read. How many steps there are is known by then."""
        self._steps = self._steps or choose_steps(self._asked, len(run.scheduler.timesteps))
        return step in self._steps

    def show(self, run: DiffusionRun) -> None:
        """Show the given image, if there is one, in a run that has not begun."""
        if self.given is not None:
            self.given.follow(run, self.chosen[0].name.partition(".")[0])

    def stop_after(self, run: DiffusionRun, step: int) -> None:
        """End a run of a given image after the last step that is read, because what is drawn of it means nothing."""
        if self.given is not None and self.is_in(run, step) and step == self._steps[-1]:
            run.scheduler.step.input  # all calls of the denoiser have been made
            run.stop()

    def add(self, step: int, attention: Attention, values: torch.Tensor) -> None:
        """Add what was read of a product, (heads or 1, words, positions of the image)."""
        if self.keep == "heads":
            for number, part in enumerate(values):
                self.sums.add(f"head {number}", attention, part)
            return
        group = {None: "", "steps": f"step {step}", "layers": attention.name}[self.keep]
        self.sums.add(group, attention, values[0] if len(values) == 1 else values.mean(0))


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
        reading.show(run)
        follow_products(run, reading.chosen, add)
        for step in run.steps if reading.given is not None else ():
            reading.stop_after(run, step.index)
    return run


def _run_concepts(
    model: DiffusionModel, concepts: Concepts, reading: _Reading, heads: Sequence[int] | None, seed: int
) -> DiffusionRun:
    """Draw the prompt, and add the products of the outputs of image and words."""
    chosen = {attention.name for attention in reading.chosen}
    with torch.no_grad(), model.generate(**concepts.arguments, seed=[seed, seed]) as run:
        reading.show(run)
        for step in run.steps:

            def is_read(attention: Attention, index: int = step.index) -> bool:
                return attention.name in chosen and reading.is_in(run, index)

            def add(attention: Attention, values: torch.Tensor, index: int = step.index) -> None:
                values = values if heads is None else values[heads]
                values = values if reading.keep == "heads" else values.sum(0, keepdim=True)
                reading.add(index, attention, values.softmax(1) if len(concepts.names) > 1 else values)

            concepts.read(run, is_read, add)
            reading.stop_after(run, step.index)
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
    sums, keep, output = reading.sums, reading.keep, _drawn(run) if reading.given is None else reading.given.image
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


def _drawn(run: DiffusionRun) -> Any:
    """Return the image that a run has drawn, or the frames of its video."""
    return (run.frames if "frames" in run.result else run.images)[0]


def _titles(paths: Sequence[str]) -> list[str]:
    """Return the parts in which paths differ, a line each."""
    split = [path.split(".") for path in paths]
    first = next((i for i, parts in enumerate(zip(*split)) if len(set(parts)) > 1), len(split[0]))
    last = next((i for i, parts in enumerate(zip(*(reversed(own) for own in split))) if len(set(parts)) > 1), 0)
    return ["\n".join(own[first : len(own) - last] or own[-1:]) for own in split]


# ---- what was chosen


def _check(
    lens: str, model: Any, prompt: Any, steps: Steps, seed: Any, keep: Any, arguments: Mapping[str, Any]
) -> None:
    check_call(lens, model, prompt, seed, None, arguments)
    if keep is not None and keep not in _KEPT:
        raise InputError(f"keep: there is no {keep!r}{suggest(str(keep), _KEPT)}, only {', '.join(_KEPT)}")
    model.check(prompt=prompt, seed=seed, **arguments)
    check_steps_ahead(steps, model, arguments)


def _chosen(
    attentions: Attentions, kinds: tuple[str, ...], layers: Layers, what: str, model: DiffusionModel
) -> list[Attention]:
    found = attentions.of_kind(*kinds)
    placed = [attention for attention in found if attention.grid is not None and attention.unplaced is None]
    if not placed:
        unplaced = [*found, *attentions.of_kind("none")]
        reasons = f": {unplaced[0]}" if unplaced else ""
        raise InputError(f"{type(model.pipeline).__name__} has no {what} that was found{reasons}")
    numbers = range(len(placed)) if layers is None else choose_layers(layers, len(placed))
    if "embedding" in numbers:
        raise InputError('layers: "embedding" is not an attention module. Write numbers')
    return [placed[number] for number in sorted(numbers)]


def _check_size(
    model: DiffusionModel, chosen: Sequence[Attention], words: int, keep: str | None, arguments: Mapping[str, Any]
) -> None:
    """Raise InputError if what is kept is larger than memory: sums in the sizes of the modules, and the maps of each
    group in the largest."""
    positions = [math.prod(attention.grid) for attention in chosen]
    groups = {
        None: 1,
        "steps": count_steps(model, arguments) or 1,
        "layers": len(chosen),
        "heads": max(attention.heads for attention in chosen),
    }[keep]
    sums = (
        sum(positions) if keep == "layers" else groups * sum({one.grid: math.prod(one.grid) for one in chosen}.values())
    )
    what = f"maps of {words} words" + (f", {groups} {keep} apart," if keep else "")
    check_memory(
        what,
        4 * words * (sums + groups * max(positions)),
        model.device,
        "choose fewer words, or fewer of what is kept apart",
    )


def _picked_heads(chosen: Sequence[Attention], heads: Iterable[int] | None) -> list[int] | None:
    return None if heads is None else _checked_heads(heads, min(attention.heads for attention in chosen))


def _checked_heads(heads: Iterable[int], count: int | None) -> list[int]:
    """Return heads as a list. `count` is how many there are, if it is known."""
    picked = list(heads)
    for head in picked:
        if isinstance(head, bool) or not isinstance(head, int) or head < 0 or (count is not None and head >= count):
            known = "" if count is None else f". The modules have {count} heads, 0 to {count - 1}"
            raise InputError(f"heads: there is no head {head!r}{known}")
    if not picked:
        raise InputError("heads: the selection is empty")
    return picked
