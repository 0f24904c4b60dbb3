"""The shared start of a sweep's rows over generated tokens: what the model has stored before the first patched step.

    start = GenerationStart.of(side, tokens=4)
    start.outcome                               # the logits of the plain run, (1, tokens, vocabulary)
    start.generate(rows=8, step=2, at_step=patch).logits    # (8, tokens, vocabulary); steps 0 and 1 are not computed

Each step patches the last token that the model reads, so the rows have the same keys and values at all tokens before
the first patched one. It is tried first whether the model continues from these. If not, rows run in full: some models
keep a state that cannot be taken back to an earlier token (Mamba, or keys beyond a sliding window).
"""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from diffsight.lenses.metrics.metric import Outcome
from diffsight.lenses.patching.language_pair import LanguageSide
from diffsight.lenses.patching.shared_prefix import agree
from diffsight.pipelines.language.model import LanguageRun

AtStep = Callable[[LanguageRun, int], None]
_COUNTED_FROM_PROMPT = ("begin_suppress_tokens", "exponential_decay_length_penalty")  # settings of generation


@dataclass(frozen=True)
class GenerationStart:
    """A plain run of generation, and what the model stored in it.

    Attributes:
        side: The prompt.
        tokens: The number of generated tokens.
        outcome: The outcome of the plain run.
        ids: The prompt and the generated tokens, (1, all tokens).
        cache: The keys and values of all tokens but the last; None if rows cannot start from them.
        passes: The number of forward passes so far.
    """

    side: LanguageSide
    tokens: int
    outcome: Outcome
    ids: torch.Tensor = field(repr=False)
    cache: Any = field(repr=False)
    passes: int

    @classmethod
    def of(cls, side: LanguageSide, tokens: int) -> "GenerationStart":
        """Run the prompt without patching, and find out whether rows can start from what the model stored."""
        outcome, result = generate(side, tokens)
        cache = None if _counts_from_prompt(side) else result.get("past_key_values")
        found = cls(side, tokens, outcome, result["sequences"], cache, tokens)
        if cache is None:
            return found
        try:
            found._stored(1, 0)
        except Exception:  # any error of a state that cannot be taken back
            return replace(found, cache=None)
        return replace(found, cache=cache if found._is_right() else None, passes=tokens + 1)

    def first(self, step: int) -> int:
        """Return the first step that rows compute whose first patch is in a step."""
        return 0 if self.cache is None else step

    def generate(self, rows: int, step: int, at_step: AtStep) -> Outcome:
        """Generate in a number of rows.

        Args:
            rows: The number of rows.
            step: The first step that is computed, as `first` returns it.
            at_step: Takes the run and the number of each computed step.
        """
        if self.cache is None:
            return generate(self.side, self.tokens, rows, at_step)[0]
        found = self._continued(rows, step, self.tokens - step, at_step)
        return Outcome(logits=torch.cat([self.outcome.logits[:, :step].expand(rows, -1, -1), found.logits], 1))

    def _continued(self, rows: int, step: int, tokens: int, at_step: AtStep | None = None) -> Outcome:
        """Continue the plain run from a step."""
        ids = self.ids[:, : self.ids.shape[1] - self.tokens + step].repeat(rows, 1)
        values = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        shifted = None if at_step is None else lambda run, number: at_step(run, step + number)
        return generate(self.side, tokens, rows, shifted, values=values, past_key_values=self._stored(rows, step))[0]

    def _stored(self, rows: int, step: int) -> Any:
        """Return copies of the keys and values of all tokens before the one that a step reads."""
        cache = deepcopy(self.cache)
        cache.crop(step - self.tokens)  # the number of tokens to take away, as a negative number
        cache.batch_repeat_interleave(rows)
        return cache

    def _is_right(self) -> bool:
        """Return whether two rows that continue from the last token of the prompt predict what the plain run does."""
        try:
            found = self._continued(2, 0, 1)
        except Exception:  # any error of a model that does not continue
            return False
        return agree(found.logits, torch.cat([self.outcome.logits[:, :1]] * 2))


@torch.no_grad()
def generate(
    side: LanguageSide, tokens: int, rows: int = 1, at_step: AtStep | None = None, **options: Any
) -> tuple[Outcome, Any]:
    """Generate in a number of rows, and return the outcome and what the model returned.

    Args:
        side: The prompt.
        tokens: The number of tokens to generate.
        rows: The number of rows.
        at_step: Takes the run and the number of each step.
        options: As for `LanguageSide.open_generation`.
    """
    with side.open_generation(tokens, rows, **options) as run:
        for step in run.steps if at_step else ():
            at_step(run, step.index)
    return Outcome(logits=torch.stack(list(run.result.logits), 1)), run.result


def _counts_from_prompt(side: LanguageSide) -> bool:
    """Return whether a continued run would not choose tokens as the whole run does."""
    settings = side.model.module.generation_config
    return side.model.is_encoder_decoder or any(getattr(settings, name, None) for name in _COUNTED_FROM_PROMPT)
