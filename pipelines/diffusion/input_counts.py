"""How many prompts, or other inputs, a call of a pipeline has, and how many images it draws for each.

count_inputs({"prompt": ["a circle", "a square"]})                      # 2
count_inputs({"class_labels": [1, 2, 3]})                               # 3
count_images_each({"prompt": "a circle", "num_images_per_prompt": 4})   # 4
"""

import math
from collections.abc import Mapping
from typing import Any

from diffsight.errors import InputError

PER_INPUT = ("num_images_per_prompt", "num_videos_per_prompt", "num_waveforms_per_prompt", "num_images_per_caption")

_SINGLE = {  # the arguments that have an entry for each input, the decisive ones first: the dimensions of an entry
    "prompt": 0,
    "prompt_embeds": 2,
    "prompt_embeds_qwen": 2,
    "pooled_prompt_embeds": 1,
    "connector_video_embeds": 2,
    "image_embeds": 1,
    "image_embeddings": 1,
    "class_labels": 0,
    "image": 3,
    "latents": 0,
}
_JOINED = ("image_embeds", "image_embeddings")  # a list of these is joined along the batch


def count_inputs(arguments: Mapping[str, Any]) -> int:
    """Return the number of prompts, or of other inputs, of a call."""
    name = next((name for name in _SINGLE if arguments.get(name) is not None), None)
    count = None if name is None else _several(name, arguments[name])
    if count is not None:
        return count
    return 1 if name == "image" else arguments.get("batch_size", 1)  # of an image, it is not the number of results


def count_images_each(arguments: Mapping[str, Any]) -> int:
    """Return how many images a call draws for each of its inputs.

    A decoder draws an image for each embedding of its prior, which may have made several for a prompt."""
    drawn = _several("image_embeddings", arguments.get("image_embeddings")) or 1
    return math.prod(arguments.get(name) or 1 for name in PER_INPUT) * max(1, drawn // max(1, count_inputs(arguments)))


def check_labels(title: str, arguments: Mapping[str, Any], batch_size: int) -> None:
    """Raise InputError if a pipeline that takes a batch size was given a different number of class labels."""
    count = _several("class_labels", arguments.get("class_labels"))
    if count is not None and count != batch_size:
        raise InputError(f"{title}: {count} class_labels do not fit batch_size={batch_size}: pass batch_size={count}")


def _several(name: str, given: Any) -> int | None:
    """Return how many entries an argument has, or None if it is a single one."""
    if name in _JOINED and isinstance(given, list):
        return sum(map(len, given))
    several = isinstance(given, (list, tuple)) or getattr(given, "ndim", 0) > _SINGLE[name]
    return len(given) if several else None
