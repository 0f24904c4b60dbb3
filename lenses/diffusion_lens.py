"""The diffusion lens: what a text-to-image pipeline draws from each layer of a text encoder.

    result = diffusion_lens(model, "a red circle below a blue square", seed=0)
    result.grid().save("lens.png")

The hidden state of a layer goes past the layers behind it, through the encoder's final norm (where the pipeline takes
it so), into the rest of the pipeline (Toker et al., "Diffusion Lens: Interpreting Text Encoders in Text-to-Image
Pipelines", ACL 2024, section 3). All layers are rows of one call, see `exits.py`.
"""

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from PIL import Image

import diffsight
from diffsight.errors import InputError
from diffsight.lenses.encoders.checks import check_call, check_seen, check_whole, choose_layers
from diffsight.lenses.encoders.drawing import Drawing
from diffsight.lenses.encoders.exits import Exits
from diffsight.lenses.encoders.isolating import isolated
from diffsight.lenses.results.outputs import files_of, picture_of, rate_of
from diffsight.lenses.results.plots import Plot
from diffsight.lenses.results.saving import save_files, write_record
from diffsight.pipelines.diffusion.encoding import record_encoding
from diffsight.pipelines.diffusion.model import DiffusionModel
from diffsight.pipelines.diffusion.prompts import PromptWarning
from diffsight.pipelines.diffusion.text_encoders import encoders_in


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
        figure = Plot(figsize=(1.5 * columns, 1.75 * rows + 0.5), layout="constrained")
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
        return self.grid()._repr_png_()


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
    check_call("diffusion_lens", model, prompt, seed, batch_size, arguments)
    if pooled not in ("layer", "full"):
        raise InputError(f'pooled is "layer" or "full", not {pooled!r}')
    model.generate(prompt=prompt, seed=seed, **arguments)  # checks everything, and warns once, before anything runs
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PromptWarning)
        reading = record_encoding(model, prompt, arguments, seed)
        found = encoders_in(model, reading).choose(encoder)
        chosen = choose_layers(layers, found.last)
        check_seen(model, found)
        if norm and found.ln_final is None:
            raise InputError(f"norm: {found.name} has no final norm behind its layers")
        check_whole(model, reading.encoders[found.name], prompt)
        if isolate:
            model, reading = isolated(model, found, reading, prompt, arguments, seed)
        exits = Exits(found, reading, norm, pooled, bool(model.edits))
        drawing = Drawing(model, reading, found.name, prompt, seed, arguments, progress=progress)
        # The last layer's is the plain picture, bit for bit: not in a batch, where sums are rounded differently.
        alone = [layer for layer in chosen if layer == found.last and not isolate]
        others = [layer for layer in chosen if layer not in alone]
        made = dict(zip(others, drawing.draw(exits.leave, others, batch_size)))
        made |= zip(alone, drawing.draw(exits.leave, alone))
    settings = {"encoder": found.name, "isolate": isolate, "norm": norm, "pooled": pooled}
    outputs = tuple(made[layer] for layer in chosen)
    images = tuple(map(picture_of, outputs))
    return DiffusionLensResult(
        images, chosen, prompt, int(seed), model.source, arguments, **settings, outputs=outputs, rate=rate_of(model)
    )
