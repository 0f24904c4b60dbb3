"""Make the images of the README and of the documentation: all of them, or those named.

    python docs/make_images.py
    python docs/make_images.py lens-grid cka

They are drawn from the packaged pipelines, in about a quarter of an hour on one processor core. Those of SmolLM2 need
the extra `smollm2`, and are left as they are without it.
"""

import argparse
import random
from collections.abc import Callable
from functools import cache
from pathlib import Path

import diffusers
import transformers
from matplotlib.figure import Figure
from PIL import Image

from diffsight import (
    DiffusionModel,
    LanguageModel,
    activation_patching,
    attention_maps,
    attribution_patching,
    compare_encoders,
    concept_features,
    diffusion_lens,
    encoder_patching,
    feature_effect,
    image_grid,
    invert,
    layer_fidelity,
    logit_lens,
    prompt_swap,
    run_prompts,
    steering_sweep,
    steering_vector,
    top_examples,
    trajectory_lens,
)
from diffsight.errors import InputError
from diffsight.lenses import SAE, Prompt, SiteEffects, logit_difference, shapes_verdict
from diffsight.lenses.features.train_shapes import captions
from diffsight.lenses.layer_fidelity import sample_prompts
from diffsight.pipelines.shapes.scenes import Scene, Thing, render

FOLDER = Path(__file__).parent / "images"
SCENE = "a red circle below a blue square on a gray background"
FACT = "The Eiffel Tower is in the city of"
DRAWING = {"num_inference_steps": 20, "guidance_scale": 3.0, "progress": False}


@cache
def shapes(name: str) -> DiffusionModel:
    model = DiffusionModel(f"diffsight/shapes-{name}")
    model.set_progress_bar_config(disable=True)
    return model


@cache
def smollm2() -> LanguageModel:
    return LanguageModel("diffsight/smollm2")


def packaged() -> Image.Image:
    rows = [shapes(name).generate(SCENE, num_images_per_prompt=4, seed=0).images for name in ("clip", "t5")]
    titles = [f"seed {seed}" for seed in range(4)]
    return image_grid(rows, row_titles=["shapes-clip", "shapes-t5"], column_titles=titles, title=SCENE, cell=128)


def attention() -> Image.Image:
    prompt, words = "a red circle above a blue square on a gray background", ["circle", "square", "gray background"]
    return attention_maps(shapes("clip"), prompt, words, seed=1).grid()


def lens_grid() -> Image.Image:
    return diffusion_lens(shapes("clip"), SCENE, seed=0, progress=False).grid()


def trajectory() -> Image.Image:
    show = ["noisy", "prediction", "cond", "uncond", "guidance", "guidance map"]
    return trajectory_lens(shapes("clip"), SCENE, steps=slice(None, None, 3), show=show, seed=0, **DRAWING).grid()


def block_exits() -> Image.Image:
    steps = {"steps": slice(None, None, 4), "num_inference_steps": 20}
    return trajectory_lens(shapes("flux"), SCENE, exits="blocks", seed=0, progress=False, **steps).grid()


def inverted() -> Image.Image:
    scene = Scene((Thing("red", "circle"), Thing("blue", "square")), "below", "gray")
    image = render(scene, random.Random(0))
    return invert(shapes("clip"), image, SCENE, num_inference_steps=20, fixed_point=3, progress=False).grid()


def captions_of(relation: str) -> list[str]:
    pairs = [("red circle", "blue square"), ("green ring", "white triangle"), ("blue circle", "red ring")]
    pairs.append(("white square", "green circle"))
    return [f"a {a} {relation} a {b} on a {c} background" for a, b in pairs for c in ("gray", "black")]


def effect() -> Image.Image:
    sae = SAE.load("diffsight/shapes-clip-text-encoder")
    features = concept_features(shapes("clip"), sae, captions_of("above"), captions_of("below")).topk(8).indices
    return feature_effect(
        shapes("clip"),
        sae,
        captions_of("above")[0],
        features.tolist(),
        amounts=[0.5, 0],
        seed=0,
        **DRAWING | {"num_inference_steps": 10},
    ).grid()


def top_features() -> Image.Image:
    sae, texts = SAE.load("diffsight/shapes-clip-unet"), captions(24, seed=5)
    return top_examples(shapes("clip"), sae, texts, [643, 867, 269, 880], count=5, **DRAWING).grid()


def patching() -> Image.Image:
    source = "a red circle above a blue square on a gray background"
    target = "a green ring above a blue square on a gray background"
    words, layers = ["red", "circle", "above", "blue", "square"], ["embedding", 0, 1, 5, 11]
    return encoder_patching(shapes("clip"), source, target, words=words, layers=layers, **DRAWING).grid()


def fidelity() -> Figure:
    clip, t5 = (layer_fidelity(shapes(name), 64, **DRAWING) for name in ("clip", "t5"))
    return clip.plot(t5)


def cka() -> Figure:
    captions = [scene.caption() for scene in sample_prompts(128, seed=1)]
    models = {"CLIP": shapes("clip"), "T5": shapes("t5")}
    return compare_encoders(models, dict.fromkeys(captions), images=0, progress=False).plot()


def steering() -> Image.Image:
    settings = {"num_inference_steps": 20, "progress": False}
    red, others = ["circle", "square", "triangle"], ["a blue circle", "a green square", "a blue triangle"]
    vectors = steering_vector(
        shapes("clip"), [f"a red {shape}" for shape in red], others, layers="unet.**.attn2", **settings
    )
    prompts = ["a blue circle", "a green square above a blue circle"]
    return steering_sweep(
        shapes("clip"), prompts, vector=vectors, factors=[0, 1, 2, 4, 8], keep_norm=True, **settings
    ).grid()


def swapped() -> Image.Image:
    prompts = [f"a {color} circle above a blue square" for color in ("red", "green")]
    settings = {"num_inference_steps": 20, "progress": False}
    return prompt_swap(shapes("clip"), *prompts, shapes_verdict("green circle"), window=3, **settings).grid()


def logits() -> Figure:
    return logit_lens(smollm2(), FACT, progress=False).plot()


def targets() -> Figure:
    words = {"right": "Paris", "traps": ["London", "Madrid"], "long": "the country of France"}
    prompt = Prompt.from_strings("The capital of France (not England or Spain) is", words, smollm2())
    return run_prompts(smollm2(), prompt, lens=logit_lens, progress=False).plot()


CAPITALS = "The capital of France is the city of", "The capital of Italy is the city of"


@cache
def heads(lens: Callable[..., SiteEffects]) -> SiteEffects:
    return lens(smollm2(), *CAPITALS, logit_difference(" Paris", " Rome"), sites="heads", progress=False)


def patched_heads() -> Figure:
    return heads(activation_patching).plot()


def estimated_heads() -> Figure:
    return heads(attribution_patching).compare(heads(activation_patching)).plot()


IMAGES: dict[str, Callable[[], Image.Image | Figure]] = {
    "packaged": packaged,
    "attention-maps": attention,
    "lens-grid": lens_grid,
    "trajectory": trajectory,
    "block-exits": block_exits,
    "inverted": inverted,
    "feature-effect": effect,
    "top-features": top_features,
    "encoder-patching": patching,
    "layer-fidelity": fidelity,
    "cka": cka,
    "steering-sweep": steering,
    "prompt-swap": swapped,
    "logit-lens": logits,
    "target-probabilities": targets,
    "activation-patching": patched_heads,
    "attribution-patching": estimated_heads,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(IMAGES)} (default: all)")
    names = parser.parse_args().names or list(IMAGES)
    if unknown := set(names) - set(IMAGES):
        parser.error(f"no image is called {', '.join(sorted(unknown))}; there are {', '.join(IMAGES)}")
    for library in (diffusers, transformers):
        library.logging.set_verbosity_error()
        library.logging.disable_progress_bar()
    for name in names:
        try:
            made = IMAGES[name]()
        except InputError as error:
            print(f"{name}: left as it is: {error}")
            continue
        path = FOLDER / f"{name}.png"
        made.savefig(path, dpi=110) if isinstance(made, Figure) else made.save(path, optimize=True)
        print(path)


if __name__ == "__main__":
    main()
