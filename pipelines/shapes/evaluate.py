"""Measure how faithfully a packaged pipeline draws its captions, and how this grows over the layers of its encoder.

    python -m diffsight.pipelines.shapes.evaluate clip            # prints the tables of the model card

This uses plain diffusers and PyTorch without diffsight's engine, because the lenses are checked against these figures.
"""

import argparse
import random
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, FluxPipeline

from diffsight.pipelines.shapes.flux_defaults import CALL
from diffsight.pipelines.shapes.reader import read_scene
from diffsight.pipelines.shapes.scenes import Scene, render, sample_scene
from diffsight.pipelines.shapes.scoring import score
from diffsight.pipelines.standard_names import EMBEDDING, Layer

_PARTS = ("scene", "first object", "second object", "colors", "relation", "background")


def shares(asked: Sequence[Scene], images: Sequence) -> dict[str, float]:
    """Return the share of PIL `images` in which each part of the scenes `asked` is right, see `scoring.py`.

    All scenes have the same number of things."""
    scores = [score(scene, read_scene(image)) for scene, image in zip(asked, images, strict=True)]
    return {part: sum(right[part] for right in scores) / len(scores) for part in scores[0]}


def reader_accuracy(count: int = 500, seed: int = 500) -> float:
    """Return the share of `count` rendered scenes that the reader gets entirely right, background included."""
    rng = random.Random(seed)
    right = 0
    for _ in range(count):
        scene = sample_scene(rng, held_out=None)
        right += read_scene(render(scene, rng)) == scene.canonical()
    return right / count


def sample_scenes(count: int, seed: int, **kind) -> list[Scene]:
    """Sample `count` scenes of two things. `kind` is passed to `sample_scene` (`noun_rate`, `held_out`)."""
    rng = random.Random(seed)
    return [sample_scene(rng, two=1.0, **kind) for _ in range(count)]


@torch.no_grad()
def draw_scenes(pipe, asked: Sequence[Scene], layer: Layer | None = None, batch: int = 50, **arguments) -> list:
    """Draw the captions of the scenes `asked`, with the seeds 0, 1, 2 …

    With `layer`, draw from the output of that layer of the text encoder, through the final norm; "embedding" is the
    input of the first layer. In a FluxPipeline these are T5's layers; the pooled output of CLIP stays the same."""
    images = []
    if isinstance(pipe, FluxPipeline):
        arguments = CALL | arguments
    for start in range(0, len(asked), batch):
        captions = [scene.caption() for scene in asked[start : start + batch]]
        generators = [torch.Generator().manual_seed(start + i) for i in range(len(captions))]
        prompt = {"prompt": captions}
        if layer is not None:
            prompt = encode_at(pipe, captions, layer)
        if "true_cfg_scale" in arguments:  # it has no effect without a negative prompt
            prompt["negative_prompt"] = [""] * len(captions)
        images += pipe(**prompt, generator=generators, **arguments).images
    return images


def encode_at(pipe, captions: Sequence[str], layer: Layer) -> dict[str, torch.Tensor]:
    """Return captions as pipeline arguments, encoded up to a layer of the text encoder, see `draw_scenes`."""
    encoder, tokenizer, prompt = pipe.text_encoder, pipe.tokenizer, {}
    if isinstance(pipe, FluxPipeline):
        encoder, tokenizer = pipe.text_encoder_2, pipe.tokenizer_2
        pooled = pipe.encode_prompt(captions, None, max_sequence_length=CALL["max_sequence_length"])[1]
        prompt["pooled_prompt_embeds"] = pooled
    ids = tokenizer(captions, padding="max_length", return_tensors="pt").input_ids.to(pipe.device)
    count = encoder.config.num_hidden_layers
    index = 0 if layer == EMBEDDING else layer % count + 1  # transformers counts the embedding as state 0
    if index == count:
        return prompt | {"prompt_embeds": encoder(ids)[0]}
    norm = getattr(encoder, "final_layer_norm", None) or encoder.encoder.final_layer_norm
    return prompt | {"prompt_embeds": norm(encoder(ids, output_hidden_states=True).hidden_states[index])}


def report(pipe, layers: bool = True) -> str:
    """Return the tables of the model card, as Markdown."""
    sets = {
        "plain captions": sample_scenes(200, seed=1),
        "invented nouns": sample_scenes(200, seed=2, noun_rate=1.0),
        "pairs never seen in training": sample_scenes(200, seed=3, held_out=True),
    }
    settings = {
        "20 steps, guidance 3": dict(num_inference_steps=20, guidance_scale=3.0),
        "pipeline defaults": {},
    }
    if isinstance(pipe, FluxPipeline):
        settings = {
            "20 steps": dict(num_inference_steps=20),
            "20 steps, true guidance 2": dict(num_inference_steps=20, true_cfg_scale=2.0),
            "pipeline defaults": {},
        }
    lines = [f"Reader on 500 rendered scenes: {reader_accuracy():.1%} right.", ""]
    lines += ["| 200 images of two things | settings | " + " | ".join(_PARTS) + " |"]
    lines += ["|---" * (2 + len(_PARTS)) + "|"]
    for name, asked in sets.items():
        for setting, arguments in settings.items():
            right = shares(asked, draw_scenes(pipe, asked, **arguments))
            cells = [f"{right[part]:.1%}" for part in _PARTS]
            lines.append(f"| {name} | {setting} | " + " | ".join(cells) + " |")
    if layers:
        arguments = next(iter(settings.values()))
        encoder = pipe.text_encoder_2 if isinstance(pipe, FluxPipeline) else pipe.text_encoder
        chosen = [EMBEDDING, *range(encoder.config.num_hidden_layers)]
        lines += ["", "| layer | " + " | ".join(map(str, chosen)) + " |"]
        lines += ["|---" * (len(chosen) + 1) + "|"]
        for name in ("plain captions", "invented nouns"):
            asked = sets[name][:100]
            cells = [shares(asked, draw_scenes(pipe, asked, layer=layer, **arguments))["scene"] for layer in chosen]
            lines.append(f"| {name} | " + " | ".join(f"{c:.0%}" for c in cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", help="'clip', 't5', 'flux', or the folder of a pipeline")
    name = parser.parse_args().folder
    folder = Path(__file__).parent / name if name in ("clip", "t5", "flux") else Path(name)
    pipe = DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    print(report(pipe))


if __name__ == "__main__":
    main()
