"""Generation, token by token.

    for step in run.steps:                          # one iteration per generated token
        step.tokens, step.text

    for piece in run.stream():
        print(piece, end="")

transformers calls its stopping criteria after every token. A run adds one that never stops, and records the tokens.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from diffsight.errors import InputError, suggest
from diffsight.extending import Points, Run, Step, Target, keeping_attribute_errors, raise_kept, tree_of

_INCOMPLETE = "\ufffd"  # how a tokenizer decodes bytes that are not a whole character yet


class GeneratedTokens(StoppingCriteria):
    """A stopping criterion that never stops: it records every token as it is generated."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.steps: list[torch.Tensor] = []  # after each step, all token ids so far, (sequences, tokens)
        self.starts: list[int] = []  # for each step, the index in these ids at which the text it continues begins

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.starts.append(self.start_of(input_ids))
        self.steps.append(input_ids)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    def start_of(self, ids: torch.Tensor) -> int:
        """Return the index, in the ids after the next step, at which the text continued by that step begins.

        This stays the same until a pipeline begins another text."""
        goes_on = self.steps and self.steps[-1].shape[-1] == ids.shape[-1] - 1
        return self.starts[-1] if goes_on else ids.shape[-1] - 1

    def along_with(self, others: Iterable[StoppingCriteria] | None) -> StoppingCriteriaList:
        """Return the stopping criteria for a call of `generate`."""
        return StoppingCriteriaList([*(others or []), self])


class GenerationStep(Step):
    """One generated token: from one forward pass to the next."""

    def __init__(self, index: int, component: str, call: tuple[tuple, dict], run: "GenerationRun") -> None:
        super().__init__(index, component, call)
        self._run = run

    @property
    def tokens(self) -> torch.Tensor:
        """The token ids generated in this step, one per sequence (with beam search one per candidate, the best first).

        Runs the model until they are known."""
        with keeping_attribute_errors(self):
            return self._run._tokens_after(self.index)[:, -1]

    @property
    def text(self) -> str | list[str]:
        """The text that this step adds, a list for several sequences. Runs the model until it is known."""
        with keeping_attribute_errors(self):
            return self._run._text_added_in(self.index)

    def __getattr__(self, name: str) -> Any:
        raise_kept(self)
        raise AttributeError(f"a step has no {name!r}{suggest(name, ('index', 'tokens', 'text', 'component'))}")


class GenerationRun(Run):
    """A run in which a model may generate text."""

    _generated: GeneratedTokens | None = None  # None if it does not generate

    def stream(self) -> Iterator[str | list[str]]:
        """Yield the text piece by piece as it is generated: `for piece in model.generate(prompt).stream():`."""
        self._check_generates("stream()")
        for step in self.steps:
            piece = step.text
            if piece and any(piece):
                yield piece

    def _make_step(self, index: int, path: str, call: tuple[tuple, dict]) -> Step:
        if self._generated is None:
            return super()._make_step(index, path, call)
        return GenerationStep(index, path or tree_of(self).title, call, self)

    def _check_generates(self, what: str) -> None:
        if self._generated is None:
            raise InputError(
                f"run.{what} needs a run that generates text: open it with model.generate(...), not model.trace(...)"
            )

    def _tokens_after(self, step: int) -> torch.Tensor:
        """Return all token ids after a step. For the current step, run the model until they are known."""
        if step < len(self._generated.steps):
            return self._generated.steps[step]
        generated = Target(self._generated, "__call__", f"steps[{step}].tokens")
        return Points(tree_of(self), generated, self).input

    def _text_added_in(self, step: int) -> str | list[str]:
        ids = self._tokens_after(step)
        known = self._generated.starts
        start = known[step] if step < len(known) else self._generated.start_of(ids)
        return one_or_many([_added(self._generated.tokenizer, row[start:]) for row in ids])


def decoded(tokenizer: Any, ids: torch.Tensor) -> str:
    """Return token ids as text."""
    if tokenizer is None:
        raise InputError(
            "text needs a tokenizer, and the model has none: pass one, as in LanguageModel((model, tokenizer))"
        )
    return tokenizer.decode(ids, skip_special_tokens=True)


def one_or_many(texts: list[str]) -> str | list[str]:
    """Return the only text, or the list of them."""
    return texts[0] if len(texts) == 1 else texts


def _added(tokenizer: Any, ids: torch.Tensor) -> str:
    """Return what the last of `ids` adds to the text. A character of several tokens comes with its last token."""
    whole, before = decoded(tokenizer, ids), decoded(tokenizer, ids[:-1]).rstrip(_INCOMPLETE)
    return "" if whole.endswith(_INCOMPLETE) else whole[len(before) :]


def set_generated(run: GenerationRun, generated: GeneratedTokens) -> None:
    """Make a run read its tokens from `generated`, which has to be one of the stopping criteria of the model."""
    run._generated = generated
