"""Activation patching of a pipeline: the sweep over sites, windows of steps and parts of values for one pair.

swept, passes = patch_pair(pairs, 0, batch_size=32, max_rows=20_000, progress=True)
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

from diffsight.lenses.patching.denoiser_pairs import DenoiserPairs, SweptPair
from diffsight.lenses.patching.denoiser_sweep import Change
from diffsight.lenses.patching.sweep_checks import check_rows
from diffsight.pipelines.diffusion.model import DiffusionModel


def patch_pair(
    pairs: DenoiserPairs, number: int, batch_size: int, max_rows: int, progress: bool
) -> tuple[SweptPair, int]:
    """Return the metric of all rows of a pair, and the number of calls of the pipeline.

    For arguments, see `activation_patching`.

    Raises:
        InputError: The model does not reach a site, or a step or part of the value does not exist.
    """
    rows = pairs.rows(number)
    plain = rows.run_plain(pairs.paths)
    changes = pairs.changes(number, plain)
    check_rows(len(changes.rows), max_rows)
    names = pairs.names(number)
    measure = partial(pairs.metric.measure, clean=pairs.clean(plain.outcome), pair=number)
    source, target = measure(plain.outcome, rows=names)
    apply, named = partial(_patch, pairs.model), partial(changes.named, names[1])
    values = rows.sweep(plain, changes.rows, apply, measure, named, batch_size, progress)
    return SweptPair(changes, values, source, target), rows.passes


def _patch(model: DiffusionModel, _: Any, leading: Sequence[Any], row: Any, change: Change, call: int) -> None:
    """Put the leading row's value into a row."""
    site = change.site
    patched = site.read(row, call).clone()
    place, index = change.part.place(patched, model, site)
    place[index] = change.part.taken(site.read(leading[0], call), model, site)
    site.write(row, patched, call)
