"""The logit lens on an image: what a vision-language model predicts at each image patch, layer by layer.

    result = image_token_lens(model, "What is this?", "cat.png", tokens=[" cat", " dog"])
    result.plot(20)                 # the predictions of layer 20, patch by patch, on the image
    result.maps()                   # where the chosen tokens are likely, by layer

The hidden states of image tokens are read like those of words (Neo et al., "Towards Interpreting Visual Information
Processing in Vision-Language Models", ICLR 2025).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from operator import index
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from PIL import Image
from safetensors.torch import save_file

from diffsight.errors import InputError
from diffsight.lenses.layers import Layer, Layers, find_layer, layer_file, layer_title
from diffsight.lenses.logit_lens import logit_lens
from diffsight.lenses.results.calls import repeatable
from diffsight.lenses.results.figure import write_figure
from diffsight.lenses.results.marked_text import marked
from diffsight.lenses.results.result import LensResult
from diffsight.lenses.results.sections import OverlaySection, Section
from diffsight.lenses.results.token_plots import maps_on_image, words_on_image
from diffsight.lenses.tokens.choosing import Tokens
from diffsight.lenses.tokens.predictions import LensPredictions
from diffsight.lenses.tokens.seen_image import seen_image
from diffsight.lenses.where_models_are import where_the_model_is
from diffsight.pipelines.vision_language.model import VisionLanguageModel

_MAPS = 6  # layers that `maps` shows by default


@dataclass(frozen=True, eq=False)
class ImageTokenPredictions(LensResult):
    """Predictions at the tokens of an image.

    `save(folder)` writes `image.png`, the image with the predictions of each layer (`layer_04.png`, `embedding.png`),
    `maps.png` if tokens were chosen, `lens.json` and `lens.safetensors`.

    Attributes:
        predictions: The predictions, with the image tokens as positions.
        shape: The number of rows and columns in which the image tokens lie on the image.
        image: The image that was divided into patches. It is cropped if the processor crops.
    """

    predictions: LensPredictions
    shape: tuple[int, int]
    image: Image.Image = field(repr=False)

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The layers: non-negative integers, and "embedding" for the input of the first layer."""
        return self.predictions.layers

    def words(self, layer: int | str) -> list[list[str]]:
        """Return the most likely token of each patch at a layer of the model, (rows, columns)."""
        words = self.predictions.words[0][self._find(layer)]
        return [words[start : start + self.shape[1]] for start in range(0, len(words), self.shape[1])]

    def probabilities(self, token: int | None = None) -> torch.Tensor:
        """Return probabilities by layer and patch, (layers, rows, columns).

        Args:
            token: The number of a chosen token, counted from 0. Default: the most likely token of each patch.
        """
        found = self.predictions
        if token is None:
            return found.probabilities[0, :, :, 0].unflatten(1, self.shape)
        self._check_tokens()
        return found.token_probabilities[0, :, :, token].unflatten(1, self.shape)

    def plot(self, layer: int | str | None = None) -> Figure:
        """Plot the most likely token of each patch on the image.

        Args:
            layer: The layer of the model. Default: the last in the result.
        """
        layer = self.layers[-1] if layer is None else self.layers[self._find(layer)]
        title = f"{self.predictions.prompts[0]} ({layer_title(layer)})"
        return words_on_image(self.image, self.words(layer), title)

    def maps(self, layers: Sequence[int | str] | None = None) -> Figure:
        """Plot where the chosen tokens are likely on the image: a row for each token, a column for each layer.

        Args:
            layers: Layers of the model. Default: up to six of those in the result.
        """
        self._check_tokens()
        indices = _spaced(len(self.layers), _MAPS) if layers is None else [self._find(layer) for layer in layers]
        names = self.predictions.token_names
        shown = {name: self.probabilities(i)[indices] for i, name in enumerate(names)}
        return maps_on_image(self.image, shown, [self.layers[i] for i in indices], self.predictions.prompts[0])

    def preview(self) -> Figure:
        return self.plot()

    def sections(self) -> list[Section]:
        titles, likeliest = [layer_title(layer) for layer in self.layers], self.probabilities()
        words = {t: [[marked(w) for w in row] for row in self.words(one)] for t, one in zip(titles, self.layers)}
        found = [OverlaySection("The most likely token of each patch", self.image, dict(zip(titles, likeliest)), words)]
        for i, name in enumerate(self.predictions.token_names):
            found.append(
                OverlaySection(f"Where “{name}” is likely", self.image, dict(zip(titles, self.probabilities(i))))
            )
        return found

    def files(self) -> dict[str, Callable[[Path], None]]:
        files: dict[str, Callable[[Path], None]] = {"image.png": self.image.save}
        files |= {f"{layer_file(one)}.png": partial(write_figure, partial(self.plot, one)) for one in self.layers}
        files |= {"maps.png": partial(write_figure, self.maps)} if self.predictions.tokens else {}
        return files | {"lens.safetensors": partial(save_file, self.predictions.tensors())}

    def record(self) -> dict[str, Any]:
        found = self.predictions
        return {
            "lens": "image_token_lens",
            "model": found.model,
            "prompt": found.prompts[0],
            "shape": list(self.shape),
            "layers": list(self.layers),
            "num_layers": found.num_layers,
            "words": {str(layer): self.words(layer) for layer in self.layers},
            "tokens": [{"id": token, "text": found.texts[token]} for token in found.tokens],
        }

    def _find(self, layer: int | str) -> int:
        return find_layer(layer, self.layers, self.predictions.num_layers)

    def _check_tokens(self) -> None:
        if not self.predictions.tokens:
            raise InputError("there are no maps, because no tokens were chosen: pass tokens=[' cat', …] to the lens")


@repeatable
@where_the_model_is
def image_token_lens(
    model: VisionLanguageModel,
    prompt: Any,
    image: Any,
    *,
    layers: Layers = None,
    top_k: int = 5,
    tokens: Tokens = None,
) -> ImageTokenPredictions:
    """Read the hidden states at the tokens of an image as predictions, and lay them out on the image.

        image_token_lens(model, "What is this?", image, layers=range(0, 32, 4), tokens=" cat")

    Args:
        model: The model.
        prompt: A string or chat messages.
        image: One image.
        layers: As in `logit_lens`.
        top_k: As in `logit_lens`.
        tokens: As in `logit_lens`.

    Returns:
        The predictions by layer and patch.

    Raises:
        InputError: Before anything runs, if the model takes no images or its image tokens form no grid, and in all
            cases in which `logit_lens` raises it.
    """
    if not isinstance(model, VisionLanguageModel):
        raise InputError(f"image_token_lens takes a VisionLanguageModel, not {type(model).__name__}")
    if isinstance(image, (list, tuple)):
        raise InputError(f"image_token_lens takes one image, not a list of {len(image)}")
    run = model.trace(prompt, images=image)
    grids = run.image_grids[0]
    if not grids:
        raise InputError("there is no image among the inputs")
    grid, where = grids[0], grids[0].flatten().tolist()
    found = logit_lens(model, prompt, layers=layers, positions=where, top_k=top_k, tokens=tokens, images=image)
    with torch.no_grad(), run:
        pixels = run.inputs[1].get("pixel_values")
        run.stop()
    return ImageTokenPredictions(found, (index(grid.shape[0]), index(grid.shape[1])), seen_image(image, pixels))


def _spaced(count: int, most: int) -> list[int]:
    """Return all `count` indices, or `most` evenly spaced ones."""
    if count <= most:
        return list(range(count))
    return [round(i * (count - 1) / (most - 1)) for i in range(most)]
