"""Metrics: a number for what a model returned, compared with what it returned in the clean run.

    def brightness(result):                     # any function of the result of one row that returns a number
        return np.asarray(result.images[0]).mean()

    activation_patching(model, clean, corrupted, brightness, sites="unet.**.attn2")

The metrics that come with diffsight are in `token_metrics.py` and `image_metrics.py`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image

from diffsight.errors import InputError

LAST_LOGITS, LOGITS, IMAGES, LATENTS = "last logits", "logits", "images", "latents"


@dataclass(frozen=True, eq=False)
class Outcome:
    """What a model returned for some rows.

    Attributes:
        logits: The logits of a language model, (rows, tokens, vocabulary). If a metric reads only the last token, only
            its logits are there, (rows, 1, vocabulary). If the model generates, these are the logits of each generated
            token.
        images: The images that a pipeline drew, one for each row.
        latents: The latents that the last `scheduler.step` returned, (rows, ...). What the pipeline or a callback does
            with them afterwards is not in them.
    """

    logits: torch.Tensor | None = field(default=None, repr=False)
    images: Sequence[Image.Image] | None = field(default=None, repr=False)
    latents: torch.Tensor | None = field(default=None, repr=False)

    def row(self, number: int) -> "Outcome":
        """Return the outcome of one row."""
        return self.part(slice(number, number + 1))

    def part(self, rows: slice) -> "Outcome":
        """Return the outcome of some rows."""
        parts = (self.logits, self.images, self.latents)
        return Outcome(*(None if part is None else part[rows] for part in parts))

    def __len__(self) -> int:
        return len(next(part for part in (self.logits, self.images, self.latents) if part is not None))


class Metric:
    """A number for each row of an outcome. Subclasses define `values`, and `bound` if they depend on the model.

    Attributes:
        name: The name of the metric in figures and tables.
        reads: The parts of an outcome that the metric reads: "last logits", "logits", "images", "latents".
    """

    name: str
    reads: tuple[str, ...] = (LOGITS,)

    def bound(self, model: Any, pairs: int) -> "Metric":
        """Return the metric for a model and a number of prompt pairs, checked before anything runs.

        Raises:
            InputError: The metric does not fit the model or the number of pairs.
        """
        return self

    def values(self, outcome: Outcome, clean: Outcome, pair: int) -> torch.Tensor:
        """Return a number for each row, (rows,), with gradients where the outcome has them.

        Args:
            outcome: The outcome of the rows.
            clean: The outcome of the clean run, one row.
            pair: The number of the prompt pair.
        """
        raise NotImplementedError

    def measure(self, outcome: Outcome, clean: Outcome, pair: int, rows: Sequence[str]) -> torch.Tensor:
        """Return the finite number of each row, (rows,), in float32 on the CPU, with gradients where there are any.

        Args:
            outcome: The outcome of the rows.
            clean: The outcome of the clean run, one row.
            pair: The number of the prompt pair.
            rows: What each row is, for the error.

        Raises:
            InputError: A number is infinite or not a number.
        """
        numbers = self.values(outcome, clean, pair).float().cpu()
        wrong = next((i for i, is_finite in enumerate(numbers.isfinite().tolist()) if not is_finite), None)
        if wrong is not None:
            raise InputError(
                f"the metric {self.name} is {numbers[wrong].item()} for {rows[wrong]}: a metric must be a finite number"
            )
        return numbers


@dataclass(frozen=True)
class FunctionMetric(Metric):
    """A user's function that takes the outcome of one row and returns a number."""

    function: Callable[[Outcome], Any]
    reads: tuple[str, ...] = (LOGITS, IMAGES, LATENTS)

    @property
    def name(self) -> str:
        return getattr(self.function, "__name__", type(self.function).__name__)

    def values(self, outcome: Outcome, clean: Outcome, pair: int) -> torch.Tensor:
        return torch.stack([self._number(self.function(outcome.row(i))) for i in range(len(outcome))])

    def _number(self, value: Any) -> torch.Tensor:
        if isinstance(value, torch.Tensor) and value.numel() == 1:
            return value.reshape(()).float()
        if hasattr(value, "__float__") and getattr(value, "size", 1) == 1 and not isinstance(value, torch.Tensor):
            return torch.tensor(float(value))
        shape = f" of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else ""
        raise InputError(
            f"a metric must return a number, but {self.name} returned {type(value).__name__}{shape}: return a float, "
            "or a tensor with one element"
        )


def as_metric(metric: Any) -> Metric:
    """Return a metric of diffsight unchanged, or a function wrapped as a metric.

    Raises:
        InputError: The argument is neither.
    """
    if isinstance(metric, Metric):
        return metric
    if isinstance(metric, type) or not callable(metric):
        raise InputError(
            f"a metric is logit_difference(…), token_probability(…), kl_divergence() or the like, or a function of the "
            f"result that returns a number, not {metric!r}"
        )
    return FunctionMetric(metric)


def normalised(values: torch.Tensor, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return a metric of changed runs on a scale on which the target (the run that values are put into, before any
    change) is 0 and the source is 1.

    This is (value - target) / (source - target), for tensors of shapes that broadcast."""
    return (values - target) / (source - target)
