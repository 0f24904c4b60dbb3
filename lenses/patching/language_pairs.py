"""Check the pairs of prompts, the sites and the metric for a language model before anything runs.

pairs = LanguagePairs.of(request, layers=None, align="each")
pairs = pairs.counted(source.values)        # a site for each head
pairs.sites, pairs.pairs[0].columns
pairs.effects(swept, passes)                # the result
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from diffsight.errors import InputError
from diffsight.lenses.layers import Layers
from diffsight.lenses.metrics.metric import Metric, Outcome, as_metric
from diffsight.lenses.patching.language_pair import LanguagePair
from diffsight.lenses.patching.patching_request import PatchingRequest
from diffsight.lenses.results.site_effects import SiteEffects
from diffsight.lenses.sites.find_sites import BY_TOKEN, Sites, find_sites, for_each_head
from diffsight.lenses.sites.site import Site
from diffsight.pipelines.language.model import LanguageModel


@dataclass(frozen=True)
class Swept:
    """The measurements for one pair.

    Attributes:
        values: The metric, (sites, columns).
        source: The metric of the run that values come from.
        target: The metric of the run that was changed, without the change.
    """

    values: torch.Tensor
    source: float
    target: float


@dataclass(frozen=True)
class LanguagePairs:
    """The checked arguments of patching in a language model.

    Attributes:
        request: The arguments.
        metric: The metric, bound to the model.
        sites: The sites. Until `counted` is called, a point with heads stands for all of its heads.
        pairs: The pairs. Values of each source are put into its target.
    """

    request: PatchingRequest
    metric: Metric
    sites: tuple[Site, ...]
    pairs: tuple[LanguagePair, ...]

    @classmethod
    def of(cls, request: PatchingRequest, *, layers: Layers, align: str) -> "LanguagePairs":
        """Return the checked arguments of a lens. For arguments, see `activation_patching`.

        Raises:
            InputError: An argument is invalid.
        """
        model, sites, inputs = request.model, request.sites, request.arguments
        if not isinstance(model, LanguageModel):
            name = request.lens.__name__
            raise InputError(f"{name} takes a LanguageModel or a DiffusionModel, not {type(model).__name__}")
        prompts = request.checked_pairs()
        metric = as_metric(request.metric).bound(model, len(prompts))
        points = find_sites(model, sites, layers)
        positions = _default_positions(sites) if request.positions is None else request.positions
        pairs = [LanguagePair.of(model, *both, points, positions, align, inputs) for both in prompts]
        sizes = {len(pair.columns) for pair in pairs}
        if len(sizes) > 1:
            raise InputError(
                f"the pairs have {' and '.join(map(str, sorted(sizes)))} positions, so they cannot be averaged: pass "
                "prompts with the same number of tokens, or list the positions"
            )
        found = cls(request, metric, tuple(points), tuple(pairs))
        if request.heads is not None and not found.has_heads:
            raise InputError("none of the sites has heads: omit `heads`")
        return found

    def clean(self, source: Outcome, target: Outcome) -> Outcome:
        """Return the outcome of the clean run from those of the source and the target of a pair."""
        return source if self.into == "corrupted" else target

    def baselines(self, number: int, source: Outcome, target: Outcome) -> list[float]:
        """Return the metric of the source and of the target of the pair with this number."""
        clean, ends = self.clean(source, target), zip((source, target), self.pairs[number].sides)
        return [float(self.metric.measure(end, clean, number, [side.name]).detach()) for end, side in ends]

    def counted(self, values: Mapping[str, torch.Tensor]) -> "LanguagePairs":
        """Return a copy with a site for each head, given the values at the points in a first run.

        Raises:
            InputError: A head does not exist.
        """
        counts = {site.point: values[site.point].shape[site.head_dim] for site in self.sites if site.head_dim}
        return replace(self, sites=tuple(for_each_head(self.sites, counts, self.request.heads)))

    @property
    def model(self) -> LanguageModel:
        """The model."""
        return self.request.model

    @property
    def into(self) -> str:
        """The run that values are put into."""
        return self.request.into

    @property
    def has_heads(self) -> bool:
        """Whether any of the sites has heads."""
        return any(site.head_dim is not None for site in self.sites)

    @property
    def rows(self) -> int:
        """The number of sites and positions."""
        return len(self.sites) * len(self.pairs[0].columns)

    @property
    def points(self) -> list[str]:
        """The paths of the points of the sites."""
        return list(dict.fromkeys(site.point for site in self.sites))

    def effects(
        self,
        swept: Sequence[Swept],
        passes: int,
        windows: Sequence[str] | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> SiteEffects:
        """Return the result of a lens.

        Args:
            swept: The measurements for each pair.
            passes: The number of forward passes.
            windows: The titles of the columns, if these are windows of steps.
            settings: Settings of the runs, besides further inputs.
        """
        inputs = {**self.request.arguments, **(settings or {})}
        sources, targets = zip(*([side.prompt for side in pair.sides] for pair in self.pairs))
        clean, corrupted = (sources, targets) if self.into == "corrupted" else (targets, sources)
        return SiteEffects(
            lens=self.request.lens.__name__,
            model=self.model.label,
            clean=clean,
            corrupted=corrupted,
            into=self.into,
            metric=self.metric.name,
            sites=self.sites,
            columns=self._titles() if windows is None else tuple(windows),
            axis="position" if windows is None else "step",
            values=torch.stack([one.values for one in swept]),
            source=torch.tensor([one.source for one in swept]),
            target=torch.tensor([one.target for one in swept]),
            passes=passes,
            arguments={name: value for name, value in inputs.items() if isinstance(value, (str, int, float))},
        )

    def _titles(self) -> tuple[str, ...]:
        """Return the titles of the columns, or the number of a column if its titles differ between pairs."""
        each = zip(*([column.title for column in pair.columns] for pair in self.pairs))
        return tuple(titles[0] if len(set(titles)) == 1 else str(i) for i, titles in enumerate(each))


def _default_positions(sites: Sites) -> str:
    """Return the positions that a lens uses if none are passed.

    Raises:
        InputError: The sites have different defaults.
    """
    found = {site in BY_TOKEN for site in ([sites] if isinstance(sites, str) else sites)}
    if len(found) > 1:
        raise InputError(
            f"by default, {', '.join(BY_TOKEN)} are patched at each token and other sites at all tokens together: pass "
            'positions="each" or "all" for sites of both kinds'
        )
    return "each" if found.pop() else "all"
