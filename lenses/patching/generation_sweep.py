"""The rows of a sweep over the tokens that a language model generates: in each, one site is patched in some steps.

    sweep = GenerationSweep(pairs, windows={"0": (0,), "1-3": (1, 2, 3)}, tokens=4, batch_size=32, bar=tqdm())
    swept = sweep.run(0)                        # of the first pair; swept.values is (sites, windows)

A step is one generated token. Each step patches the value at the last token that the model reads, which in step 0 is
the prompt's last token. Both prompts are continued greedily by the same number of tokens. Rows start at the first step
that is patched.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import torch

from diffsight.errors import InputError
from diffsight.lenses.metrics.metric import Outcome
from diffsight.lenses.patching.generation_start import GenerationStart, generate
from diffsight.lenses.patching.language_pair import check_reached_once
from diffsight.lenses.patching.language_pairs import LanguagePairs, Swept
from diffsight.lenses.sites.site import Site, patched_row
from diffsight.pipelines.language.model import LanguageRun

_FEW = 8  # rows; a batch with fewer also takes the rows that start in the next step


class _StepRow(NamedTuple):
    """A row: the source's values at a site take the place of the target's, in some steps."""

    site: Site
    steps: tuple[int, ...]
    place: tuple[int, int]


@dataclass(frozen=True)
class GeneratedValues:
    """The values kept from the source's run.

    Attributes:
        outcome: The outcome.
        values: The values at the points, by step, in the order in which the model reached the points.
    """

    outcome: Outcome
    values: Sequence[Mapping[str, torch.Tensor]] = field(repr=False)


class GenerationSweep:
    """Sweeps over sites and steps of generation.

    Args:
        pairs: The pairs of prompts, the sites and the metric.
        windows: The steps of each column, by its title.
        tokens: The number of tokens to generate.
        batch_size: The largest number of rows in a batch.
        bar: A progress bar over rows.

    Attributes:
        passes: The number of forward passes so far.
    """

    def __init__(
        self, pairs: LanguagePairs, windows: Mapping[str, tuple[int, ...]], tokens: int, batch_size: int, bar: Any
    ) -> None:
        self.passes = 0
        self._pairs, self._windows, self._tokens = pairs, windows, tokens
        self._batch_size, self._bar = batch_size, bar

    @torch.no_grad()
    def run(self, number: int, source: GeneratedValues | None = None) -> Swept:
        """Sweep over the pair with this number. `source` is the run of its source, if it has already run."""
        pair, sites = self._pairs.pairs[number], self._pairs.sites
        source = source or generate_source(self._pairs, number, self._tokens)
        target = GenerationStart.of(pair.target, self._tokens)
        self.passes += self._tokens + target.passes
        clean = self._pairs.clean(source.outcome, target.outcome)
        values = torch.full((len(sites), len(self._windows)), torch.nan)
        places = product(enumerate(sites), enumerate(self._windows.values()))
        rows = [_StepRow(site, steps, (i, j)) for (i, site), (j, steps) in places]
        titles = list(self._windows)
        baselines = self._pairs.baselines(number, source.outcome, target.outcome)
        for some in self._chunks(rows):
            start = target.first(some[0].steps[0])
            outcome = target.generate(len(some), start, partial(_patch, some, source))
            self.passes += self._tokens - start
            names = [patched_row(pair.target.name, row.site, f"step {titles[row.place[1]]}") for row in some]
            for row, value in zip(some, self._pairs.metric.measure(outcome, clean, number, names).tolist()):
                values[row.place] = value
            self._bar.update(len(some))
        return Swept(values, *baselines)

    def _chunks(self, rows: Sequence[_StepRow]) -> Iterator[list[_StepRow]]:
        """Yield the rows of each batch: those with the same first step together, unless they are few."""
        chunk: list[_StepRow] = []
        for row in sorted(rows, key=lambda one: one.steps[0]):
            is_other = chunk and chunk[-1].steps[0] != row.steps[0] and len(chunk) >= _FEW
            if len(chunk) == self._batch_size or is_other:
                yield chunk
                chunk = []
            chunk.append(row)
        yield chunk


@torch.no_grad()
def generate_source(pairs: LanguagePairs, number: int, tokens: int) -> GeneratedValues:
    """Generate from the source's prompt of a pair and keep the values at the points.

    Raises:
        InputError: The model does not reach each of the points once in every step.
    """
    values: list[dict[str, torch.Tensor]] = []
    passages: list[Counter[str]] = []

    def keep(site: Site, value: Any) -> None:
        passages[-1][site.point] += 1
        values[-1].setdefault(site.point, site.tensor(value).clone())

    def follow(run: LanguageRun, step: int) -> None:
        values.append({})
        passages.append(Counter())
        for site in map(Site, pairs.points if step == 0 else ()):
            run.follow(site.path, partial(keep, site))

    outcome, _ = generate(pairs.pairs[number].source, tokens, at_step=follow)
    for step, found in enumerate(passages):
        check_reached_once(pairs.points, found, f"in step {step}")
    return GeneratedValues(outcome, values)


def _patch(rows: Sequence[_StepRow], source: GeneratedValues, run: LanguageRun, step: int) -> None:
    """Patch the rows in one step, in the order in which the model reaches the points."""
    active = [(number, row) for number, row in enumerate(rows) if step in row.steps]
    for point, given in source.values[step].items():
        of_point = [(number, row) for number, row in active if row.site.point == point]
        if not of_point:
            continue
        patched = of_point[0][1].site.read(run).clone()
        for number, row in of_point:
            own, taken = (_last(row.site, value) for value in (patched[number : number + 1], given))
            if own.shape != taken.shape:
                raise InputError(
                    f"{point} has the shape {tuple(given.shape)} in one run and {tuple(patched.shape)} in the other: "
                    "choose prompts with the same number of tokens"
                )
            own.copy_(taken)
        of_point[0][1].site.write(run, patched)


def _last(site: Site, value: torch.Tensor) -> torch.Tensor:
    """Return a view of the site's part of a value at the last token."""
    count = value.shape[site.token_dim]
    return site.part(value, range(count - 1, count))
