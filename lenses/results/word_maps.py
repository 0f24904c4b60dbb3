"""The result of `attention_maps` and `attention_from`: maps of words, or of a place, over an image.

result["circle"]                    # (rows, columns)
result.overlay("circle"), result.grid(), result.plot()
result.mask("circle", 0.5)
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from safetensors.torch import save_file

from diffsight.errors import InputError, UnknownKeyError, suggest
from diffsight.lenses.results.figure import Plot, set_heading, write_figure
from diffsight.lenses.results.image_grid import image_grid
from diffsight.lenses.results.overlays import at_size, overlay
from diffsight.lenses.results.result import LensResult
from diffsight.lenses.results.sections import OverlaySection, Section, distinct
from diffsight.pipelines.argument_types import fits


@dataclass(frozen=True, eq=False)
class AttentionMaps(LensResult):
    """Where in an image words are attended to.

    `save(folder)` writes `image.png`, `grid.png`, an overlay for each word (`word_00.png`, …), `maps.png`,
    `maps.safetensors` and `lens.json`.

    Attributes:
        maps: (words, rows, columns); (words, frames, rows, columns) for a video.
        words: The words. For `attention_from`, the position.
        image: The image; the middle frame of a video.
        frames: The frames of a video.
        prompt: The prompt.
        seed: The seed of the image.
        model: The name of the model.
        arguments: The arguments of the pipeline.
        method: "cross", "concept" or "from".
        layers: The paths of the attention modules.
        kept: The kind of `parts`: "steps", "layers" or "heads". None if there are no parts.
        parts: The maps of each step, layer or head, by its name.
    """

    maps: torch.Tensor = field(repr=False)
    words: tuple[str, ...]
    image: Image.Image = field(repr=False)
    frames: tuple[Image.Image, ...] = field(repr=False)
    prompt: str
    seed: int
    model: str
    arguments: Mapping[str, Any]
    method: str
    layers: tuple[str, ...] = field(repr=False)
    kept: str | None = None
    parts: Mapping[str, torch.Tensor] = field(default_factory=dict, repr=False)

    def overlay(self, word: str, frame: int | None = None) -> Image.Image:
        """Return the image under the map of a word. For a video, `frame` is one of its frames (default: the middle)."""
        return overlay(*self._shown(word, frame))

    def grid(self) -> Image.Image:
        """Return the image and the overlays of all words in one image."""
        images = [self.image, *(self.overlay(word) for word in self.words)]
        return image_grid(images, titles=["", *self.words], title=f"{self.prompt} (seed {self.seed})")

    def plot(self, word: str | None = None) -> Figure:
        """Plot the maps of all words, or the map of one word, by step, layer or head if these were kept."""
        if word is None:
            heats, titles = list(self.maps), list(self.words)
        elif not self.parts:
            heats, titles = [self[word]], [word]
        else:
            heats = [maps[self._index(word)] for maps in self.parts.values()]
            titles = _titles(list(self.parts)) if self.kept == "layers" else list(self.parts)
        columns = min(len(heats), 8)
        lines = -(-len(heats) // columns)
        figure = Plot(figsize=(1.3 * columns + 0.2, 1.6 * lines + 0.5), layout="constrained")
        set_heading(figure, self.prompt if word is None else f"{word}: {self.prompt}")
        most = max(float(heat.max()) for heat in heats)
        panels = figure.subplots(lines, columns, squeeze=False).flatten()
        for axes in panels:
            axes.set_axis_off()
        for axes, heat, title in zip(panels, heats, titles):
            axes.imshow((heat if heat.ndim == 2 else heat.mean(0)).numpy(), cmap="inferno", vmin=0, vmax=most)
            axes.set_title(title, fontsize=7)
        return figure

    def mask(self, word: str, threshold: float = 0.5, frame: int | None = None) -> np.ndarray:
        """Return where a word's map, scaled to values from 0 to 1, reaches a threshold.

        Returns:
            Booleans in the size of the image, (height, width).

        Raises:
            InputError: The threshold is not between 0 and 1, or the word or the frame is not in the result.
        """
        if not fits(threshold, float) or not 0 <= threshold <= 1:
            raise InputError(f"a threshold is a number between 0 and 1, not {threshold!r}")
        image, heat = self._shown(word, frame)
        return (at_size(heat, image.size[::-1]) >= threshold).numpy()

    def __getitem__(self, word: str) -> torch.Tensor:
        """Return the map of a word, (rows, columns), or (frames, rows, columns) for a video."""
        return self.maps[self._index(word)]

    def __iter__(self) -> Iterator[str]:
        return iter(self.words)

    def __len__(self) -> int:
        return len(self.words)

    def _shown(self, word: str, frame: int | None) -> tuple[Image.Image, torch.Tensor]:
        """Return the image, or a frame of a video, and the map of a word on it."""
        heat, count = self[word], len(self.frames)
        if heat.ndim == 2 and frame is None:
            return self.image, heat
        number = count // 2 if frame is None else frame
        if heat.ndim == 2 or not fits(number, int) or not -count <= number < count:
            known = f"the video has {count} frames, 0 to {count - 1}" if heat.ndim == 3 else "this is one image"
            raise InputError(f"there is no frame {frame!r}: {known}")
        number %= count
        return self.frames[number], heat[_map_of_frame(number, count, len(heat))]

    def _index(self, word: str) -> int:
        if word not in self.words:
            raise UnknownKeyError(
                f"there is no map of {word!r}{suggest(str(word), self.words)}: {', '.join(self.words)}"
            )
        return self.words.index(word)

    def preview(self) -> Image.Image:
        return self.grid()

    def sections(self) -> list[Section]:
        words = distinct(self.words)
        found: list[Section] = [self._section("Attention by word", dict(zip(words, self.maps)))]
        for number, word in enumerate(words):
            if self.parts:
                maps = {name: part[number] for name, part in self.parts.items()}
                found.append(self._section(f"“{word}” by {self.kept.removesuffix('s')}", maps))
        return found

    def _section(self, title: str, maps: Mapping[str, torch.Tensor]) -> OverlaySection:
        """Return maps on the image or, for a video, on its middle frame."""
        shown = {name: heat if heat.ndim == 2 else heat[len(heat) // 2] for name, heat in maps.items()}
        return OverlaySection(title, self.image, shown, label="attention")

    def files(self) -> dict[str, Callable[[Path], None]]:
        files: dict[str, Callable[[Path], None]] = {"image.png": self.image.save, "grid.png": self.grid().save}
        files |= {f"word_{number:02}.png": self.overlay(word).save for number, word in enumerate(self.words)}
        tensors = {"maps": self.maps.contiguous()}
        tensors |= {f"{self.kept}.{name}": maps.contiguous() for name, maps in self.parts.items()}
        return files | {
            "maps.png": partial(write_figure, self.plot),
            "maps.safetensors": partial(save_file, tensors),
        }

    def record(self) -> dict[str, Any]:
        return {
            "lens": "attention_from" if self.method == "from" else "attention_maps",
            "model": self.model,
            "prompt": self.prompt,
            "words": list(self.words),
            "method": self.method,
            "layers": list(self.layers),
            "kept": self.kept,
            "seed": self.seed,
            "arguments": dict(self.arguments),
        }


def _map_of_frame(frame: int, frames: int, maps: int) -> int:
    """Return the number of the map for a frame. Most autoencoders encode the first frame alone, and then several."""
    if frames > 1 and maps > 1 and (frames - 1) % (maps - 1) == 0:
        return -(-frame * (maps - 1) // (frames - 1))
    return frame * maps // frames


def _titles(paths: Sequence[str]) -> list[str]:
    """Return the parts in which paths differ, one part per line."""
    split = [path.split(".") for path in paths]
    first = next((i for i, parts in enumerate(zip(*split)) if len(set(parts)) > 1), len(split[0]))
    last = next((i for i, parts in enumerate(zip(*(reversed(own) for own in split))) if len(set(parts)) > 1), 0)
    return ["\n".join(own[first : len(own) - last] or own[-1:]) for own in split]
