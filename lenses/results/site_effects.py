"""The result of patching, attribution and ablation: a number for each site and each position or step.

result = activation_patching(model, clean, corrupted, logit_difference(" Paris", " Rome"))
result.effect                   # (sites, columns): 0 leaves the run as it was, 1 turns it into the other one
result.top(5)
result.plot()
result.save("patching")
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from safetensors.torch import save_file

from diffsight.errors import InputError
from diffsight.lenses.layers import layer_title
from diffsight.lenses.metrics.metric import normalised
from diffsight.lenses.results.effect_plots import comparison, effect_bars, effect_map
from diffsight.lenses.results.figure import write_figure
from diffsight.lenses.results.result import LensResult
from diffsight.lenses.results.sections import CurveSection, HeatMapSection, Section, distinct
from diffsight.lenses.sites.site import Site
from diffsight.lenses.tokens.choosing import check_count

_LABELS = {"activation_patching": "patching", "attribution_patching": "attribution", "block_ablation": "ablation"}


class TopSite(NamedTuple):
    """A site with a large effect: its name, the column, and the effect."""

    site: str
    column: str
    effect: float


@dataclass(frozen=True, eq=False)
class SiteEffects(LensResult):
    """A number for each site and column, where a column is a position, a region or a window of steps.

    `save(folder)` writes `lens.json`, `effects.safetensors` (values, effect, spread and baselines) and `effects.png`.

    Attributes:
        lens: The name of the lens.
        model: The name of the model.
        clean: The clean prompts.
        corrupted: The corrupted prompts. Empty for an ablation.
        into: Which of the two runs was changed.
        metric: The name of the metric.
        sites: The sites.
        columns: The names of the columns.
        axis: The kind of the columns: "position", "region", "step".
        values: The metric by pair, site and column, (pairs, sites, columns).
        source: The metric of the run that values come from, (pairs,), or (pairs, columns) where each column has its
            own. 0 for an ablation.
        target: The metric of the run that was changed, without the change, of the same shape.
        passes: The number of forward passes of the model that were needed.
        arguments: Further arguments of the model.
    """

    lens: str
    model: str
    clean: tuple[str, ...]
    corrupted: tuple[str, ...]
    into: str
    metric: str
    sites: tuple[Site, ...] = field(repr=False)
    columns: tuple[str, ...] = field(repr=False)
    axis: str
    values: torch.Tensor = field(repr=False)
    source: torch.Tensor
    target: torch.Tensor
    passes: int
    arguments: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @property
    def clean_metric(self) -> torch.Tensor:
        """The metric of the clean runs, (pairs,), or (pairs, columns) where each column has its own."""
        return self.source if self.into == "corrupted" else self.target

    @property
    def corrupted_metric(self) -> torch.Tensor:
        """The metric of the corrupted runs, of the same shape."""
        return self.target if self.into == "corrupted" else self.source

    @property
    def is_normalised(self) -> bool:
        """Whether the effect is a share of the difference between the two runs. This is not the case for an ablation,
        or if the metric does not distinguish the runs of a pair."""
        return self.lens != "block_ablation" and bool((self.source != self.target).all())

    @property
    def effects(self) -> torch.Tensor:
        """The effect by pair, (pairs, sites, columns): see `normalised`. 0 means no change, 1 the metric of the other
        run. Without normalisation, value - target."""
        source, target = (ends.reshape(len(self.values), 1, -1) for ends in (self.source, self.target))
        return normalised(self.values, source, target) if self.is_normalised else self.values - target

    @property
    def effect(self) -> torch.Tensor:
        """The mean effect over pairs, (sites, columns)."""
        return self.effects.mean(0)

    @property
    def spread(self) -> torch.Tensor:
        """The standard deviation of the effect over pairs, (sites, columns). 0 for a single pair."""
        return self.effects.std(0) if len(self.values) > 1 else torch.zeros(self.values.shape[1:])

    def top(self, count: int = 10) -> list[TopSite]:
        """Return the sites and columns with the largest effects, of either sign."""
        effect = self.effect
        count = min(check_count("count", count), effect.numel())
        order = effect.abs().nan_to_num(-1).flatten().topk(count).indices.tolist()
        width = effect.shape[1]
        return [
            TopSite(self.sites[i // width].name, self.columns[i % width], float(effect[i // width, i % width]))
            for i in order
        ]

    def plot(self) -> Figure:
        """Plot the mean effect: a map of sites and columns, of layers and heads, or bars."""
        rows, columns, values, axis = self._table()
        if len(columns) == 1:
            spread = self.spread[:, 0] if len(self.values) > 1 else None
            return effect_bars(values[:, 0], spread, rows, self._title(), self._label())
        return effect_map(values, rows, columns, axis, self._title(), self._label())

    def compare(self, other: "SiteEffects") -> "EffectComparison":
        """Compare these effects with those of another method on the same sites, columns and prompts.

            attribution_patching(…).compare(activation_patching(…)).correlation

        Raises:
            InputError: The results have different sites, columns or directions.
        """
        if not isinstance(other, SiteEffects):
            raise InputError(f"compare takes a result of the same kind, not {type(other).__name__}")
        if (self.sites, self.columns, self.into) != (other.sites, other.columns, other.into):
            raise InputError("the results have different sites, columns or directions, so they cannot be compared")
        return EffectComparison(self, other)

    def _table(self) -> tuple[list[str], list[str], torch.Tensor, str]:
        """Return the rows, the columns, the mean effects and the axis of the plot. If every point has the
        same heads, they become the columns."""
        effect, points = self.effect, list(dict.fromkeys(site.point for site in self.sites))
        heads = [[site.head for site in self.sites if site.point == point] for point in points]
        if len(self.columns) == 1 and None not in heads[0] and all(one == heads[0] for one in heads):
            rows = [replace(site, head=None) for site in self.sites[:: len(heads[0])]]
            return _names(rows), list(map(str, heads[0])), effect.reshape(len(points), -1), "head"
        return _names(self.sites), list(self.columns), effect, self.axis

    def _title(self) -> str:
        method, values = _LABELS[self.lens], {site.named_in_layer for site in self.sites}
        method = f"{method} of {values.pop()}" if len(values) == 1 and None not in values else method
        if len(self.clean) > 1:
            return f"{method}: {len(self.clean)} prompts"
        if not self.corrupted:
            return f"{method}: {self.clean[0]}"
        first, second = (
            (self.clean[0], self.corrupted[0])
            if self.into == "corrupted"
            else (
                self.corrupted[0],
                self.clean[0],
            )
        )
        return f"{method}: “{first}” into “{second}”"

    def _label(self) -> str:
        return f"{self.metric}, share of the difference" if self.is_normalised else f"change of {self.metric}"

    def preview(self) -> Figure:
        return self.plot()

    def sections(self) -> list[Section]:
        rows, columns, values, axis = self._table()
        title = self._title()
        if len(columns) == 1:
            return [CurveSection(title, "site", rows, {columns[0]: values[:, 0].tolist()}, label=self._label())]
        return [HeatMapSection(title, distinct(rows), distinct(columns), values, self._label(), ("site", axis))]

    def files(self) -> dict[str, Callable[[Path], None]]:
        tensors = {name: getattr(self, name) for name in ("values", "effect", "spread", "source", "target")}
        tensors = {name: value.contiguous() for name, value in tensors.items()}
        return {
            "effects.safetensors": partial(save_file, tensors),
            "effects.png": partial(write_figure, self.plot),
        }

    def record(self) -> dict[str, Any]:
        kept = ("lens", "model", "into", "metric", "axis", "passes")
        return {name: getattr(self, name) for name in kept} | {
            "prompts": list(self.clean),
            "corrupted": list(self.corrupted),
            "clean_metric": self.clean_metric.tolist(),
            "corrupted_metric": self.corrupted_metric.tolist(),
            "sites": [site.name for site in self.sites],
            "columns": list(self.columns),
            "top": [list(one) for one in self.top()],
            "arguments": dict(self.arguments),
        }


def _names(sites: Sequence[Site]) -> list[str]:
    """Return the names of sites in a figure: their layers, if each layer has one site."""
    layers = [site.layer for site in sites]
    if None in layers or len(set(layers)) < len(layers):
        return [site.name for site in sites]
    return [layer_title(layer) for layer in layers]


@dataclass(frozen=True)
class EffectComparison:
    """The effects of two methods, site by site.

    Attributes:
        first: The effects on which `compare` was called.
        second: The effects passed to `compare`.
    """

    first: SiteEffects
    second: SiteEffects

    @property
    def correlation(self) -> float:
        """Pearson's correlation of the mean effects over all sites and columns."""
        pair = torch.stack([self.first.effect.flatten(), self.second.effect.flatten()])
        return float(torch.corrcoef(pair)[0, 1])

    def plot(self) -> Figure:
        """Plot the second method's effects against the first's."""
        names = tuple(_LABELS[one.lens] for one in (self.second, self.first))
        effects = self.second.effect, self.first.effect
        return comparison(*effects, names, self.correlation, self.first.metric)
