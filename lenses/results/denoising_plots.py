"""Figures and images of denoising steps: curves by step, differences of images, and maps of differences."""

from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from diffsight.lenses.results.figure import COLORS, Plot, set_heading


def step_curves(
    curves: Mapping[str, Sequence[float]], steps: Sequence[int], label: str, title: str, axis: str = "step"
) -> Figure:
    """Draw a curve by step for each name. `label` names the values, `axis` the steps."""
    figure = Plot(figsize=(5.2, 2.9), layout="constrained")
    axes = figure.add_subplot()
    style = "o-" if len(steps) <= 60 else "-"
    for i, (name, values) in enumerate(curves.items()):
        axes.plot(steps, values, style, color=COLORS[i % len(COLORS)], markersize=3, linewidth=1.4, label=name)
    axes.set_xlabel(axis, size=8)
    axes.set_ylabel(label, size=8)
    axes.set_ylim(bottom=0)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.tick_params(labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right center", frameon=False, fontsize=7)
    set_heading(figure, title)
    return figure


def difference_image(image: Image.Image, other: Image.Image) -> Image.Image:
    """Return half the difference of two images, added to medium gray, which means no difference."""
    difference = _pixels(image) - _pixels(other)
    return Image.fromarray((127.5 + difference / 2).round().astype(np.uint8))


def difference_maps(images: Sequence[Image.Image], others: Sequence[Image.Image]) -> tuple[Image.Image, ...]:
    """Return the norm of the difference at each pixel for each pair of images, in colours with one scale for all."""
    norms = [np.linalg.norm(_pixels(a) - _pixels(b), axis=-1) for a, b in zip(images, others, strict=True)]
    largest = max((norm.max() for norm in norms), default=0) or 1
    colors = matplotlib.colormaps["viridis"]
    return tuple(Image.fromarray((colors(norm / largest)[..., :3] * 255).round().astype(np.uint8)) for norm in norms)


def _pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB"), dtype=float)
