"""The lenses on text encoders against the same work by hand.

    python tests/benchmarks/text_encoders.py                    # --steps 20 for longer drawings
    python tests/benchmarks/text_encoders.py --tasks compare_encoders

By hand means plain PyTorch that computes what cannot be avoided, in batches of the same size: each prompt goes through
each text encoder once, and the pipeline draws all rows in as few calls as the lens. The results are compared. It runs
on the packaged pipelines, on one thread, interleaved; see README.md for how to read the figures.
"""

import argparse
import warnings
from collections.abc import Callable, Iterable
from functools import cache, partial
from typing import Any

import diffusers
import numpy as np
import torch
from measuring import interleaved
from PIL import Image
from torch.nn import functional

from diffsight import DiffusionModel, compare_encoders, diffusion_lens, encoder_patching
from diffsight.lenses.layer_fidelity import layer_fidelity, sample_prompts
from diffsight.pipelines.diffusion.encoder_calls import hidden_in
from diffsight.pipelines.shapes.reader import read_scene

FEW, MANY, BATCH, SCENES, ROWS = 128, 512, 128, 6, 39
SOURCE, TARGET = "a red circle above a green square", "a blue square above a green circle"
WORDS, INTO = ("red", "circle"), ("blue", "square")
SETTINGS = {"num_inference_steps": 4, "guidance_scale": 3.0}
Way = Callable[[], Any]


def captions(count: int) -> list[str]:
    """Return different prompts."""
    return list(dict.fromkeys(scene.caption() for scene in sample_prompts(4 * count)))[:count]


# ---- compare_encoders


def compared(count: int) -> tuple[dict[str, Way], Callable[[Any, Any], float]]:
    models = {"CLIP": DiffusionModel("diffsight/shapes-clip"), "T5": DiffusionModel("diffsight/shapes-t5")}
    prompts = captions(count)

    @torch.no_grad()
    def by_hand() -> dict[str, tuple[torch.Tensor, list[torch.Tensor], list[list[str]]]]:
        return {name: _encoded(model.pipeline, prompts) for name, model in models.items()}

    def distance(result: Any, hand: Any) -> float:
        for name, (_, _, words) in hand.items():
            assert [list(own) for own in result[name].words] == words
        apart = [(result[name].vectors - vectors).abs().max().item() for name, (vectors, _, _) in hand.items()]
        for name, (_, drifts, _) in hand.items():
            apart += [(a - b).abs().max().item() for a, b in zip(result[name].drifts, drifts, strict=True)]
        return max(apart)

    compare_encoders(models, prompts[:2], images=1, progress=False)  # runs to the end once, as it does by default
    lens = lambda: compare_encoders(models, prompts, images=0, progress=False)  # noqa: E731
    return {"bare": by_hand, "diffsight": lens}, distance


def _encoded(
    pipeline: diffusers.DiffusionPipeline, prompts: list[str]
) -> tuple[torch.Tensor, list[torch.Tensor], list[list[str]]]:
    """Return the mean hidden states of the prompts' own tokens, the drifts of these tokens, and the tokens as text."""
    tokenizer, encoder = pipeline.tokenizer, pipeline.text_encoder
    layers = encoder.encoder.block if hasattr(encoder, "shared") else encoder.encoder.layers
    spell = cache(lambda token: tokenizer.decode([token]))
    taken, means, drifts, words = [], [], [], []
    handles = [layers[0].register_forward_pre_hook(lambda module, args: taken.append(args[0]))]
    handles += [layer.register_forward_hook(lambda module, args, out: taken.append(hidden_in(out))) for layer in layers]
    for start in range(0, len(prompts), BATCH):
        some = prompts[start : start + BATCH]
        ids = tokenizer(some, padding="max_length", return_tensors="pt").input_ids
        own = tokenizer(some, add_special_tokens=False).input_ids
        first, lengths = 0 if ids[0, 0] == own[0][0] else 1, list(map(len, own))
        encoder(ids)
        places = torch.arange(ids.shape[1]) - first
        is_own = (places >= 0) & (places < torch.tensor(lengths)[:, None])
        states = torch.stack([state[is_own] for state in taken])  # (layers, own tokens of all prompts, features)
        taken.clear()
        ends = torch.stack([functional.cosine_similarity(states, states[end], dim=-1) for end in (0, -1)])
        means += [part.mean(1) for part in states.split(lengths, 1)]
        drifts += ends.split(lengths, 2)
        words += [list(map(spell, tokens)) for tokens in own]
    for handle in handles:
        handle.remove()
    return torch.stack(means, 1), drifts, words


# ---- diffusion_lens and layer_fidelity


def one_prompt() -> tuple[dict[str, Way], Callable[[Any, Any], float]]:
    model = _opened()
    by_hand = _drawn_from_layers(model.pipeline, [SOURCE])
    lens = lambda: diffusion_lens(model, SOURCE, seed=0, progress=False, **SETTINGS)  # noqa: E731
    return {"bare": by_hand, "diffsight": lens}, lambda result, hand: _furthest(result.images, hand)


def fidelity() -> tuple[dict[str, Way], Callable[[Any, Any], float]]:
    model, scenes = _opened(), sample_prompts(SCENES)
    draw = _drawn_from_layers(model.pipeline, [scene.caption() for scene in scenes])

    def by_hand() -> list[Any]:
        seen = [read_scene(image) for image in draw()]
        layers = len(seen) // SCENES
        return [tuple(seen[start : start + layers]) for start in range(0, len(seen), layers)]

    def distance(result: Any, hand: Any) -> float:
        pairs = [pair for ours, other in zip(result.seen, hand, strict=True) for pair in zip(ours, other, strict=True)]
        return sum(a != b for a, b in pairs) / len(pairs)

    lens = lambda: layer_fidelity(model, scenes, progress=False, **SETTINGS)  # noqa: E731
    return {"bare": by_hand, "diffsight": lens}, distance


def _drawn_from_layers(pipeline: diffusers.DiffusionPipeline, prompts: list[str]) -> Callable[[], list[Image.Image]]:
    """Return what draws the prompts from the embedding and from each layer, in calls of `ROWS` rows."""
    negative = pipeline.encode_prompt("", "cpu", 1, False)[0]

    @torch.no_grad()
    def draw() -> list[Image.Image]:
        ids = pipeline.tokenizer(prompts, padding="max_length", return_tensors="pt").input_ids
        encoder = pipeline.text_encoder
        states = torch.stack(encoder(ids, output_hidden_states=True).hidden_states, 1)  # (prompts, layers, …)
        embeds = encoder.final_layer_norm(states).flatten(0, 1)
        seeds = [seed for seed in range(len(prompts)) for _ in range(states.shape[1])]
        calls = [slice(start, start + ROWS) for start in range(0, len(embeds), ROWS)]
        return [image for rows in calls for image in _drawn(pipeline, embeds[rows], negative, seeds[rows])]

    return draw


def _furthest(images: Iterable[Image.Image], others: Iterable[Image.Image]) -> int:
    """Return the largest difference of any pixel, of 255."""
    pairs = zip(images, others, strict=True)
    return max(np.abs(np.asarray(a, dtype=int) - np.asarray(b, dtype=int)).max() for a, b in pairs)


def _opened() -> DiffusionModel:
    model = DiffusionModel("diffsight/shapes-clip")
    model.set_progress_bar_config(disable=True)
    return model


def _drawn(
    pipeline: diffusers.DiffusionPipeline, embeds: torch.Tensor, negative: torch.Tensor, seeds: list[int]
) -> list[Image.Image]:
    """Return the images of some rows, from one call of the pipeline."""
    return pipeline(
        prompt_embeds=embeds,
        negative_prompt_embeds=negative.expand(len(embeds), -1, -1),
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        **SETTINGS,
    ).images


# ---- encoder_patching


def patched() -> tuple[dict[str, Way], Callable[[Any, Any], float]]:
    model = _opened()
    pipeline = model.pipeline
    encoder, tokenizer = pipeline.text_encoder, pipeline.tokenizer
    layers = encoder.encoder.layers
    negative = pipeline.encode_prompt("", "cpu", 1, False)[0]
    source, target = (tokenizer([p], padding="max_length", return_tensors="pt").input_ids for p in (SOURCE, TARGET))
    cells = [(layer, place) for layer in range(-1, len(layers)) for place in _places(tokenizer)]

    @torch.no_grad()
    def by_hand() -> list[Image.Image]:
        states = encoder(source, output_hidden_states=True).hidden_states  # the input of the first layer comes first
        handles = [layers[0].register_forward_pre_hook(lambda module, args: _put(args[0], -1, states))]
        for number, layer in enumerate(layers):
            hook = lambda module, args, output, number=number: _put(hidden_in(output), number, states)  # noqa: E731
            handles.append(layer.register_forward_hook(hook))
        embeds = encoder(torch.cat([target, source, target.expand(len(cells), -1)]))[0]
        for handle in handles:
            handle.remove()
        return _drawn(pipeline, embeds, negative, [0] * len(embeds))

    def _put(hidden: torch.Tensor, number: int, states: tuple[torch.Tensor, ...]) -> None:
        for row, (layer, place) in enumerate(cells, 2):
            if layer == number:
                hidden[row, place] = states[layer + 1][0, place]

    def distance(result: Any, hand: Any) -> float:
        ours = [result.target_image, result.source_image, *(image for row in result.images for image in row)]
        return _furthest(ours, hand)

    settings = {"words": WORDS, "into": INTO, "progress": False, **SETTINGS}
    return {"bare": by_hand, "diffsight": lambda: encoder_patching(model, SOURCE, TARGET, **settings)}, distance


def _places(tokenizer: Any) -> list[int]:
    """Return the positions of the patched words, which are the same in both prompts."""
    read = tokenizer(SOURCE).input_ids
    return [read.index(tokenizer.convert_tokens_to_ids(word)) for word in WORDS]


TASKS = {
    "compare_encoders": (partial(compared, FEW), f"{FEW} prompts, CLIP and T5"),
    "compare_encoders, many": (partial(compared, MANY), f"{MANY} prompts, CLIP and T5"),
    "diffusion_lens": (one_prompt, "13 layers"),
    "layer_fidelity": (fidelity, f"{SCENES} prompts, 13 layers"),
    "encoder_patching": (patched, "2 words, 13 layers"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=[*TASKS])
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    SETTINGS["num_inference_steps"] = options.steps
    print("| | by hand | diffsight | share | noise | largest difference |\n| --- | --- | --- | --- | --- | --- |")
    for name in options.tasks:
        build, what = TASKS[name]
        ways, distance = build()
        far = distance(ways["diffsight"](), ways["bare"]())
        seconds, noise = interleaved(ways, options.rounds, of="diffsight")
        hand, ours = seconds["bare"], seconds["diffsight"]
        figures = f"{hand:.3f} s | {ours:.3f} s | {ours / hand:.2f} | {noise:.3f} s | {far:.1g}"
        print(f"| `{name.split(',')[0]}`, {what} | {figures} |", flush=True)


if __name__ == "__main__":
    main()
