"""Pairs of prompts of a language model, sites, and a metric: checked before anything runs.

pairs = LanguagePairs.of(activation_patching, model, clean, corrupted, metric, sites="heads", ...)
pairs.sites, pairs.columns
pairs.effects("activation_patching", swept, passes)         # the result
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from diffsight.errors import InputError
from diffsight.lenses.layers import Layers
from diffsight.lenses.metrics.outcome import Metric, as_metric
from diffsight.lenses.options import check_options
from diffsight.lenses.patching.language_pair import LanguagePair
from diffsight.lenses.patching.sweep_checks import check_into, pair_prompts
from diffsight.lenses.results.site_effects import SiteEffects
from diffsight.lenses.sites.find_sites import BY_TOKEN, Sites, find_sites, for_each_head
from diffsight.lenses.sites.positions import Positions
from diffsight.lenses.sites.site import Site
from diffsight.pipelines.language.model import LanguageModel


@dataclass(frozen=True)
class Swept:
    """What was measured for one pair.

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
    """What patching is asked to do.

    Attributes:
        model: The model.
        metric: The metric, bound to the model.
        sites: The sites.
        pairs: The pairs; the source of each gives values, its target gets them.
        into: "corrupted" if the corrupted prompts are the targets, else "clean".
        inputs: Further inputs of the model.
    """

    model: LanguageModel
    metric: Metric
    sites: tuple[Site, ...]
    pairs: tuple[LanguagePair, ...]
    into: str
    inputs: Mapping[str, Any] = field(repr=False)

    @classmethod
    def of(
        cls,
        lens: Callable,
        model: Any,
        clean: Any,
        corrupted: Any,
        metric: Any,
        *,
        sites: Sites,
        positions: Positions,
        layers: Layers,
        heads: int | Iterable[int] | None,
        into: str,
        align: str,
        inputs: Mapping[str, Any],
    ) -> "LanguagePairs":
        """Return what a lens is asked to do. For arguments, see `activation_patching`.

        Raises:
            InputError: It cannot be done.
        """
        name = lens.__name__
        if not isinstance(model, LanguageModel):
            raise InputError(f"{name} takes a LanguageModel or a DiffusionModel, not {type(model).__name__}")
        check_options(lens, model, inputs)
        check_into(into)
        prompts = pair_prompts(clean, corrupted)
        sources, targets = prompts if into == "corrupted" else prompts[::-1]
        metric = as_metric(metric).bound(model, len(sources))
        points = find_sites(model, sites, layers)
        positions = _default_positions(sites) if positions is None else positions
        pairs = [LanguagePair.of(model, *both, points, positions, align, inputs) for both in zip(sources, targets)]
        sizes = {len(pair.columns) for pair in pairs}
        if len(sizes) > 1:
            raise InputError(
                f"the pairs have {' and '.join(map(str, sorted(sizes)))} positions, so they cannot be averaged: pass "
                "prompts with the same number of tokens, or list the positions"
            )
        chosen = for_each_head(points, _count_heads(pairs[0], points), heads)
        return cls(model, metric, tuple(chosen), tuple(pairs), into, inputs)

    @property
    def rows(self) -> int:
        """The number of sites and positions."""
        return len(self.sites) * len(self.pairs[0].columns)

    @property
    def points(self) -> list[str]:
        """The paths of the points of the sites."""
        return list(dict.fromkeys(site.point for site in self.sites))

    def effects(self, lens: str, swept: Sequence[Swept], passes: int) -> SiteEffects:
        """Return the result of a lens."""
        sources, targets = (tuple(getattr(p, side).tokens.text for p in self.pairs) for side in ("source", "target"))
        clean, corrupted = (sources, targets) if self.into == "corrupted" else (targets, sources)
        return SiteEffects(
            lens=lens,
            model=self.model.label,
            clean=clean,
            corrupted=corrupted,
            into=self.into,
            metric=self.metric.name,
            sites=self.sites,
            columns=self._titles(),
            axis="position",
            values=torch.stack([one.values for one in swept]),
            source=torch.tensor([one.source for one in swept]),
            target=torch.tensor([one.target for one in swept]),
            passes=passes,
            arguments={name: value for name, value in self.inputs.items() if isinstance(value, (str, int, float))},
        )

    def _titles(self) -> tuple[str, ...]:
        """Return the titles of the columns; the numbers of columns whose titles differ from pair to pair."""
        each = zip(*([column.title for column in pair.columns] for pair in self.pairs))
        return tuple(titles[0] if len(set(titles)) == 1 else str(i) for i, titles in enumerate(each))


def _default_positions(sites: Sites) -> str:
    """Return the positions that a lens takes if none are given.

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


def _count_heads(pair: LanguagePair, sites: Sequence[Site]) -> dict[str, int]:
    """Return the number of heads at each point that has heads, from a scan of shapes."""
    counts: dict[str, int] = {}
    with_heads = [site for site in sites if site.head_dim is not None]
    if not with_heads:
        return counts

    def count(site: Site, value: torch.Tensor) -> None:
        counts[site.point] = value.shape[site.head_dim]

    with pair.source.scan() as run:
        for site in with_heads:
            run.follow(site.point, partial(count, site))
        run.finish()
    missing = next((site.point for site in with_heads if site.point not in counts), None)
    if missing is not None:
        raise InputError(f"the model never comes to {missing} with this prompt, so nothing can be patched there")
    return counts
