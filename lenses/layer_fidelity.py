"""Fidelity by layer: what a text encoder knows about a scene at each layer, read from the images of the pipeline.

    result = layer_fidelity(DiffusionModel("diffsight/shapes-clip"), 64, num_inference_steps=20)
    print(result)                           # a table: shares by layer, and where they reach one half
    result.plot(other)                      # beside the result of another encoder
    result.first_layers()["second object"]
    result.order                            # which of two objects is right first, in how many prompts

It works with pipelines that draw the scenes of `pipelines/shapes`. The diffusion lens draws each caption from each
layer, and the reader of the shapes turns the images back into scenes. This is the analysis of simple and compound
prompts, and of the order of objects, in Toker et al., "Diffusion Lens: Interpreting Text Encoders in Text-to-Image
Pipelines", ACL 2024, section 4, with a program in place of human judges.
"""

import inspect
import math
import random
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, ClassVar

import torch
from matplotlib.figure import Figure
from tqdm.auto import tqdm

from diffsight.errors import InputError
from diffsight.lenses.diffusion_lens import diffusion_lens
from diffsight.lenses.encoders.checks import check_call, check_pooled
from diffsight.lenses.encoders.drawing import BatchMismatchError, for_each_row
from diffsight.lenses.encoders.layer_drawing import LayerReading, draw_layers, read_layers
from diffsight.lenses.layers import Layer, layer_title, state_of
from diffsight.lenses.options import check_kind, check_options
from diffsight.lenses.results.calls import repeatable
from diffsight.lenses.results.encoder_plots import Curve, curve_panels
from diffsight.lenses.results.figure import write_figure
from diffsight.lenses.results.outputs import image_of
from diffsight.lenses.results.result import LensResult
from diffsight.lenses.results.sections import Cell, CurveSection, Section, TableSection
from diffsight.lenses.where_models_are import where_the_model_is
from diffsight.pipelines.diffusion.model import DiffusionModel
from diffsight.pipelines.diffusion.prompts import PromptWarning
from diffsight.pipelines.diffusion.run import is_silenced
from diffsight.pipelines.numbers import as_integer
from diffsight.pipelines.seeds import as_seed
from diffsight.pipelines.shapes.reader import read_scene
from diffsight.pipelines.shapes.scenes import Scene, sample_scene
from diffsight.pipelines.shapes.scoring import score

_OBJECTS = ("first object", "second object")
_OF_TWO = (*_OBJECTS, "colors", "relation")
_OPTIONS = ("encoder", "layers", "isolate", "norm", "pooled")  # options of the diffusion lens
_ROWS = 48


@dataclass(frozen=True, eq=False)
class LayerFidelity(LensResult):
    """What the reader sees in the images of each layer.

    `save(folder)` writes `fidelity.json` (the shares, the scenes and what was seen) and `fidelity.png`.

    Attributes:
        model: The name of the model.
        encoder: The name of the text encoder.
        layers: Non-negative integers, and "embedding" for the input of the first layer.
        scenes: The scenes whose captions were drawn.
        seen: `seen[i][j]` is the scene that was drawn for `scenes[i]` from layer `layers[j]`, or None if the image
            shows no scene.
        seed: Prompt i was drawn with `seed + i`.
        arguments: The arguments of the diffusion lens.
    """

    model: str
    encoder: str
    layers: tuple[Layer, ...]
    scenes: tuple[Scene, ...] = field(repr=False)
    seen: tuple[tuple[Scene | None, ...], ...] = field(repr=False)
    seed: int
    arguments: Mapping[str, Any]
    record_file: ClassVar[str] = "fidelity.json"

    @property
    def shares(self) -> dict[str, torch.Tensor]:
        """The share of prompts that meet each criterion, (layers,), by the name of the criterion.

        "simple": everything is right, in scenes with one object. "compound": everything is right, in scenes with two
        objects. Scenes with two objects also have "first object" and "second object" (in the order of the caption,
        anywhere in the image with the right colour and shape), "colors" (both colours, on any object), and "relation"
        (the shapes are placed as the caption says).
        """
        one, two = (self._right(count) for count in (1, 2))
        right = {"simple": one["scene"]} if one else {}
        if two:
            right |= {"compound": two["scene"]} | {name: two[name] for name in _OF_TWO}
        return {name: values.double().mean(0) for name, values in right.items()}

    def first_layers(self, share: float = 0.5) -> dict[str, Layer | None]:
        """Return by name the first layer at which each of the `shares` reaches `share`, or None if it never does."""
        if not 0 < share <= 1:
            raise InputError(f"share must be a share of the prompts, above 0 and up to 1, not {share!r}")
        return {name: self._first(values >= share) for name, values in self.shares.items()}

    @property
    def order(self) -> dict[str, int]:
        """For prompts with two objects: how often each object is right at an earlier layer than the other.

        The keys are "first object", "second object", "same layer", and "neither" if neither object is ever right.
        """
        counts = dict.fromkeys((*_OBJECTS, "same layer", "neither"), 0)
        two = self._right(2)
        for pair in zip(*(two[name] for name in _OBJECTS)) if two else ():
            ranks = [math.inf if layer is None else state_of(layer) for layer in map(self._first, pair)]
            earlier = _OBJECTS[ranks.index(min(ranks))] if ranks[0] != ranks[1] else "same layer"
            counts["neither" if min(ranks) == math.inf else earlier] += 1
        return counts

    def plot(self, *others: "LayerFidelity") -> Figure:
        """Plot the shares as curves, side by side with those of `others`.

        A ring marks the first layer at which half of the prompts are right."""
        results = (self, *others)
        names = [f"{result.model}, {result.encoder}" for result in results]
        if len(set(names)) < len(names):
            names = [f"{number}. {name}" for number, name in enumerate(names, 1)]
        shown = {name: (result.layers, result._curves()) for name, result in zip(names, results)}
        return curve_panels(shown, "right, by layer\n(ring: first half)")

    def preview(self) -> Figure:
        return self.plot()

    def sections(self) -> list[Section]:
        places, lines = [str(one) for one in self.layers], {n: v.tolist() for n, v in self.shares.items()}
        seen = {
            f"{i}. {asked.caption()}": [Cell(one.caption() if one else "no scene", _share(asked, one)) for one in row]
            for i, (asked, row) in enumerate(zip(self.scenes, self.seen))
        }
        return [
            CurveSection("Prompts for which it is right", "layer", places, lines, "share of prompts"),
            TableSection(
                "What was drawn, by prompt and layer", "prompt", places, seen, "share of parts that are right"
            ),
        ]

    def files(self) -> dict[str, Callable[[Path], None]]:
        return {"fidelity.png": partial(write_figure, self.plot)}

    def record(self) -> dict[str, Any]:
        return {
            "lens": "layer_fidelity",
            "model": self.model,
            "encoder": self.encoder,
            "layers": list(self.layers),
            "seed": self.seed,
            "arguments": dict(self.arguments),
            "shares": {name: values.tolist() for name, values in self.shares.items()},
            "first_layers": self.first_layers(),
            "order": self.order,
            "prompts": [
                {"prompt": asked.caption(), "scene": asdict(asked), "seen": [one and one.caption() for one in seen]}
                for asked, seen in zip(self.scenes, self.seen)
            ],
        }

    def __str__(self) -> str:
        counts = [sum(len(scene.things) == n for scene in self.scenes) for n in (1, 2)]
        widths = [max(5, len(str(layer)) + 2) for layer in self.layers]
        lines = [f"{self.model}, {self.encoder}: {counts[0]} simple and {counts[1]} compound prompts, percent right"]
        names = (f"{layer:>{width}}" for layer, width in zip(self.layers, widths))
        lines.append(f"{'layer':<14}" + "".join(names) + "   first half")
        reached = self.first_layers()
        for name, values in self.shares.items():
            at = "never" if reached[name] is None else layer_title(reached[name])
            cells = (f"{100 * value:>{width}.0f}" for value, width in zip(values.tolist(), widths))
            lines.append(f"{name:<14}" + "".join(cells) + f"   {at}")
        if counts[1]:
            lines.append("right earlier: " + ", ".join(f"{name} {count}" for name, count in self.order.items()))
        return "\n".join(lines)

    def _first(self, is_right: torch.Tensor) -> Layer | None:
        """Return the first layer at which `is_right`, (layers,), is true, or None."""
        right = (layer for layer, is_right_there in zip(self.layers, is_right.tolist()) if is_right_there)
        return min(right, key=state_of, default=None)

    def _right(self, objects: int) -> dict[str, torch.Tensor]:
        """Return by name which parts are right in the scenes with that many objects, (prompts, layers)."""
        rows = [
            [score(asked, one) for one in seen]
            for asked, seen in zip(self.scenes, self.seen)
            if len(asked.things) == objects
        ]
        names = rows[0][0] if rows else ()
        return {name: torch.tensor([[cell[name] for cell in row] for row in rows]) for name in names}

    def _curves(self) -> dict[str, Curve]:
        reached, cases = self.first_layers(), {n: sum(len(s.things) == n for s in self.scenes) for n in (1, 2)}
        return {
            name: Curve(values.tolist(), cases[1 if name == "simple" else 2], reached[name], name not in _OF_TWO)
            for name, values in self.shares.items()
        }


@repeatable
@where_the_model_is
def layer_fidelity(
    model: DiffusionModel,
    scenes: int | Iterable[Scene] = 64,
    *,
    batch_size: int | None = None,
    seed: int = 0,
    progress: bool = True,
    **arguments: Any,
) -> LayerFidelity:
    """Draw scenes from every layer of a text encoder, and read what is right in the images.

        layer_fidelity(model, 64, layers=["embedding", *range(0, 12, 2)], num_inference_steps=20, guidance_scale=3.0)

    Args:
        model: A pipeline that draws the scenes of `pipelines/shapes`.
        scenes: The number of scenes to take from `sample_prompts`, or scenes of your own.
        batch_size: The number of rows in a call. Each layer of each prompt is a row, and several prompts share a call.
            An image equals the same image drawn alone up to rounding, and bit for bit only with 1. Default: 48.
        seed: Prompt i is drawn with `seed + i`, which is the same at all layers.
        progress: Whether to show a progress bar.
        arguments: Arguments of `diffusion_lens` (`encoder`, `layers` …) and of the pipeline.

    Returns:
        What the reader sees in the image of each scene and layer.

    Raises:
        InputError: Before anything is drawn, if there is no scene, one is not a Scene or has a caption that is too
            long, and in all cases in which `diffusion_lens` raises it.
    """
    check_kind("layer_fidelity", model, DiffusionModel)
    check_options(layer_fidelity, model, arguments, also=inspect.signature(diffusion_lens).parameters)
    seed = as_seed(seed)
    asked = _scenes(scenes)
    captions = [scene.caption() for scene in asked]
    options = {name: value for name, value in arguments.items() if name in _OPTIONS}
    given = {name: value for name, value in arguments.items() if name not in _OPTIONS}
    pooled = options.pop("pooled", "layer")
    check_call("layer_fidelity", model, captions[0], seed, batch_size, given)
    check_pooled(pooled)
    model.check(prompt=captions, seed=seed, **for_each_row(given, len(captions)))  # warns once
    seen: list[tuple[Scene | None, ...]] = []
    is_quiet = not progress or is_silenced(model.pipeline)
    with warnings.catch_warnings(), tqdm(total=len(captions), desc="prompts", disable=is_quiet) as shown:
        warnings.simplefilter("ignore", PromptWarning)
        first = read_layers(model, captions[0], seed, given, **options)
        later = (read_layers(model, captions[i], seed + i, given, **options, like=first) for i in range(1, len(asked)))
        readings, rows = chain([first], later), batch_size or _ROWS
        while group := list(islice(readings, max(1, rows // len(first.layers)))):  # the prompts that share a call
            for outputs in _draw(group, pooled, rows):
                seen.append(tuple(read_scene(image_of(output)) for output in outputs))
                shown.update()
    return LayerFidelity(model.source, first.encoder.name, first.layers, asked, tuple(seen), seed, arguments)


def _draw(group: Sequence[LayerReading], pooled: str, rows: int) -> list[tuple[Any, ...]]:
    """Return the outputs for each prompt, all drawn in one call if possible."""
    try:
        return draw_layers(group, pooled, rows)
    except BatchMismatchError:
        return [draw_layers([reading], pooled, rows)[0] for reading in group]


def sample_prompts(count: int, seed: int = 0) -> tuple[Scene, ...]:
    """Return `count` scenes, alternately with one object and with two that differ in colour and in shape.

    So each word of a caption tells the objects apart."""
    rng, found = random.Random(seed), []
    while len(found) < count:
        scene = sample_scene(rng, two=float(len(found) % 2))
        if len({t.color for t in scene.things}) == len({t.shape for t in scene.things}) == len(scene.things):
            found.append(scene)
    return tuple(found)


def _share(asked: Scene, seen: Scene | None) -> float:
    """Return the share of the parts of a scene that are right."""
    right = score(asked, seen)
    return sum(map(bool, right.values())) / len(right)


def _scenes(scenes: Any) -> Sequence[Scene]:
    count = as_integer(scenes)
    if count is not None and count > 0:
        return sample_prompts(count)
    if not isinstance(scenes, Iterable) or isinstance(scenes, str):
        raise InputError(f"scenes must be a number of prompts, 1 or more, or a list of Scenes, not {scenes!r}")
    scenes = tuple(scenes)
    wrong = [scene for scene in scenes if not isinstance(scene, Scene)]
    if wrong:
        raise InputError(
            f"a scene must be a Scene, not {wrong[0]!r}. Example: "
            "from diffsight.pipelines.shapes.scenes import Scene, Thing; "
            'Scene((Thing("red", "circle"), Thing("blue", "square")), "above", "gray")'
        )
    if not scenes:
        raise InputError("there is no scene: the list is empty")
    return scenes
