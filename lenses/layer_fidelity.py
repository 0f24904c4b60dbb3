"""Fidelity by layer: what of a scene a text encoder knows at which layer, read off what the pipeline draws.

    result = layer_fidelity(DiffusionModel("diffsight/shapes-clip"), 64, num_inference_steps=20)
    print(result)                           # a table: parts by layer, and where each is right in half of the prompts
    result.plot(other)                      # beside the result of another encoder
    result.first_layers()["second object"]
    result.order                            # in how many prompts which of two objects is right first

For pipelines that draw the scenes of `pipelines/shapes`. The diffusion lens draws each caption from each layer, and the
reader turns the pictures back into scenes: the analysis of simple and compound prompts, and of the order in which
objects come, of Toker et al., "Diffusion Lens: Interpreting Text Encoders in Text-to-Image Pipelines", ACL 2024,
section 4, with a program in the place of people who look at pictures.
"""

import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from tqdm.auto import tqdm

from diffsight.errors import InputError
from diffsight.lenses.diffusion_lens import diffusion_lens
from diffsight.lenses.results import panels, plots
from diffsight.lenses.results.saving import save_files, write_record
from diffsight.pipelines.diffusion.model import DiffusionModel
from diffsight.pipelines.diffusion.prompts import check_prompts
from diffsight.pipelines.shapes.reader import read_scene
from diffsight.pipelines.shapes.scenes import Scene, sample_scene
from diffsight.pipelines.shapes.scoring import score

_OBJECTS = ("first object", "second object")
_OF_TWO = (*_OBJECTS, "colors", "relation")


@dataclass(frozen=True)
class LayerFidelity:
    """What the reader sees in the pictures of each layer: `seen[i][j]` is the scene, or None, drawn of `scenes[i]` from
    layer `layers[j]`, where 0 is the embedding. The seed of prompt i is `seed` + i; `arguments` are the lens's."""

    model: str
    encoder: str
    layers: tuple[int, ...]
    scenes: tuple[Scene, ...] = field(repr=False)
    seen: tuple[tuple[Scene | None, ...], ...] = field(repr=False)
    seed: int
    arguments: Mapping[str, Any]

    @property
    def figures(self) -> dict[str, torch.Tensor]:
        """Shares of the prompts that are right, (layers,), by what is right.

        "simple": all of a scene of one thing. "compound": all of a scene of two; and of those "first object" and
        "second object" (as the caption names them, seen anywhere in their colour and shape), "colors" (those of both,
        whichever thing has which), "relation" (shapes stand as told)."""
        one, two = (self._right(count) for count in (1, 2))
        shares = {"simple": one["scene"]} if one else {}
        if two:
            shares |= {"compound": two["scene"]} | {name: two[name] for name in _OF_TWO}
        return {name: right.double().mean(0) for name, right in shares.items()}

    def first_layers(self, share: float = 0.5) -> dict[str, int | None]:
        """The first layer at which each of the figures comes to `share`; None where it never does."""
        if not 0 < share <= 1:
            raise InputError(f"share is a share of the prompts, above 0 and up to 1, not {share!r}")
        return {name: self._first(values >= share) for name, values in self.figures.items()}

    @property
    def order(self) -> dict[str, int]:
        """Of the prompts of two things, in how many each object is the one that is right at an earlier layer: "first
        object", "second object", or both at the "same layer"; and in how many "neither" ever is."""
        counts = dict.fromkeys((*_OBJECTS, "same layer", "neither"), 0)
        two = self._right(2)
        for pair in zip(*(two[name] for name in _OBJECTS)) if two else ():
            ranks = [math.inf if layer is None else layer for layer in map(self._first, pair)]
            earlier = _OBJECTS[ranks.index(min(ranks))] if ranks[0] != ranks[1] else "same layer"
            counts["neither" if min(ranks) == math.inf else earlier] += 1
        return counts

    def plot(self, *others: "LayerFidelity") -> Figure:
        """The figures as curves, with those of `others` side by side. A ring marks the first layer at which half of the
        prompts are right."""
        results = (self, *others)
        names = [f"{result.model}, {result.encoder}" for result in results]
        if len(set(names)) < len(names):
            names = [f"{number}. {name}" for number, name in enumerate(names, 1)]
        shown = {name: (result.layers, result._curves()) for name, result in zip(names, results)}
        return panels.curve_panels(shown, "right, by layer\n(ring: first half)")

    def save(self, folder: str | Path) -> list[Path]:
        """Writes `fidelity.json` (the figures, and what was asked and seen) and `fidelity.png`; gives the paths."""
        record = {
            "lens": "layer_fidelity",
            "model": self.model,
            "encoder": self.encoder,
            "layers": list(self.layers),
            "seed": self.seed,
            "arguments": dict(self.arguments),
            "figures": {name: values.tolist() for name, values in self.figures.items()},
            "first_layers": self.first_layers(),
            "order": self.order,
            "prompts": [
                {"prompt": asked.caption(), "scene": asdict(asked), "seen": [one and one.caption() for one in seen]}
                for asked, seen in zip(self.scenes, self.seen)
            ],
        }
        draw = partial(plots.write, self.plot)
        return save_files(folder, {"fidelity.json": partial(write_record, record), "fidelity.png": draw})

    def __str__(self) -> str:
        counts = [sum(len(scene.things) == n for scene in self.scenes) for n in (1, 2)]
        lines = [f"{self.model}, {self.encoder}: {counts[0]} simple and {counts[1]} compound prompts, percent right"]
        lines.append(f"{'layer':<14}" + "".join(f"{layer:>5}" for layer in self.layers) + "   first half")
        reached = self.first_layers()
        for name, values in self.figures.items():
            at = "never" if reached[name] is None else f"layer {reached[name]}"
            lines.append(f"{name:<14}" + "".join(f"{100 * value:>5.0f}" for value in values.tolist()) + f"   {at}")
        if counts[1]:
            lines.append("right earlier: " + ", ".join(f"{name} {count}" for name, count in self.order.items()))
        return "\n".join(lines)

    def _repr_png_(self) -> bytes:
        return self.plot()._repr_png_()

    def _first(self, is_right: torch.Tensor) -> int | None:
        """The first layer at which something is right, (layers,); None where it is nowhere."""
        return min((layer for layer, right in zip(self.layers, is_right.tolist()) if right), default=None)

    def _right(self, things: int) -> dict[str, torch.Tensor]:
        """Which parts are right in the scenes of so many things, (prompts, layers), by name."""
        rows = [
            [score(asked, one) for one in seen]
            for asked, seen in zip(self.scenes, self.seen)
            if len(asked.things) == things
        ]
        names = rows[0][0] if rows else ()
        return {name: torch.tensor([[cell[name] for cell in row] for row in rows]) for name in names}

    def _curves(self) -> dict[str, panels.Curve]:
        reached, cases = self.first_layers(), {n: sum(len(s.things) == n for s in self.scenes) for n in (1, 2)}
        return {
            name: panels.Curve(values.tolist(), cases[1 if name == "simple" else 2], reached[name], name not in _OF_TWO)
            for name, values in self.figures.items()
        }


def layer_fidelity(
    model: DiffusionModel,
    scenes: int | Iterable[Scene] = 64,
    *,
    seed: int = 0,
    progress: bool = True,
    **arguments: Any,
) -> LayerFidelity:
    """Draws `scenes` from every layer of a text encoder, and reads what is right.

        layer_fidelity(model, 64, layers=range(0, 13, 2), num_inference_steps=20, guidance_scale=3.0)

    Args:
        scenes: As many prompts as this from `sample_prompts`, or scenes of your own.
        seed: Prompt i is drawn with seed + i, the same at all layers.
        arguments: Of `diffusion_lens` (`encoder`, `layers`, `batch_size` …) and of the pipeline.

    Raises InputError, before any picture is made, for what is no scene, none at all, a caption that is too long for the
    pipeline, and for what `diffusion_lens` refuses."""
    if not isinstance(model, DiffusionModel):
        raise InputError(f"layer_fidelity takes a DiffusionModel, not {type(model).__name__}")
    asked = _scenes(scenes)
    captions = [scene.caption() for scene in asked]
    check_prompts(model.pipeline, captions, arguments)
    results = []
    for i, caption in enumerate(tqdm(captions, desc="prompts", disable=not progress)):
        result = diffusion_lens(model, caption, seed=seed + i, progress=False, **arguments)
        results.append((result.encoder, result.layers, tuple(map(read_scene, result.images))))
    encoder, layers, _ = results[0]
    seen = tuple(seen for _, _, seen in results)
    return LayerFidelity(model.source, encoder, layers, asked, seen, seed, arguments)


def sample_prompts(count: int, seed: int = 0) -> tuple[Scene, ...]:
    """`count` scenes: by turns of one thing, and of two that have neither colour nor shape in common, so that each word
    of a caption tells them apart."""
    rng, found = random.Random(seed), []
    while len(found) < count:
        scene = sample_scene(rng, two=float(len(found) % 2))
        if len({t.color for t in scene.things}) == len({t.shape for t in scene.things}) == len(scene.things):
            found.append(scene)
    return tuple(found)


def _scenes(scenes: Any) -> Sequence[Scene]:
    if hasattr(scenes, "__index__") and not isinstance(scenes, bool) and scenes > 0:
        return sample_prompts(int(scenes))
    if not isinstance(scenes, Iterable) or isinstance(scenes, str):
        raise InputError(f"scenes are a number of prompts from 1 on, or scenes of your own, not {scenes!r}")
    scenes = tuple(scenes)
    wrong = next((scene for scene in scenes if not isinstance(scene, Scene)), None)
    if wrong is not None:
        raise InputError(
            f"a scene is a Scene, not {wrong!r}: from diffsight.pipelines.shapes.scenes import Scene, Thing; "
            'Scene((Thing("red", "circle"), Thing("blue", "square")), "above", "gray")'
        )
    if not scenes:
        raise InputError("there is no scene: the list is empty")
    return scenes
