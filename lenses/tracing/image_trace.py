"""Causal tracing in a pipeline: one call has a clean row, and noised rows in each of which one module is restored."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from tqdm.auto import tqdm

from diffsight.errors import InputError
from diffsight.lenses.denoising.call_checks import check_one_image
from diffsight.lenses.encoders.pairing import words_read
from diffsight.lenses.metrics.metric import Metric, Outcome, as_metric
from diffsight.lenses.tracing.image_rows import draw_rows, part_of_outcome
from diffsight.lenses.tracing.subject_noise import Noise
from diffsight.lenses.tracing.traced import Traced
from diffsight.lenses.visits.named_points import NamedPoint, named_points
from diffsight.lenses.visits.visiting import Visit, has_branches, visiting
from diffsight.pipelines.diffusion.encoding import record_encoding
from diffsight.pipelines.diffusion.model import DiffusionModel
from diffsight.pipelines.standard_names import word_embeddings


@dataclass(frozen=True)
class _NoisedRow:
    """A row with the noise of a sample. `site` is the number of the restored site, or None."""

    sample: int
    site: int | None


@dataclass(frozen=True)
class _NoisedEncoder:
    """A text encoder, the tokens of the subject in it, and their noise, (samples, tokens, features)."""

    point: NamedPoint
    tokens: range
    noise: torch.Tensor

    def change(self, rows: Sequence[_NoisedRow], visit: Visit) -> torch.Tensor:
        """Return the embeddings with noise in all rows but the first."""
        check_rows(visit, len(rows) + 1)
        value = visit.value.clone()
        noise = self.noise[[row.sample for row in rows]].to(value)
        value[1:, self.tokens.start : self.tokens.stop] += noise
        return value


def trace_images(
    lens: Callable,
    model: DiffusionModel,
    prompt: str,
    subject: str,
    sites: str | Sequence[str],
    metric: Any,
    noise: Noise,
    batch_size: int,
    progress: bool,
    arguments: Mapping[str, Any],
) -> Traced:
    """Trace a prompt of a pipeline, see `causal_tracing`."""
    check_one_image(lens, model, prompt, noise.seed, batch_size, arguments)
    if metric is None:
        raise InputError("pass metric=, such as shapes_verdict('red circle') or a function of the result of one row")
    measured = as_metric(metric).bound(model, 1)
    points = named_points(model, sites)
    for point in points:
        if not has_branches(model, point):
            raise InputError(f"{point.name} is not in a text encoder or denoiser")
    model.check(prompt=prompt, seed=noise.seed, **arguments)
    encoders = _noised_encoders(model, prompt, subject, noise, arguments)
    rows = [_NoisedRow(sample, site) for sample in range(noise.samples) for site in (None, *range(len(points)))]
    size, values = max(1, batch_size - 1), []
    with tqdm(desc="tracing", total=len(rows), disable=not progress) as bar:
        for start in range(0, len(rows), size):
            some = rows[start : start + size]
            outcome = _draw(model, prompt, points, encoders, some, noise.seed, measured, arguments)
            clean = part_of_outcome(outcome, 0, 1)
            if not values:
                right = float(measured.measure(clean, clean, 0, [f"the prompt {prompt!r}"]))
            names = [_named(prompt, points, row) for row in some]
            values.append(measured.measure(part_of_outcome(outcome, 1, len(some) + 1), clean, 0, names))
            bar.update(len(some))
    found = torch.cat(values).reshape(noise.samples, len(points) + 1)
    names = tuple(str(point.name) for point in points)
    return Traced(measured.name, names, ("all positions",), found[:, 1:, None], right, found[:, 0], len(values))


def _named(prompt: str, points: Sequence[NamedPoint], row: _NoisedRow) -> str:
    """Return what a row is, for messages."""
    restored = "nothing" if row.site is None else points[row.site].name
    return f"the prompt {prompt!r} with noise, sample {row.sample}, and {restored} restored"


def check_rows(visit: Visit, rows: int) -> None:
    """Raise InputError if the batch of a visit does not have one entry for each row."""
    if len(visit.value) != rows:
        raise InputError(f"{visit.point.name} has a batch of {len(visit.value)} for {rows} rows: choose another module")


def _draw(
    model: DiffusionModel,
    prompt: str,
    points: Sequence[NamedPoint],
    encoders: Sequence[_NoisedEncoder],
    rows: Sequence[_NoisedRow],
    seed: int,
    metric: Metric,
    arguments: Mapping[str, Any],
) -> Outcome:
    """Draw a clean row and the given rows."""
    for encoder in encoders:
        model = visiting(model, [encoder.point], partial(encoder.change, rows))
    numbers = {point.name: i for i, point in enumerate(points)}

    def restore(visit: Visit) -> torch.Tensor | None:
        restored = [i for i, row in enumerate(rows, 1) if row.site == numbers[visit.point.name]]
        if not restored:
            return None
        check_rows(visit, len(rows) + 1)
        value = visit.value.clone()
        value[restored] = visit.value[0]
        return value

    return draw_rows(visiting(model, points, restore), [prompt] * (len(rows) + 1), seed, metric, arguments)


def _noised_encoders(
    model: DiffusionModel, prompt: str, subject: str, noise: Noise, arguments: Mapping[str, Any]
) -> list[_NoisedEncoder]:
    """Return the text encoders, with the noise of the subject in each."""
    found = []
    for name, reading in record_encoding(model, prompt, dict(arguments), noise.seed).encoders.items():
        tokens = words_read(model, reading, prompt)[subject]
        width = reading.prompt.hidden_states[0].shape[-1]
        encoder = model.pipeline.components[name]
        weights = encoder.get_submodule(word_embeddings(encoder)[0]).weight
        point = NamedPoint(f"{name} embedding", f"{name}.layers[0]", is_input=True)
        found.append(_NoisedEncoder(point, tokens, noise.draw(weights, len(tokens), width)))
    if not found:
        raise InputError(f"{type(model.pipeline).__name__} has no text encoder whose tokens could be noised")
    return found
