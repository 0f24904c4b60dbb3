"""Prompt swap: which cross-attention layers of a denoiser bring a word of the prompt into the image?

    result = prompt_swap(pipeline, "a red circle", "a blue circle", metric=shapes_verdict("blue circle"), window=2)
    result.grid()
    result.values                   # (windows,): the metric with the other prompt in these layers only

In a window of neighbouring cross-attention layers, the keys and values of the conditional branch are computed from
another prompt's encoding; all other layers read the prompt itself. Where the image changes to what the other prompt
says, these layers carry it (LocoGen: Basu et al., "On Mechanistic Knowledge Localization in Text-to-Image Generative
Models", 2024, section 4).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from PIL import Image
from safetensors.torch import save_file
from tqdm.auto import tqdm

from diffsight.errors import InputError
from diffsight.lenses.denoising.call_checks import check_one_image
from diffsight.lenses.denoising.inverted_images import takes_inverted
from diffsight.lenses.metrics.metric import Metric, Outcome, as_metric
from diffsight.lenses.results.calls import repeatable
from diffsight.lenses.results.effect_plots import effect_bars
from diffsight.lenses.results.figure import write_figure
from diffsight.lenses.results.image_grid import image_grid
from diffsight.lenses.results.result import LensResult
from diffsight.lenses.results.sections import CurveSection, ImageSection, Section
from diffsight.lenses.tokens.choosing import check_count
from diffsight.lenses.tracing.image_rows import draw_rows, part_of_outcome
from diffsight.lenses.tracing.image_trace import check_rows
from diffsight.lenses.visits.named_points import NamedPoint, named_points
from diffsight.lenses.visits.visiting import Visit, visiting
from diffsight.pipelines.diffusion.model import DiffusionModel

_CELL = 128  # pixels of an image in a grid
_COLUMNS = 7


@dataclass(frozen=True, eq=False)
class PromptSwap(LensResult):
    """Images and a metric by window of cross-attention layers.

    `save(folder)` writes `grid.png`, `values.png`, `values.safetensors`, an image for each window (`window_00.png`) and
    `lens.json`.

    Attributes:
        images: The image of each window.
        windows: The cross-attention layers of each window, by number.
        layers: The paths of all cross-attention layers, in the order in which they run.
        values: The metric of each window, (windows,).
        prompt: The prompt.
        other: The prompt that the layers of a window read.
        image: The image of the prompt.
        other_image: The image of the other prompt.
        prompt_value: The metric of the image of the prompt.
        other_value: The metric of the image of the other prompt.
        metric: The name of the metric.
        passes: The number of calls of the pipeline.
        seed: The seed of every image.
        model: The name of the model.
        arguments: The arguments of the pipeline.
    """

    images: tuple[Image.Image, ...] = field(repr=False)
    windows: tuple[range, ...]
    layers: tuple[str, ...] = field(repr=False)
    values: torch.Tensor
    prompt: str
    other: str
    image: Image.Image = field(repr=False)
    other_image: Image.Image = field(repr=False)
    prompt_value: float
    other_value: float
    metric: str
    passes: int
    seed: int
    model: str
    arguments: Mapping[str, Any]

    def grid(self) -> Image.Image:
        """Return all images in one: those of the two prompts, and one for each window."""
        images = [self.image, self.other_image, *self.images]
        titles = ["prompt", "other prompt", *self._names()]
        return image_grid(images, titles=titles, title=self._title(), columns=min(_COLUMNS, len(images)), cell=_CELL)

    def plot(self) -> Figure:
        """Plot the metric of each window."""
        return effect_bars(self.values, None, self._names(), self._title(), self.metric)

    def preview(self) -> Image.Image:
        return self.grid()

    def sections(self) -> list[Section]:
        images = dict(zip(["prompt", "other prompt", *self._names()], [self.image, self.other_image, *self.images]))
        curve = CurveSection(self.metric, "layers", self._names(), {self.metric: self.values.tolist()}, self.metric)
        return [ImageSection("", {"": images}), curve]

    def files(self) -> dict[str, Callable[[Path], None]]:
        files = {"grid.png": self.grid().save, "values.png": partial(write_figure, self.plot)}
        files["values.safetensors"] = partial(save_file, {"values": self.values.contiguous()})
        return files | {f"window_{i:02}.png": image.save for i, image in enumerate(self.images)}

    def record(self) -> dict[str, Any]:
        kept = ("model", "prompt", "other", "metric", "prompt_value", "other_value", "passes", "seed")
        record = {"lens": "prompt_swap"} | {name: getattr(self, name) for name in kept}
        record |= {"layers": list(self.layers), "windows": [list(window) for window in self.windows]}
        return record | {"values": self.values.tolist(), "arguments": dict(self.arguments)}

    def _title(self) -> str:
        return f"“{self.other}” in layers of “{self.prompt}”"

    def _names(self) -> list[str]:
        return [f"{w[0]}" if len(w) == 1 else f"{w[0]} to {w[-1]}" for w in self.windows]


@takes_inverted
@repeatable
def prompt_swap(
    model: DiffusionModel,
    prompt: str,
    other: str,
    metric: Metric | Callable[[Outcome], Any],
    *,
    window: int = 1,
    batch_size: int | None = None,
    seed: int = 0,
    progress: bool = True,
    **arguments: Any,
) -> PromptSwap:
    """Draw `prompt` with windows of cross-attention layers that read `other` instead, and measure each image.

        prompt_swap(model, "a red circle", "a blue circle", shapes_verdict("blue circle"))

    The images are rows of one call.

    Args:
        model: A pipeline whose denoiser has cross-attention.
        prompt: The prompt.
        other: The prompt that the layers of a window read.
        metric: A metric such as `shapes_verdict`, or a function of the result of one row that returns a number.
        window: The number of neighbouring layers that are swapped together.
        batch_size: The number of rows in a call, of which two are the prompts themselves. Default: all.
        seed: The seed of every image.
        progress: Whether to show a progress bar.
        inverted: The result of `invert` for an image, to apply the lens to that image. Omit the seed and the number
            of steps, see [inversion](../lenses/inversion.md).
        arguments: Arguments of the pipeline.

    Raises:
        InputError: Before anything is drawn, if an argument is not valid or there are fewer than `window`
            cross-attention layers; also if the denoiser masks the two prompts differently.
    """
    check_one_image(prompt_swap, model, prompt, seed, batch_size, arguments)
    if not isinstance(other, str):
        raise InputError(f"other is a prompt, a string, not {type(other).__name__}")
    if batch_size is not None and batch_size < 3:
        raise InputError(f"batch_size must be 3 or more, for both prompts and a window, not {batch_size}")
    for text in (prompt, other):
        model.check(prompt=text, seed=seed, **arguments)
    measured = as_metric(metric).bound(model, 1)
    paths = [attention.path for attention in model.attentions.of_kind("cross")]
    if not paths:
        raise InputError(f"the denoiser of {type(model.pipeline).__name__} has no cross-attention")
    window = check_count("window", window, len(paths))
    windows = [range(start, start + window) for start in range(len(paths) - window + 1)]
    size, images, values = (batch_size or len(windows) + 2) - 2, [], []
    with tqdm(desc="windows", total=len(windows), disable=not progress) as bar:
        for start in range(0, len(windows), size):
            some = windows[start : start + size]
            outcome = _draw(model, prompt, other, paths, some, seed, measured, arguments)
            images += outcome.images[2:]
            first = part_of_outcome(outcome, 0, 1)
            names = [f"the prompt {text!r}" for text in (prompt, other)]
            names += [f"{names[0]} with {other!r} in the cross-attentions {list(swapped)}" for swapped in some]
            values.append(measured.measure(outcome, first, 0, names))
            bar.update(len(some))
    return PromptSwap(
        images=tuple(images),
        windows=tuple(windows),
        layers=tuple(paths),
        values=torch.cat([part[2:] for part in values]),
        prompt=prompt,
        other=other,
        image=outcome.images[0],
        other_image=outcome.images[1],
        prompt_value=float(values[0][0]),
        other_value=float(values[0][1]),
        metric=measured.name,
        passes=len(values),
        seed=int(seed),
        model=model.source,
        arguments=arguments,
    )


def _draw(
    model: DiffusionModel,
    prompt: str,
    other: str,
    paths: Sequence[str],
    windows: Sequence[range],
    seed: int,
    metric: Metric,
    arguments: Mapping[str, Any],
) -> Outcome:
    """Draw both prompts, and a row for each window."""
    rows = [prompt, other, *[prompt] * len(windows)]
    swapped = {}
    for number, path in enumerate(paths):
        swapped[path] = [i for i, window in enumerate(windows, 2) if number in window]

    def swap(visit: Visit) -> torch.Tensor | None:
        check_rows(visit, len(rows))
        places = swapped[visit.point.path.rpartition(".")[0]]
        value = visit.value.clone()
        value[places] = visit.value[1]
        return value if places else None

    def check_mask(visit: Visit) -> None:
        mask = visit.run.cond[visit.point.path].inputs[1].get("attention_mask")
        if isinstance(mask, torch.Tensor) and len(mask) == len(rows) and not torch.equal(mask[0], mask[1]):
            raise InputError(
                f"{visit.point.path} masks the padding of the two prompts differently: choose prompts with the same "
                "number of tokens"
            )

    points = named_points(model, [f"{path}.{name}.input" for path in paths for name in ("to_k", "to_v")])
    checked = visiting(model, [NamedPoint(path, path, is_input=True) for path in paths[:1]], check_mask)
    return draw_rows(visiting(checked, points, swap), rows, seed, metric, arguments)
