"""The logit lens on a picture: what a vision-language model would say at each patch of it, layer by layer.

    result = image_token_lens(model, "What is this?", "cat.png", tokens=[" cat", " dog"])
    result.plot(20)                 # the words of layer 20, patch by patch, on the picture
    result.maps()                   # where the tokens are likely, by layer

The hidden states of the image tokens are read as those of words (Neo et al., "Towards Interpreting Visual Information
Processing in Vision-Language Models", ICLR 2025).
"""

from collections.abc import Sequence
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
from diffsight.lenses.logit_lens import logit_lens
from diffsight.lenses.results import plots
from diffsight.lenses.results.saving import save_files, write_record
from diffsight.lenses.tokens.batches import Layers, Tokens
from diffsight.lenses.tokens.predictions import LensPredictions
from diffsight.pipelines.vision_language.model import VisionLanguageModel


@dataclass(frozen=True)
class ImageTokenPredictions:
    """Predictions at the tokens of a picture: `predictions` has them one after the other, `shape` says in how many rows
    and columns they lie on the picture. `picture` is what the patches are of: cropped where the processor crops."""

    predictions: LensPredictions
    shape: tuple[int, int]
    picture: Image.Image = field(repr=False)

    @property
    def layers(self) -> tuple[int, ...]:
        return self.predictions.layers

    def words(self, layer: int) -> list[list[str]]:
        """The likeliest token of every patch, (rows, columns), at a layer by its number in the model."""
        words = self.predictions.words[0][self._number(layer)]
        return [words[start : start + self.shape[1]] for start in range(0, len(words), self.shape[1])]

    def probabilities(self, token: int | None = None) -> torch.Tensor:
        """By layer and patch, (layers, rows, columns): of the likeliest token, or of a chosen one by its number among
        those chosen."""
        found = self.predictions
        if token is None:
            return found.probabilities[0, :, :, 0].unflatten(1, self.shape)
        self._check_tokens()
        return found.token_probabilities[0, :, :, token].unflatten(1, self.shape)

    def plot(self, layer: int = -1) -> Figure:
        """The likeliest token of every patch on the picture, at a layer (-1: the last)."""
        layer = self.layers[layer] if layer < 0 else layer
        title = f"{self.predictions.prompts[0]} (layer {layer})"
        return plots.words_on_picture(self.picture, self.words(layer), title)

    def maps(self, layers: Sequence[int] | None = None) -> Figure:
        """Where the chosen tokens are likely on the picture: a row a token, a column a layer (up to six of them)."""
        self._check_tokens()
        chosen = self.layers if layers is None else tuple(layers)
        if layers is None and len(chosen) > 6:
            chosen = tuple(chosen[round(i * (len(chosen) - 1) / 5)] for i in range(6))
        numbers = [self._number(layer) for layer in chosen]
        names = self.predictions.token_names
        shown = {name: self.probabilities(i)[numbers] for i, name in enumerate(names)}
        return plots.maps_on_picture(self.picture, shown, chosen, self.predictions.prompts[0])

    def save(self, folder: str | Path) -> list[Path]:
        """Writes `picture.png`, a picture of the words a layer (`layer_04.png`), `maps.png` where tokens were chosen,
        `lens.json` and `lens.safetensors`; gives their paths. All files are written or none."""
        found = self.predictions
        record = {
            "lens": "image_token_lens",
            "model": found.model,
            "prompt": found.prompts[0],
            "shape": list(self.shape),
            "layers": list(self.layers),
            "words": {str(layer): self.words(layer) for layer in self.layers},
            "tokens": [{"id": token, "text": found.texts[token]} for token in found.tokens],
        }
        files = {"picture.png": self.picture.save, "lens.json": partial(write_record, record)}
        files |= {f"layer_{n:02}.png": partial(plots.write, partial(self.plot, n)) for n in self.layers}
        files |= {"maps.png": partial(plots.write, self.maps)} if found.tokens else {}
        files["lens.safetensors"] = partial(save_file, found.numbers())
        return save_files(folder, files)

    def _repr_png_(self) -> bytes:
        return self.plot()._repr_png_()

    def _number(self, layer: int) -> int:
        if layer not in self.layers:
            raise InputError(f"layer {layer!r} was not looked at: there are {', '.join(map(str, self.layers))}")
        return self.layers.index(layer)

    def _check_tokens(self) -> None:
        if not self.predictions.tokens:
            raise InputError("no tokens were chosen, so there are no maps: give the lens tokens=[' cat', …]")


def image_token_lens(
    model: VisionLanguageModel,
    prompt: Any,
    image: Any,
    *,
    layers: Layers = None,
    top_k: int = 5,
    tokens: Tokens = None,
) -> ImageTokenPredictions:
    """Reads what each of `layers` gives at the tokens of a picture as predictions, and lays them on the picture.

        image_token_lens(model, "What is this?", picture, layers=range(0, 32, 4), tokens=" cat")

    `prompt` is a text or chat messages, `image` one picture; `layers`, `top_k` and `tokens` are as in `logit_lens`.

    Raises InputError, before anything runs, for a model that does not see or whose image tokens lie on no grid, and
    what `logit_lens` raises."""
    if not isinstance(model, VisionLanguageModel):
        raise InputError(f"image_token_lens takes a VisionLanguageModel, not {type(model).__name__}")
    if isinstance(image, (list, tuple)):
        raise InputError(f"image_token_lens takes one picture, not a list of {len(image)}")
    run = model.trace(prompt, images=image)
    grids = run.image_grids[0]
    if not grids:
        raise InputError("there is no picture among the inputs")
    grid, where = grids[0], grids[0].flatten().tolist()
    found = logit_lens(model, prompt, layers=layers, positions=where, top_k=top_k, tokens=tokens, images=image)
    with torch.no_grad(), run:
        pixels = run.inputs[1].get("pixel_values")
        run.stop()
    return ImageTokenPredictions(found, (index(grid.shape[0]), index(grid.shape[1])), _picture(image, pixels))


def _picture(image: Any, pixels: torch.Tensor | None) -> Image.Image:
    """The picture that the patches are of: as the processor made it, where that is a picture, else the given one."""
    if isinstance(pixels, torch.Tensor) and pixels.ndim == 4 and len(pixels) == 1 and pixels.shape[1] == 3:
        low, high = pixels.amin(), pixels.amax()
        seen = ((pixels[0] - low) / (high - low).clamp(min=1e-6) * 255).round().byte()
        return Image.fromarray(seen.permute(1, 2, 0).cpu().numpy())
    if isinstance(image, (str, Path)):
        with Image.open(image) as opened:
            return opened.convert("RGB")
    if isinstance(image, torch.Tensor):
        image = image if image.is_floating_point() else image / 255
        return Image.fromarray((image.clamp(0, 1) * 255).byte().permute(1, 2, 0).cpu().numpy())
    return image.convert("RGB")
