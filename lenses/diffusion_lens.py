"""The diffusion lens: the images that a text-to-image pipeline draws from each layer of a text encoder.

    result = diffusion_lens(model, "a red circle below a blue square", seed=0)
    result.grid().save("lens.png")

The hidden state of a layer skips the layers after it. It goes through the encoder's final norm, if the pipeline uses
it, and into the rest of the pipeline (Toker et al., "Diffusion Lens: Interpreting Text Encoders in Text-to-Image
Pipelines", ACL 2024, section 3). All layers are rows of one call, see `encoders/exits.py`.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from diffsight.lenses.denoising.inverted_images import takes_inverted
from diffsight.lenses.encoders.checks import check_call, check_pooled
from diffsight.lenses.encoders.layer_drawing import draw_layers, read_layers
from diffsight.lenses.layers import Layer, Layers, find_layer, layer_file, layer_title
from diffsight.lenses.options import check_options
from diffsight.lenses.results.calls import repeatable
from diffsight.lenses.results.image_grid import image_grid
from diffsight.lenses.results.outputs import files_of, image_of, media_of, rate_of
from diffsight.lenses.results.result import LensResult
from diffsight.lenses.results.sections import ImageSection, Section
from diffsight.lenses.where_models_are import where_the_model_is
from diffsight.pipelines.diffusion.model import DiffusionModel
from diffsight.pipelines.diffusion.prompts import PromptWarning

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False)
class DiffusionLensResult(LensResult):
    """Images by layer, and everything that is needed to draw them again.

    `save(folder)` writes `grid.png`, an image for each layer (`layer_04.png`, `embedding.png`; a video also as `.gif`,
    a sound as `.wav`) and `lens.json`.

    Attributes:
        images: `images[i]` was drawn from layer `layers[i]`. For a video it is the middle frame, for a sound the
            waveform.
        layers: Non-negative integers, and "embedding" for the input of the first layer.
        prompt: The prompt.
        seed: The seed of every image.
        model: The name of the model.
        arguments: The arguments of the pipeline.
        encoder: The name of the text encoder.
        isolate: As in `diffusion_lens`.
        norm: As in `diffusion_lens`.
        pooled: As in `diffusion_lens`.
        outputs: What the pipeline returned for each layer: an image, the frames of a video, or the samples of a sound,
            (channels, samples).
        rate: The sampling rate of sounds in Hz.
    """

    images: tuple[Image.Image, ...] = field(repr=False)
    layers: tuple[Layer, ...]
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

    def __getitem__(self, layer: Layer) -> Image.Image:
        """Return the image drawn from a layer, by its number from 0, or "embedding"."""
        return self.images[find_layer(layer, self.layers, 0)]

    def __iter__(self) -> Iterator[Layer]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def grid(self) -> Image.Image:
        """Return all images in one, with their layers."""
        titles = [layer_title(layer) for layer in self.layers]
        return image_grid(self.images, titles=titles, title=f"{self.prompt} (seed {self.seed})")

    def plot(self) -> "Figure":
        """Return the images side by side as a matplotlib figure."""
        from diffsight.lenses.results.figure import Plot  # with matplotlib, which takes half a second to import

        columns = min(len(self.images), 7)
        rows = -(-len(self.images) // columns)
        figure = Plot(figsize=(1.5 * columns, 1.75 * rows + 0.5), layout="constrained")
        figure.suptitle(self.prompt, wrap=True)
        for i, axes in enumerate(figure.subplots(rows, columns, squeeze=False).flat):
            axes.set_axis_off()
            if i < len(self.images):
                axes.imshow(self.images[i], interpolation="nearest")
                axes.set_title(layer_title(self.layers[i]), fontsize=10)
        return figure

    def preview(self) -> Image.Image:
        return self.grid()

    def sections(self) -> list[Section]:
        shown = zip(map(layer_title, self.layers), self.images, self.outputs or self.images)
        return [ImageSection("", {"": {title: media_of(image, output, self.rate) for title, image, output in shown}})]

    def files(self) -> dict[str, Callable[[Path], None]]:
        files: dict[str, Callable[[Path], None]] = {"grid.png": self.grid().save}
        files |= {f"{layer_file(layer)}.png": image.save for layer, image in zip(self.layers, self.images)}
        for layer, output in zip(self.layers, self.outputs):
            files |= files_of(layer_file(layer), output, self.rate)
        return files

    def record(self) -> dict[str, Any]:
        return {
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


@takes_inverted
@repeatable
@where_the_model_is
def diffusion_lens(
    model: DiffusionModel,
    prompt: str,
    *,
    encoder: str | None = None,
    layers: Layers = None,
    isolate: bool = False,
    norm: bool = False,
    pooled: str = "layer",
    batch_size: int | None = None,
    seed: int = 0,
    progress: bool = True,
    **arguments: Any,
) -> DiffusionLensResult:
    """Draw `prompt` from each of `layers` of a text encoder, always with the same seed.

        diffusion_lens(model, "a red circle below a blue square", layers=["embedding", 3, -1], num_inference_steps=20)
        diffusion_lens(sdxl, "a cat on a mat", encoder="text_encoder_2", isolate=True, norm=True, batch_size=8)

    The text encoders run once. Then the layers are rows of one call of the pipeline, or of several calls with
    `batch_size` rows each. If a pipeline cannot draw them together, each layer gets a call of its own, with a
    LensWarning. An image from a batch equals the same image drawn alone up to rounding, at most 2 of 255 per pixel. It
    is equal bit for bit only with `batch_size=1`. Unless `isolate` is set, the image of the last layer that the
    pipeline uses equals the image of `model.generate(prompt)` in the same way.

    Args:
        model: The pipeline.
        prompt: The prompt.
        encoder: The name of the text encoder, see `model.encoders`. Default: the first whose tokens the pipeline uses.
        layers: Layer i is the output of `layers[i]`, -1 the last, and "embedding" the input of the first: an integer, a
            slice, or a list of them. Default: the embedding and all layers up to the last that the pipeline uses
            (`layers[-2]` in SDXL).
        isolate: Give the other text encoders an empty prompt, so that only this encoder knows what to draw.
        norm: Apply the final norm even where the pipeline uses hidden states without it (SDXL, the CLIPs of SD3,
            Lumina). Where the pipeline applies it, every layer goes through it in any case.
        pooled: Which pooled vector to use, if the pipeline uses this encoder's (the second of SDXL, the CLIPs of SD3,
            the CLIP of FLUX). "layer": the vector that the encoder's norm, pooling and projection compute from the
            layer. "full": the vector of the whole encoder, which knows the prompt at every layer. Other encoders keep
            their own pooled vectors; with `isolate`, those of an empty prompt.
        batch_size: The number of rows in a call. Default: all.
        seed: The seed of every image.
        progress: Whether to show a progress bar.
        inverted: The result of `invert` for an image, to apply the lens to that image. Omit the seed and the number
            of steps, see [inversion](../lenses/inversion.md).
        arguments: Arguments of the pipeline. With guidance, the negative prompt goes through all layers.

    Returns:
        The images by layer.

    Raises:
        InputError: Before anything is drawn, if the prompt is empty or the encoder's tokenizer truncates it, the
            encoder or a layer does not exist, the seed is invalid, or no use of the encoder was found.
    """
    check_call("diffusion_lens", model, prompt, seed, batch_size, arguments)
    check_options(diffusion_lens, model, arguments)
    check_pooled(pooled)
    model.check(prompt=prompt, seed=seed, **arguments)  # before anything runs, and warns once
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PromptWarning)
        reading = read_layers(
            model, prompt, seed, arguments, encoder=encoder, layers=layers, isolate=isolate, norm=norm
        )
        outputs = draw_layers([reading], pooled, batch_size, progress)[0]
    return DiffusionLensResult(
        images=tuple(map(image_of, outputs)),
        layers=reading.layers,
        prompt=prompt,
        seed=int(seed),
        model=model.source,
        arguments=arguments,
        encoder=reading.encoder.name,
        isolate=isolate,
        norm=norm,
        pooled=pooled,
        outputs=outputs,
        rate=rate_of(model),
    )
