"""Where the tokens that a vision-language model generates look in its image.

found = looks_at_image(model, "What is this?", image, layers=[10, 11], by="layers", seed=None, arguments={})
found.maps                          # (tokens, layers, rows, columns)
found.words                         # ("a", " cat"): the tokens

A token is chosen at the position before it, so its map is the attention of that position to the tokens of the image.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from PIL import Image

from diffsight.errors import InputError
from diffsight.lenses.tokens.seen_image import seen_image
from diffsight.lenses.tokens.token_text import Spelling
from diffsight.pipelines.vision_language.model import VisionLanguageModel, VisionLanguageRun


class ImageLooks(NamedTuple):
    """The tokens that were generated, and where they look.

    Attributes:
        words: The tokens as text.
        maps: The probabilities, (tokens, parts, rows, columns). Parts are layers or heads, or there is one.
        image: The image that the model sees.
    """

    words: tuple[str, ...]
    maps: torch.Tensor
    image: Image.Image


def looks_at_image(
    model: VisionLanguageModel,
    prompt: Any,
    image: Any,
    layers: Sequence[int],
    heads: Sequence[int] | None,
    by: str | None,
    seed: int | None,
    arguments: Mapping[str, Any],
) -> ImageLooks:
    """Generate text, and return where each token looks.

    Args:
        model: The model.
        prompt: A string or chat messages.
        image: One image.
        layers: Which layers.
        heads: Which heads. None: all.
        by: "layers" or "heads": keep them apart. None: their mean.
        seed: The seed of the text.
        arguments: Arguments of `generate`.

    Raises:
        InputError: The image tokens form no grid, a head does not exist, or a layer does not attend to the whole image.
    """
    words, maps, spell = [], [], Spelling(model)
    with torch.no_grad(), model.generate(prompt, images=image, seed=seed, **arguments) as run:
        grid = _grid(run)
        pixels = run.inputs[1].get("pixel_values")
        for step in run.steps:
            looks = torch.stack([_look(run, layer, grid, heads) for layer in layers])  # (layers, heads, rows, columns)
            mean = {"layers": looks.mean(1), "heads": looks.mean(0), None: looks.mean((0, 1))[None]}
            maps.append(mean[by])
            words.append(spell(int(step.tokens[0])))
    return ImageLooks(tuple(words), torch.stack(maps), seen_image(image, pixels))


def _grid(run: VisionLanguageRun) -> torch.Tensor:
    grids = run.image_grids
    if len(grids) != 1 or len(grids[0]) != 1:
        raise InputError(f"attention_maps takes one text with one image, not {len(grids)} with {sum(map(len, grids))}")
    return grids[0][0]


def _look(run: VisionLanguageRun, layer: int, grid: torch.Tensor, heads: Sequence[int] | None) -> torch.Tensor:
    """Return the attention of the last position to the image in a layer, (heads, rows, columns)."""
    probs = run.attention_probs[layer]
    if len(probs) != 1:
        raise InputError(
            f"attention_maps generates one text, not {len(probs)}: omit num_beams and num_return_sequences"
        )
    if probs.shape[-1] <= int(grid.max()):
        raise InputError(
            f"layers: layer {layer} keeps {probs.shape[-1]} keys only, so the image is no longer among them"
        )
    if heads is not None and max(heads) >= probs.shape[1]:
        raise InputError(
            f"heads: there is no head {max(heads)}. Layer {layer} has {probs.shape[1]} heads, 0 to {probs.shape[1] - 1}"
        )
    looks = probs[0, :, -1, grid.to(probs.device)].float().cpu()
    return looks if heads is None else looks[list(heads)]
