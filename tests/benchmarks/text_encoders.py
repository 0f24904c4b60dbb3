"""The lenses on text encoders against the same work by hand: compare_encoders, layer_fidelity, encoder_patching.

    python tests/benchmarks/text_encoders.py                    # about five minutes
    python tests/benchmarks/text_encoders.py --tasks compare_encoders

By hand means plain PyTorch that computes what cannot be avoided, in batches of the same size: each prompt goes through
each text encoder once, and the pipeline draws all rows in as few calls as the lens. The results are compared. It runs
on the packaged pipelines, on one thread, interleaved; see README.md for how to read the figures.
"""

import argparse
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import diffusers
import numpy as np
import torch
from measuring import interleaved
from PIL import Image
from torch.nn import functional

from diffsight import DiffusionModel, compare_encoders, encoder_patching
from diffsight.lenses.layer_fidelity import layer_fidelity, sample_prompts
from diffsight.pipelines.diffusion.encoder_calls import hidden_in
from diffsight.pipelines.shapes.reader import read_scene

PROMPTS, ENCODED, SCENES, STEPS, ROWS = 128, 128, 8, 20, 32
SOURCE, TARGET, WORDS = "a red circle above a green square", "a blue square above a green circle", ("red", "circle")
SETTINGS = {"num_inference_steps": STEPS, "guidance_scale": 3.0}
Way = Callable[[], Any]


def captions(count: int) -> list[str]:
    """Return different prompts."""
    return list(dict.fromkeys(scene.caption() for scene in sample_prompts(2 * count)))[:count]


# ---- compare_encoders


def compared() -> tuple[dict[str, Way], Callable[[Any, Any], float]]:
    models = {"CLIP": DiffusionModel("diffsight/shapes-clip"), "T5": DiffusionModel("diffsight/shapes-t5")}
    prompts = captions(PROMPTS)

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
    for start in range(0, len(prompts), ENCODED):
        some = prompts[start : start + ENCODED]
        ids = tokenizer(some, padding="max_length", return_tensors="pt").input_ids
        own = tokenizer(some, add_special_tokens=False).input_ids
        first, lengths = 0 if ids[0, 0] == own[0][0] else 1, list(map(len, own))
        encoder(ids)
        places = torch.arange(ids.shape[1]) - first
        is_own = (0 <= places) & (places < torch.tensor(lengths)[:, None])
        states = torch.stack([state[is_own] for state in taken])  # (layers, own tokens of all prompts, features)
        taken.clear()
        ends = torch.stack([functional.cosine_similarity(states, states[end], dim=-1) for end in (0, -1)])
        means += [part.mean(1) for part in states.split(lengths, 1)]
        drifts += ends.split(lengths, 2)
        words += [list(map(spell, tokens)) for tokens in own]
    for handle in handles:
        handle.remove()
    return torch.stack(means, 1), drifts, words
