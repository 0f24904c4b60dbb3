"""The figure of steering vectors: the contrast between positive and negative prompts by layer or step."""

from collections.abc import Mapping, Sequence

import torch
from matplotlib.figure import Figure

from diffsight.lenses.results.denoising_plots import step_curves
from diffsight.lenses.results.figure import COLORS, Plot, layer_positions, name_layers, set_heading
from diffsight.lenses.visits.named_points import PointName

_LABEL = "contrast / length"
_CURVES = len(COLORS)


def contrast_figure(contrast: Mapping[PointName, torch.Tensor], title: str) -> Figure:
    """Draw contrasts by layer, by path, or by step with a curve for each of the modules with the most contrast."""
    if next(iter(contrast.values())).ndim:
        most = sorted(contrast, key=lambda name: -float(contrast[name].mean()))[:_CURVES]
        curves = {label: contrast[name].tolist() for label, name in zip(short_paths(most), most)}
        return step_curves(curves, range(len(contrast[most[0]])), _LABEL, title)
    values = [float(value) for value in contrast.values()]
    if all(isinstance(name, int) or name == "embedding" for name in contrast):
        figure = Plot(figsize=(4.5, 2.8), layout="constrained")
        axes = figure.add_subplot()
        axes.plot(layer_positions(list(contrast)), values, "o", color=COLORS[0], markersize=4)
        name_layers(axes, list(contrast))
        axes.set_ylabel(_LABEL, size=8)
        axes.set_ylim(bottom=0)
    else:
        figure = Plot(figsize=(6, 0.8 + 0.2 * len(contrast)), layout="constrained")
        axes = figure.add_subplot()
        axes.barh(range(len(values)), values, height=0.6, color=COLORS[0])
        axes.set_yticks(range(len(values)), short_paths(list(contrast)))
        axes.invert_yaxis()
        axes.set_xlabel(_LABEL, size=8)
    axes.tick_params(labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)
    set_heading(figure, title)
    return figure


def short_paths(paths: Sequence[PointName]) -> list[str]:
    """Return paths without the names that all of them begin and end with: "up_blocks[0]" of "unet.up_blocks[0].attn2".

    If nothing would be left of a path, all of them stay whole."""
    names = [str(path).split(".") for path in paths]
    shortest = min(map(len, names))
    start = next((i for i in range(shortest) if len({path[i] for path in names}) > 1), shortest)
    stop = next((i for i in range(shortest) if len({path[-1 - i] for path in names}) > 1), shortest)
    short = [".".join(path[start : len(path) - stop]) for path in names]
    return short if all(short) else [".".join(path) for path in names]
