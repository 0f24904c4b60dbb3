"""The shared start of a sweep's rows: the stored hidden state before the first layer that is patched.

    prefix = SharedPrefix.of(pair.target, passed, metric, starts=[0, 3])
    with prefix.open(rows=8, start=3, states=hidden) as run:     # layers 0 to 2 are skipped
        ...

Some models pass more than hidden states from layer to layer (T5: the position bias; others: keys and values). So it is
tried first whether a layer can start from a stored state alone, and whether one row of the other arguments (masks,
positions, an image) serves several rows of hidden states. If no start from a stored state works, the rows run in full.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import product

import torch

from diffsight.lenses.metrics.metric import Metric
from diffsight.lenses.patching.language_pair import LanguageSide, Passed
from diffsight.pipelines.language.model import LanguageRun

_ONE_ROW, _EVERY_ROW = "one row", "every row"


@dataclass(frozen=True)
class SharedPrefix:
    """How the rows of a sweep over one prompt start.

    Attributes:
        side: The prompt.
        passed: The run of the prompt without patching.
        metric: The metric of the outcome.
        inputs: "one row" if one row of the model's arguments serves all rows, "every row" if each row needs its own,
            None if rows cannot start from a stored state.
        passes: The number of forward passes of these trials.
    """

    side: LanguageSide
    passed: Passed = field(repr=False)
    metric: Metric
    inputs: str | None
    passes: int = 0

    @classmethod
    def of(cls, side: LanguageSide, passed: Passed, metric: Metric, starts: Iterable[int]) -> "SharedPrefix":
        """Find out how rows can start.

        Args:
            side: The prompt.
            passed: The run of the prompt without patching.
            metric: The metric of the outcome.
            starts: The layers at which rows will start. The number of layers stands for the final norm.
        """
        passes, starts = 0, sorted(set(starts))
        for inputs in (_ONE_ROW, _EVERY_ROW):
            prefix = cls(side, passed, metric, inputs)
            for start, rows in product(starts, _trials(passed)):
                passes += 1
                if not prefix._is_right(start, rows):
                    break
            else:
                return cls(side, passed, metric, inputs, passes)
        return cls(side, passed, metric, None, passes)

    def open(self, rows: int, start: int | None, states: torch.Tensor | None = None) -> LanguageRun:
        """Open a run of several rows.

        Args:
            rows: The number of rows.
            start: The first layer that is computed. None stands for the whole model.
            states: The hidden states before this layer, (rows, tokens, features). Default: those of the prompt.
        """
        if start is None:
            return self.side.open(self.metric, rows, self.passed.encoded)
        run = self.side.open(self.metric, 1 if self.inputs == _ONE_ROW else rows, self.passed.encoded)
        states = self.states(rows, start) if states is None else states
        if start:
            run.skip_layers(0, start - 1, states)
        else:
            run.layers_input[0] = states
        return run

    def states(self, rows: int, start: int) -> torch.Tensor:
        """Return copies of the prompt's hidden states before a layer, (rows, tokens, features)."""
        return self.passed.states[start].repeat(rows, 1, 1)

    @torch.no_grad()
    def _is_right(self, start: int, rows: int) -> bool:
        """Return whether rows that start at a layer get the same output there as the prompt's own run."""
        try:
            with self.open(rows, start) as run:
                if start == len(self.passed.states) - 1:
                    found, expected = run.result.logits, self.passed.outcome.logits
                else:
                    found, expected = run.layers_output[start], self.passed.states[start + 1]
                    run.stop()
        except Exception:  # any error of a model with more rows, or without the skipped layers
            return False
        return agree(found, torch.cat([expected] * rows), is_same_batch=rows == 1)


def _trials(passed: Passed) -> tuple[int, ...]:
    """Return the numbers of rows to try. In half precision, rounding differs too much between one row and two to reveal
    a small error, so one row is tried as well."""
    is_half = any(state.dtype in (torch.float16, torch.bfloat16) for state in passed.states[:1])
    return (1, 2) if is_half else (2,)


def agree(found: torch.Tensor, expected: torch.Tensor, is_same_batch: bool = False) -> bool:
    """Return whether values agree up to rounding.

    Args:
        found: The values.
        expected: The values that they should equal.
        is_same_batch: Whether both were computed in batches of the same size, and so with the same rounding.
    """
    finite = expected[expected.isfinite()]  # some models give tokens the logit -inf
    if found.shape != expected.shape or not len(finite):
        return False
    is_exact = is_same_batch or found.dtype in (torch.float32, torch.float64)
    return torch.allclose(found, expected, rtol=0, atol=(1e-4 if is_exact else 2e-2) * float(finite.abs().max()))
