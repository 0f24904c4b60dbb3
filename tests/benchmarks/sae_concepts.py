"""Which features of the packaged SAE stand for a concept: the reader's verdict on images without them.

    OMP_NUM_THREADS=1 python tests/benchmarks/sae_concepts.py

For each concept, `concept_features` ranks the features of `shapes-clip-text-encoder` on some captions. On others, the
first eight are removed, and turned around to minus two times their strength; so are eight random features of those that
are active with the concept, in three draws. The table says in what share of the images the reader of the shapes still
sees the concept, and in what share it still sees the rest of the caption.
"""

import argparse
import random

import torch

from diffsight import DiffusionModel, concept_features, feature_effect
from diffsight.lenses import SAE
from diffsight.lenses.features.activation_stream import PointReader
from diffsight.pipelines.shapes.reader import read_scene
from diffsight.pipelines.shapes.scenes import Scene, Thing
from diffsight.pipelines.shapes.scoring import score

COLORS = ("red", "green", "blue", "yellow", "purple", "white")
SHAPES = ("circle", "square", "triangle", "ring")
RELATIONS = {"above": "below", "left of": "right of"}
COUNT, DRAWS, AMOUNTS = 8, 3, (0.0, -2.0)
DRAWING = {"num_inference_steps": 10, "guidance_scale": 3.0}


def scenes(rng: random.Random, concept: str, count: int) -> list[Scene]:
    """Return scenes of two things, the first of which shows the concept alone."""
    found = []
    for _ in range(count):
        colors = rng.sample([one for one in COLORS if one != concept], 2)
        shapes = rng.sample([one for one in SHAPES if one != concept], 2)
        colors[0] = concept if concept in COLORS else colors[0]
        shapes[0] = concept if concept in SHAPES else shapes[0]
        relation = concept if concept in RELATIONS else rng.choice(["above", "below", "left of", "right of"])
        found.append(Scene(tuple(map(Thing, colors, shapes)), relation, rng.choice(["gray", "black"])))
    return found


def without(rng: random.Random, scene: Scene, concept: str) -> Scene:
    """Return the same scene with something else in place of the concept."""
    first, second = scene.things
    if concept in RELATIONS:
        return Scene(scene.things, RELATIONS[concept], scene.background)
    if concept in COLORS:
        other = rng.choice([one for one in COLORS if one not in (first.color, second.color)])
        return Scene((Thing(other, first.shape), second), scene.relation, scene.background)
    other = rng.choice([one for one in SHAPES if one not in (first.shape, second.shape)])
    return Scene((Thing(first.color, other), second), scene.relation, scene.background)


def verdict(scene: Scene, image, concept: str) -> tuple[bool, bool]:
    """Return whether the reader sees the concept, and all of the caption but the concept."""
    seen = read_scene(image)
    if seen is None:
        return False, False
    if concept in RELATIONS:
        rest = {(one.color, one.shape) for one in seen.things} == {(one.color, one.shape) for one in scene.things}
        return score(scene, seen)["relation"], rest
    value = [getattr(one, "color" if concept in COLORS else "shape") for one in seen.things]
    second = scene.things[1]
    return concept in value, (second.color, second.shape) in {(one.color, one.shape) for one in seen.things}


@torch.no_grad()
def active(model: DiffusionModel, sae: SAE, captions: list[str]) -> list[int]:
    """Return the features that are active with some captions."""
    vectors = PointReader(model, sae.point).read(captions).vectors()
    return (sae.encode(vectors) > 0).any(0).nonzero().flatten().tolist()


def shares(model: DiffusionModel, sae: SAE, concept: str, tested: list[Scene], features: list[int]) -> torch.Tensor:
    """Return the shares of images with the concept and with the rest, (unchanged and amounts, 2)."""
    counts = torch.zeros(len(AMOUNTS) + 1, 2)
    for seed, scene in enumerate(tested):
        result = feature_effect(
            model, sae, scene.caption(), features, amounts=AMOUNTS, seed=seed, progress=False, **DRAWING
        )
        counts += torch.tensor([verdict(scene, image, concept) for image in result.images])
    return counts / len(tested)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=12)
    parser.add_argument("--sae", default="diffsight/shapes-clip-text-encoder")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model, sae = DiffusionModel("diffsight/shapes-clip", dispatch=True), SAE.load(arguments.sae)
    print("| concept | features | unchanged | removed | random | times -2 | random | rest, times -2 | rest, random |")
    for concept in (*COLORS, *SHAPES, *RELATIONS):
        rng = random.Random(concept)
        ranking = scenes(rng, concept, 16)
        others = [without(rng, scene, concept) for scene in ranking]
        captions = [scene.caption() for scene in ranking]
        ranked = concept_features(model, sae, captions, [scene.caption() for scene in others])
        chosen, tested = ranked.topk(COUNT).indices.tolist(), scenes(rng, concept, arguments.images)
        own = shares(model, sae, concept, tested, chosen)
        pool = [one for one in active(model, sae, captions) if one not in chosen]
        drawn = [shares(model, sae, concept, tested, rng.sample(pool, COUNT)) for _ in range(DRAWS)]
        control = torch.stack(drawn).mean(0)
        cells = [own[0, 0], own[1, 0], control[1, 0], own[2, 0], control[2, 0], own[2, 1], control[2, 1]]
        shown = " | ".join(f"{one:.2f}" for one in cells)
        print(f"| {concept} | {', '.join(map(str, chosen[:3]))} | {shown} |", flush=True)


if __name__ == "__main__":
    main()
