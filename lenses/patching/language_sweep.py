"""The rows of a sweep over a language model: in each of them, one site at one position is patched.

    sweep = LanguageSweep(pairs, batch_size=32, bar=tqdm())
    swept = sweep.run(0)                        # of the first pair; swept.values is (sites, columns)
    sweep.passes                                # the forward passes so far

Rows that are patched in the same layer run together. They start from the stored state before that layer.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch

from diffsight.errors import InputError
from diffsight.lenses.encoders.columns import Column
from diffsight.lenses.layers import EMBEDDING
from diffsight.lenses.metrics.metric import Outcome
from diffsight.lenses.patching.language_pair import LanguagePair, Passed, check_values, run_side
from diffsight.lenses.patching.language_pairs import LanguagePairs, Swept
from diffsight.lenses.patching.shared_prefix import SharedPrefix
from diffsight.lenses.sites.find_sites import layer_of
from diffsight.lenses.sites.site import Site, patched_row
from diffsight.pipelines.language.model import LanguageModel, LanguageRun

_FEW = 8  # rows; a pass with fewer also takes the rows of the next layer


@dataclass(frozen=True)
class _Row:
    """A row: the source's values at a site take the place of the target's, at the tokens of a column.

    Attributes:
        site: The site.
        column: The tokens.
        place: The numbers of the site and the column.
        start: The first layer whose result differs from the target's run. None stands for the whole model.
    """

    site: Site
    column: Column
    place: tuple[int, int]
    start: int | None


class LanguageSweep:
    """Sweeps over sites and positions of a language model.

    Args:
        pairs: The pairs of prompts, the sites and the metric.
        batch_size: The largest number of rows in a pass.
        bar: A progress bar over rows.

    Attributes:
        passes: The number of forward passes so far.
    """

    def __init__(self, pairs: LanguagePairs, batch_size: int, bar: Any) -> None:
        self.passes = 0
        self._pairs, self._batch_size, self._bar = pairs, batch_size, bar
        self._metric = pairs.metric
        starts = {site.point: _start(pairs.model, site) for site in pairs.sites}
        self._starts = [starts[site.point] for site in pairs.sites]
        self._inputs: str | None = ""  # how rows start, once it is known

    @torch.no_grad()
    def run(self, number: int, source: Passed | None = None) -> Swept:
        """Sweep over the pair with this number. `source` is the run of its source, if it has already run."""
        pair, sites = self._pairs.pairs[number], self._pairs.sites
        source = source or run_side(pair.source, self._metric, self._pairs.points)
        target = run_side(pair.target, self._metric, states=any(start is not None for start in self._starts))
        self.passes += 2
        check_values(pair, source.values, sites)
        values = torch.full((len(sites), len(pair.columns)), torch.nan)
        clean = self._pairs.clean(source.outcome, target.outcome)
        baselines = self._pairs.baselines(number, source.outcome, target.outcome)
        prefix = self._prefix(pair, target)
        for cells in self._chunks(pair.columns, list(source.values), prefix):
            outcome = self._run_cells(cells, pair, source, prefix)
            names = [patched_row(pair.target.name, cell.site, cell.column.title) for cell in cells]
            for cell, value in zip(cells, self._metric.measure(outcome, clean, number, names).tolist()):
                values[cell.place] = value
            self._bar.update(len(cells))
        return Swept(values, *baselines)

    def _prefix(self, pair: LanguagePair, target: Passed) -> SharedPrefix:
        """Return how the rows start. This is determined with the first pair."""
        if self._inputs != "":
            return SharedPrefix(pair.target, target, self._metric, self._inputs)
        starts = {start for start in self._starts if start is not None}
        prefix = SharedPrefix.of(pair.target, target, self._metric, starts)
        self.passes += prefix.passes
        self._inputs = prefix.inputs
        return prefix

    def _chunks(self, columns: Sequence[Column], order: list[str], prefix: SharedPrefix) -> Iterator[list[_Row]]:
        """Yield the rows of each pass, in the order in which the model reaches their sites."""
        cells = [
            _Row(site, column, (i, j), start if prefix.inputs else None)
            for i, (site, start) in enumerate(zip(self._pairs.sites, self._starts))
            for j, column in enumerate(columns)
        ]
        cells.sort(key=lambda cell: (-1 if cell.start is None else cell.start, order.index(cell.site.point)))
        chunk: list[_Row] = []
        for _, group in groupby(cells, key=lambda cell: cell.start):
            for cell in group:
                is_other = chunk and chunk[-1].start != cell.start and (len(chunk) >= _FEW or chunk[-1].start is None)
                if len(chunk) == self._batch_size or is_other:
                    yield chunk
                    chunk = []
                chunk.append(cell)
        yield chunk

    def _run_cells(self, cells: Sequence[_Row], pair: LanguagePair, source: Passed, prefix: SharedPrefix) -> Outcome:
        """Run rows together."""
        start, states, begun = cells[0].start, None, range(0)
        if start is not None:
            states = prefix.states(len(cells), start)
            begun = [row for row, cell in enumerate(cells) if _is_before(cell.site, start)]
            _patch(states, [(row, cells[row]) for row in begun], source, pair)
        self.passes += 1
        with prefix.open(len(cells), start, states) as run:
            rows = [(row, cell) for row, cell in enumerate(cells) if row not in begun]
            for _, group in groupby(rows, key=lambda item: item[1].site.point):
                _patch_at_point(run, list(group), source, pair)
            logits = run.result.logits
        if len(logits) != len(cells):
            raise InputError(
                f"{self._pairs.model.label} returned {len(logits)} rows for {len(cells)}, so it cannot be swept"
            )
        return Outcome(logits=logits)


def _start(model: LanguageModel, site: Site) -> int | None:
    """Return the first layer whose result a patch at a site can change. None: no layer contains the site."""
    layer = layer_of(model, site)
    if layer == EMBEDDING:
        return 0
    if layer is None or model.hidden_layout is None:
        return None
    return layer + 1 if site.point == f"layers[{layer}].output" else layer


def _is_before(site: Site, start: int) -> bool:
    """Return whether a site is the hidden state before a layer."""
    return site.point == ("layers[0].input" if start == 0 else f"layers[{start - 1}].output")


def _patch_at_point(run: LanguageRun, cells: Sequence[tuple[int, _Row]], source: Passed, pair: LanguagePair) -> None:
    """Patch the rows at one point of a run."""
    site = cells[0][1].site
    patched = site.read(run).clone()
    _patch(patched, cells, source, pair)
    site.write(run, patched)


def _patch(value: torch.Tensor, cells: Sequence[tuple[int, _Row]], source: Passed, pair: LanguagePair) -> None:
    """Put the source's values into rows of a value, (rows, ...)."""
    for row, cell in cells:
        site, (taken, place) = cell.site, pair.spans(cell.column)
        part = site.part(source.values[site.point], taken)
        if pair.align == "mean" and taken is not None:
            part = part.mean(site.token_dim_of_part, keepdim=True)
        site.part(value[row : row + 1], place).copy_(part)
