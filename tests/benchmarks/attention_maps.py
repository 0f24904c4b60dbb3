"""How good attention maps are, where the truth is known: on scenes whose objects the image reader finds.

    python tests/benchmarks/attention_maps.py clip --prompts 100
    python tests/benchmarks/attention_maps.py flux --method concept

Each prompt names two objects. For each, the map of its two words ("red circle") is compared with the pixels of the
object. Pointing: the share of objects that the maximum of their map lies on. IoU: the mean intersection over union
with the object, at the best single threshold. Controls: the map of the other object, and the uniform map. Layers and
steps are chosen on one half of the prompts; the figures are those of the other half. Images in which the reader does
not find the two objects that were asked for are left out.
"""

import argparse
import random
import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from diffsight import DiffusionModel
from diffsight.lenses import attention_maps
from diffsight.lenses.results.overlays import at_size
from diffsight.pipelines.shapes.reader import find_things, read_scene
from diffsight.pipelines.shapes.scenes import sample_scene

STEPS = 20
THRESHOLDS = np.linspace(0.05, 0.95, 19)
ARGUMENTS = {"clip": {"guidance_scale": 3.0}, "t5": {"guidance_scale": 3.0}, "flux": {}}


class Case(NamedTuple):
    """One image: the maps by layer and by step, (groups, 2 words, rows, columns), and the pixels of the objects."""

    layers: torch.Tensor
    steps: torch.Tensor
    masks: tuple[np.ndarray, np.ndarray]


def cases(name: str, method: str, count: int) -> tuple[list[Case], list[str]]:
    """Draw prompts; return the cases, and the names of the layers."""
    model = DiffusionModel(f"diffsight/shapes-{name}")
    model.set_progress_bar_config(disable=True)
    rng, found, names = random.Random(15), [], []
    for seed in range(count):
        scene = sample_scene(rng, two=1.0)
        words = [f"{thing.color} {thing.shape}" for thing in scene.things]
        kept = []
        for keep in ("layers", "steps"):
            given = {"method": method, "keep": keep, "seed": seed, "num_inference_steps": STEPS, **ARGUMENTS[name]}
            result = attention_maps(model, scene.caption(), words, **given)
            kept.append(torch.stack(list(result.parts.values())))
            names = list(result.parts) if keep == "layers" else names
        things = {(thing.color, thing.shape): mask for thing, mask in find_things(result.image)}
        if read_scene(result.image) == scene.canonical():
            found.append(Case(*kept, tuple(things[thing.color, thing.shape] for thing in scene.things)))
    return found, names


def measure(cases: Sequence[Case], of: str, groups: Sequence[int], swap: bool = False) -> tuple[float, float]:
    """Return the pointing accuracy and the mean IoU of the mean map of some layers or steps."""
    hits, overlaps = [], []
    for case in cases:
        maps = getattr(case, of)[list(groups)].mean(0)
        for heat, mask in zip(maps.flip(0) if swap else maps, case.masks):
            heat = at_size(heat, mask.shape).numpy()
            hits.append(mask[np.unravel_index(heat.argmax(), heat.shape)])
            inside = heat >= THRESHOLDS[:, None, None]
            overlaps.append((inside & mask).sum((1, 2)) / (inside | mask).sum((1, 2)))
    return float(np.mean(hits)), float(np.mean(overlaps, 0).max())


def uniform(cases: Sequence[Case]) -> tuple[float, float]:
    """Return what the uniform map gives: its maximum is anywhere, and it covers the image."""
    shares = [mask.mean() for case in cases for mask in case.masks]
    return float(np.mean(shares)), float(np.mean(shares))


def candidates(count: int) -> dict[str, list[int]]:
    """Return sets of layers or steps to choose from."""
    third = max(1, count // 3)
    sets = {"all": [*range(count)], "first third": [*range(third)], "last third": [*range(count - third, count)]}
    sets["middle third"] = [*range(third, count - third)] or [count // 2]
    return sets | ({f"layer {i}": [i] for i in range(count)} if count < STEPS else {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pipeline", choices=[*ARGUMENTS])
    parser.add_argument("--method", default="cross")
    parser.add_argument("--prompts", type=int, default=100)
    options = parser.parse_args()
    torch.set_num_threads(1)
    start = time.perf_counter()
    found, names = cases(options.pipeline, options.method, options.prompts)
    half = len(found) // 2
    choosing, reported = found[:half], found[half:]
    print(f"shapes-{options.pipeline}, {options.method}: {len(found)} of {options.prompts} images as asked for")
    for of, count in (("layers", len(names)), ("steps", STEPS)):
        scores = {name: measure(choosing, of, groups) for name, groups in candidates(count).items()}
        best = max(scores, key=lambda name: sum(scores[name]))
        for name, (pointing, overlap) in scores.items():
            print(f"  chosen from, {of}: {name:14} pointing {pointing:.2f}, IoU {overlap:.2f}")
        for name in dict.fromkeys(("all", best)):
            pointing, overlap = measure(reported, of, candidates(count)[name])
            print(f"  {of} {name}: pointing {pointing:.2f}, IoU {overlap:.2f}")
    pointing, overlap = measure(reported, "layers", range(len(names)), swap=True)
    print(f"  the other object's map: pointing {pointing:.2f}, IoU {overlap:.2f}")
    print("  uniform map: pointing {:.2f}, IoU {:.2f}".format(*uniform(reported)))
    print(f"  {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
