"""The diffusion lens: what a text-to-image pipeline draws from each layer of a text encoder.

    result = diffusion_lens(model, "a red circle below a blue square", seed=0)
    result.grid().save("lens.png")

The hidden state of a layer goes past the layers behind it, through the encoder's final norm (where the pipeline takes
it so), into the rest of the pipeline (Toker et al., "Diffusion Lens: Interpreting Text Encoders in Text-to-Image
Pipelines", ACL 2024, section 3). All layers are rows of one call, see `exits.py`.
"""

import io
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from PIL import Image

import diffsight
from diffsight.errors import InputError
from diffsight.pipelines.diffusion import DiffusionModel
from diffsight.pipelines.encoders import Encoder, cut_off, encoders_in
from diffsight.pipelines.progress import progress_bar
from diffsight.pipelines.prompts import PromptWarning
from diffsight.pipelines.reading import Reading, candidates, read

from .exits import Exits, NoPicturesError
from .isolating import isolated
from .outputs import files_of, picture_of, rate_of
from .saving import save_files, write_record


class LensWarning(UserWarning):
    """A lens goes another way than it says."""


@dataclass(frozen=True)
class DiffusionLensResult:
    """Pictures by layer. `images[i]` was drawn from layer `layers[i]`, where 0 is the embedding and the last number the
    last layer; `arguments` are those of the pipeline. Everything that is needed to make it again is in it.

    `outputs[i]` is what the pipeline made: the picture itself, a video as its frames (`images[i]` is the middle one),
    or a sound, (channels, samples), of `rate` samples a second (`images[i]` shows the wave)."""

    images: tuple[Image.Image, ...] = field(repr=False)
    layers: tuple[int, ...]
    prompt: str
    seed: int
    model: str
    arguments: Mapping[str, Any]
    encoder: str = "text_encoder"
    isolate: bool = False
    norm: bool = False
    pooled: str = "layer"
    outputs: tuple[Any, ...] = field(default=(), repr=False)
    rate: int | None = field(default=None, repr=False)

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
        """Writes `grid.png`, a picture a layer (`layer_04.png`; with a video `.gif`, with a sound `.wav`) and
        `lens.json`, which records versions, model, prompt, seed and arguments; gives the paths. All files are written
        or none."""
        files = {"grid.png": self.grid().save}
        files |= {f"layer_{layer:02}.png": image.save for layer, image in zip(self.layers, self.images)}
        for layer, output in zip(self.layers, self.outputs):
            files |= files_of(f"layer_{layer:02}", output, self.rate)
        record = {
            "lens": "diffusion_lens",
            "model": self.model,
            "prompt": self.prompt,
            "seed": self.seed,
            "encoder": self.encoder,
            "layers": list(self.layers),
            "isolate": self.isolate,
            "norm": self.norm,
            "pooled": self.pooled,
            "arguments": dict(self.arguments),
        }
        return save_files(folder, files | {"lens.json": partial(write_record, record)})

    def _repr_png_(self) -> bytes:
        data = io.BytesIO()
        self.grid().save(data, "PNG")
        return data.getvalue()


def diffusion_lens(
    model: DiffusionModel,
    prompt: str,
    *,
    encoder: str | None = None,
    layers: int | slice | Iterable[int] | None = None,
    isolate: bool = False,
    norm: bool = False,
    pooled: str = "layer",
    batch_size: int | None = None,
    seed: int = 0,
    progress: bool = True,
    **arguments: Any,
) -> DiffusionLensResult:
    """Draws `prompt` from each of `layers` of a text encoder, all with the same seed.

        diffusion_lens(model, "a red circle below a blue square", layers=range(0, 13, 3), num_inference_steps=20)
        diffusion_lens(sdxl, "a cat on a mat", encoder="text_encoder_2", isolate=True, norm=True, batch_size=8)

    The text encoders run once. Then the layers are rows of one call of the pipeline, or of as many as `batch_size`
    (rows a call) makes of them; where a pipeline cannot do that, each layer has a call of its own, and a LensWarning
    says so. A row's picture is that of its own call within rounding, 2 of 255 a pixel; with `batch_size=1` bit for bit.
    The last layer always has a call of its own (but with `isolate`): its picture is the plain one, bit for bit.

    Args:
        encoder: Name of the text encoder, see `model.encoders`. None: the first whose tokens the pipeline takes.
        layers: Numbered as transformers numbers hidden states: 0 is the embedding, k what layer k gives. None is all
            of them up to the last that the pipeline makes use of, which is the picture of `model.generate(prompt)`.
        isolate: Gives the other encoders an empty prompt, so that only this one knows what to draw.
        norm: Applies the final norm also where the pipeline takes hidden states without it (SDXL, SD3's CLIPs, Lumina).
            Where it takes them through the norm, every layer goes through it, whatever this says.
        pooled: Where the pipeline also takes a pooled vector of the encoder (SDXL's second, SD3's CLIPs, FLUX's CLIP):
            "layer", the one that its own norm, pooling and projection make of the layer; "full", that of the whole
            encoder, which knows the prompt at every layer. Of other encoders it is theirs, with `isolate` that of an
            empty prompt.
        batch_size: Rows a call; None is all in one.
        arguments: Of the pipeline. With guidance, the negative prompt is encoded in full at every layer.

    Raises InputError, before any picture is made, for an empty prompt, one that the encoder's tokenizer cuts (saying
    what is cut), an encoder or a layer that is not there, a seed that is none, and an encoder of which nothing was
    found in what the pipeline goes on with."""
    _check(model, prompt, seed, pooled, batch_size, arguments)
    model.generate(prompt=prompt, seed=seed, **arguments)  # checks everything, and warns once, before anything runs
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PromptWarning)
        reading = read(model, prompt, arguments, seed)
        found = encoders_in(model, reading).choose(encoder)
        chosen = choose_layers(layers, found.last)
        _check_encoder(model, found, reading, prompt, norm)
        if isolate:
            model, reading = isolated(model, found, reading, prompt, arguments, seed)
        exits = Exits(found, reading, norm, pooled)
        # The last layer's is the plain picture, bit for bit: not in a batch, where sums are rounded differently.
        alone = [layer for layer in chosen if layer == found.last and not isolate]
        others = [layer for layer in chosen if layer not in alone]
        size = batch_size or max(1, len(others))
        batches = [others[start : start + size] for start in range(0, len(others), size)]
        made: dict[int, Any] = {}
        for batch in [*batches, alone] if alone else batches:
            made |= zip(batch, _draw(exits, model, batch, prompt, seed, arguments, progress), strict=True)
    settings = {"encoder": found.name, "isolate": isolate, "norm": norm, "pooled": pooled}
    outputs = tuple(made[layer] for layer in chosen)
    images = tuple(map(picture_of, outputs))
    return DiffusionLensResult(
        images, chosen, prompt, int(seed), model.source, arguments, **settings, outputs=outputs, rate=rate_of(model)
    )


def _check(
    model: Any, prompt: Any, seed: Any, pooled: str, batch_size: int | None, arguments: Mapping[str, Any]
) -> None:
    if not isinstance(model, DiffusionModel):
        raise InputError(f"diffusion_lens takes a DiffusionModel, not {type(model).__name__}")
    if not hasattr(seed, "__index__") or isinstance(seed, bool):
        raise InputError(f"diffusion_lens takes one seed for all layers, a whole number, not {seed!r}")
    if not isinstance(prompt, str):
        raise InputError(f"diffusion_lens takes one prompt, a text, not {type(prompt).__name__}")
    if not candidates(model):
        raise InputError(f"{type(model.pipeline).__name__} has no text encoder, so there is nothing to look through")
    if pooled not in ("layer", "full"):
        raise InputError(f'pooled is "layer" or "full", not {pooled!r}')
    if batch_size is not None and (not isinstance(batch_size, int) or isinstance(batch_size, bool) or batch_size < 1):
        raise InputError(f"batch_size is a number of layers from 1 on, or None for all in one call, not {batch_size!r}")
    if arguments.get("output_type", "pil") != "pil":
        raise InputError("diffusion_lens makes PIL pictures: leave output_type out")
    for name in ("num_images_per_prompt", "num_videos_per_prompt", "num_waveforms_per_prompt"):
        if arguments.get(name, 1) != 1:
            raise InputError(f"diffusion_lens makes one picture a layer: leave {name} out")


def _check_encoder(model: DiffusionModel, encoder: Encoder, reading: Reading, prompt: str, norm: bool) -> None:
    """Whether the layers of the encoder can be seen, and whether it is given all of the prompt."""
    if not encoder.uses:
        raise InputError(
            f"{type(model.pipeline).__name__} takes nothing of {encoder.name} as it is, so its layers cannot be seen. "
            "print(model.encoders) tells what was found"
        )
    if norm and encoder.ln_final is None:
        raise InputError(f"norm: {encoder.name} has no final norm behind its layers")
    cut = cut_off(model, reading.encoders[encoder.name], prompt)
    if cut is not None:
        raise InputError(
            f"the prompt is too long for {encoder.name}: {reading.encoders[encoder.name].prompt.ids.shape[1]} tokens "
            f"are read, and these words would be dropped: {cut!r}"
        )


def _draw(
    exits: Exits,
    model: DiffusionModel,
    layers: Sequence[int],
    prompt: str,
    seed: int,
    arguments: Mapping[str, Any],
    progress: bool,
) -> Sequence[Any]:
    """What the pipeline makes of each of `layers`: in one call, else in a call each."""
    names = ", ".join(map(str, layers))
    try:
        with progress_bar(model.pipeline, desc=f"layers {names}", disable=not progress):
            return exits.draw(model, layers, prompt, seed, arguments)
    except torch.OutOfMemoryError as error:
        error.add_note(f"{len(layers)} layers are drawn in one call: batch_size={max(1, len(layers) // 2)} draws fewer")
        raise
    except Exception as error:
        if len(layers) == 1 or isinstance(error, NoPicturesError):
            raise
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        name = type(model.pipeline).__name__
        message = f"{name} cannot draw {len(layers)} layers in one call, so each has its own: {reason}"
        warnings.warn(message, LensWarning, stacklevel=3)
    return [_draw(exits, model, [layer], prompt, seed, arguments, progress)[0] for layer in layers]


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
