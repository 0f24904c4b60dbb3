"""The diffusion lens: what a text-to-image pipeline draws from each layer of its text encoder.

    result = diffusion_lens(model, "a red circle below a blue square", seed=0)
    result.grid().save("lens.png")

The hidden state of a layer goes through the encoder's final norm, past the layers behind it, into the rest of the
pipeline (Toker et al., "Diffusion Lens: Interpreting Text Encoders in Text-to-Image Pipelines", ACL 2024, section 3).
"""

import inspect
import io
import json
import platform
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from PIL import Image
from tqdm.auto import tqdm

import diffsight
from diffsight.errors import InputError
from diffsight.pipelines.diffusion import DiffusionModel, DiffusionRun
from diffsight.pipelines.prompts import PromptWarning

from .saving import save_files

_VERSIONS = ("diffsight", "torch", "diffusers", "transformers")


@dataclass(frozen=True)
class DiffusionLensResult:
    """Pictures by layer. `images[i]` was drawn from layer `layers[i]`, where 0 is the embedding and the last number the
    last layer; `arguments` are those of the pipeline. Everything that is needed to make it again is in it."""

    images: tuple[Image.Image, ...] = field(repr=False)
    layers: tuple[int, ...]
    prompt: str
    seed: int
    model: str
    arguments: Mapping[str, Any]

    def grid(self) -> Image.Image:
        """All pictures in one, with their layers."""
        titles = [f"layer {layer}" for layer in self.layers]
        return diffsight.image_grid(self.images, titles=titles, title=f"{self.prompt} (seed {self.seed})")

    def plot(self) -> Figure:
        """The pictures side by side as a matplotlib figure."""
        columns = min(len(self.images), 7)
        rows = -(-len(self.images) // columns)
        figure = Figure(figsize=(1.5 * columns, 1.75 * rows + 0.5), layout="constrained")
        figure.suptitle(self.prompt, wrap=True)
        for i, axes in enumerate(figure.subplots(rows, columns, squeeze=False).flat):
            axes.set_axis_off()
            if i < len(self.images):
                axes.imshow(self.images[i], interpolation="nearest")
                axes.set_title(f"layer {self.layers[i]}", fontsize=10)
        return figure

    def save(self, folder: str | Path) -> list[Path]:
        """Writes `grid.png`, a picture a layer (`layer_04.png`) and `lens.json`, which records versions, model, prompt,
        seed and arguments; gives the paths. All files are written or none."""
        files = {"grid.png": self.grid().save}
        files |= {f"layer_{layer:02}.png": image.save for layer, image in zip(self.layers, self.images)}
        record = {
            "lens": "diffusion_lens",
            "model": self.model,
            "prompt": self.prompt,
            "seed": self.seed,
            "layers": list(self.layers),
            "arguments": dict(self.arguments),
            "versions": {"python": platform.python_version()} | {name: version(name) for name in _VERSIONS},
        }
        text = json.dumps(record, indent=2, default=repr, ensure_ascii=False) + "\n"
        return save_files(folder, files | {"lens.json": partial(Path.write_text, data=text, encoding="utf-8")})

    def _repr_png_(self) -> bytes:
        data = io.BytesIO()
        self.grid().save(data, "PNG")
        return data.getvalue()


def diffusion_lens(
    model: DiffusionModel,
    prompt: str,
    *,
    layers: int | slice | Iterable[int] | None = None,
    seed: int = 0,
    progress: bool = True,
    **arguments: Any,
) -> DiffusionLensResult:
    """Draws `prompt` from each of `layers` of the text encoder, all with the same seed.

        diffusion_lens(model, "a red circle below a blue square", layers=range(0, 13, 3), num_inference_steps=20)

    Layers are numbered as transformers numbers hidden states: 0 is the embedding, k what layer k gives, and the last
    one is what the pipeline itself uses, so that its picture equals `model.generate(prompt, seed=seed)` bit for bit.
    None is all of them. `arguments` go to the pipeline; with guidance, the negative prompt is encoded in full at every
    layer.

    Raises InputError, before any picture is made, for an empty or too long prompt, a layer that is not there, a seed
    that is none, and a pipeline that does not draw from the final norm of its `text_encoder`."""
    if not isinstance(model, DiffusionModel):
        raise InputError(f"diffusion_lens takes a DiffusionModel, not {type(model).__name__}")
    if not hasattr(seed, "__index__") or isinstance(seed, bool):
        raise InputError(f"diffusion_lens takes one seed for all layers, a whole number, not {seed!r}")
    if not isinstance(prompt, str):
        raise InputError(f"diffusion_lens takes one prompt, a text, not {type(prompt).__name__}")
    if arguments.get("output_type", "pil") != "pil":
        raise InputError("diffusion_lens makes PIL pictures: leave output_type out")
    if arguments.get("num_images_per_prompt", 1) != 1:
        raise InputError("diffusion_lens makes one picture a layer: leave num_images_per_prompt out")
    if "num_frames" in inspect.signature(model.pipeline.__call__).parameters:
        raise InputError(f"{type(model.pipeline).__name__} makes videos, and diffusion_lens single pictures")
    chosen = choose_layers(layers, _count_layers(model))
    model.generate(prompt, seed=seed, **arguments)  # checks everything, and warns once, before the first picture
    images = []
    with _quiet(model), warnings.catch_warnings():
        warnings.simplefilter("ignore", PromptWarning)
        for layer in tqdm(chosen, desc="layers", disable=not progress):
            images.append(_draw(model, model.generate(prompt, seed=seed, **arguments), layer))
    return DiffusionLensResult(tuple(images), chosen, prompt, int(seed), model.source, arguments)


def choose_layers(layers: int | slice | Iterable[int] | None, last: int) -> tuple[int, ...]:
    """The numbers of the chosen layers, of those from 0 to `last`."""
    if layers is None:
        layers = slice(None)
    if isinstance(layers, slice):
        if layers.step == 0:
            raise InputError("layers are chosen with a step of 0: take 1 or more")
        if any(bound is not None and bound > last + 1 for bound in (layers.start, layers.stop)):
            raise InputError(f"there are no layers up to {layers.stop}: they are 0 (the embedding) to {last}")
        chosen = range(last + 1)[layers]
    else:
        chosen = list(dict.fromkeys(layers)) if isinstance(layers, Iterable) else [layers]
    for layer in chosen:
        if not hasattr(layer, "__index__") or isinstance(layer, bool) or not 0 <= layer <= last:
            raise InputError(f"there is no layer {layer!r}: they are 0 (the embedding) to {last}")
    if not chosen:
        raise InputError(f"no layers are chosen: take some of 0 (the embedding) to {last}")
    return tuple(int(layer) for layer in chosen)


def _count_layers(model: DiffusionModel) -> int:
    if getattr(model.pipeline, "text_encoder", None) is None:
        raise InputError(f"{type(model.pipeline).__name__} has no text encoder, so there is nothing to look through")
    encoder = model.text_encoder
    if not (hasattr(encoder, "layers") and hasattr(encoder, "ln_final")):
        name = type(model.pipeline.text_encoder).__name__
        raise InputError(f"the text encoder, {name}, has no list of layers with a norm behind")
    return len(encoder.layers)


@contextmanager
def _quiet(model: DiffusionModel) -> Iterator[None]:
    """Without the pipeline's own progress bar: the lens has one."""
    pipeline = model.pipeline
    shown = getattr(pipeline, "_progress_bar_config", {})
    pipeline.set_progress_bar_config(**{**shown, "disable": True})
    try:
        yield
    finally:
        pipeline.set_progress_bar_config(**shown)


def _draw(model: DiffusionModel, run: DiffusionRun, layer: int) -> Image.Image:
    """The picture from one layer: its hidden state, straight into the final norm."""
    with run:
        encoder = run.text_encoder
        hidden = encoder.layers[layer - 1].output if layer else encoder.layers[0].input
        encoder.ln_final.input = hidden[0] if isinstance(hidden, tuple) else hidden
        normed = encoder.ln_final.output
        if not _reaches(normed, run.encode_prompt.output):
            raise InputError(
                f"{type(model.pipeline).__name__} does not draw from what the final norm of its text_encoder gives, so "
                "this layer would not be seen"
            )
    return run.images[0]


def _reaches(normed: torch.Tensor, encoded: Any) -> bool:
    """Whether what `encode_prompt` returned holds the output of the norm."""
    parts = encoded if isinstance(encoded, (tuple, list)) else [encoded]
    return any(_holds(part, normed) for part in parts if isinstance(part, torch.Tensor) and part.ndim == normed.ndim)


def _holds(part: torch.Tensor, normed: torch.Tensor) -> bool:
    """Whether the tokens of `part` are some of those of `normed`; padding may be cut off or zero."""
    if part.shape[-1] != normed.shape[-1]:
        return False
    rows, of = part[0], normed[0].to(part)
    rows = rows[rows.any(-1)]
    return len(rows) > 0 and bool((rows[:, None] == of[None]).all(-1).any(-1).all())
