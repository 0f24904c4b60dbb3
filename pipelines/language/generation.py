"""What a model writes, token by token.

    for step in run.steps:                          # one turn a generated token
        step.tokens, step.text

    for piece in run.stream():
        print(piece, end="")

transformers tells its stopping criteria every token as it is chosen. A run puts one among them that stops nothing and
keeps what it is told.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from diffsight.errors import InputError, suggest
from diffsight.extending import Points, Run, Step, Target, keeping_attribute_errors, raise_kept, tree_of

_INCOMPLETE = "\ufffd"  # what a tokenizer makes of bytes that are no whole letter yet


class Chosen(StoppingCriteria):
    """Never stops anything: it is told every token as it is chosen, and keeps it."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.steps: list[torch.Tensor] = []  # after each step, all token ids so far, (sequences, tokens)
        self.starts: list[int] = []  # of each step, where in these the text begins that it adds to

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.starts.append(self.start_of(input_ids))
        self.steps.append(input_ids)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    def start_of(self, ids: torch.Tensor) -> int:
        """Where in the token ids after the next step the text begins that it adds to: where it did before, unless a
        pipeline has begun another text."""
        goes_on = self.steps and self.steps[-1].shape[-1] == ids.shape[-1] - 1
        return self.starts[-1] if goes_on else ids.shape[-1] - 1

    def along_with(self, others: Iterable[StoppingCriteria] | None) -> StoppingCriteriaList:
        """The criteria for a call of `generate`."""
        return StoppingCriteriaList([*(others or []), self])


class WritingStep(Step):
    """One generated token: from one forward pass to the next."""

    def __init__(self, index: int, component: str, call: tuple[tuple, dict], run: "WritingRun") -> None:
        super().__init__(index, component, call)
        self._run = run

    @property
    def tokens(self) -> torch.Tensor:
        """The token ids chosen in this step, one a sequence (under beam search one a candidate, the best first). Runs
        the model until they are chosen."""
        with keeping_attribute_errors(self):
            return self._run._tokens_after(self.index)[:, -1]

    @property
    def text(self) -> str | list[str]:
        """What the step adds to the text; of several sequences a list. Runs the model until it is there."""
        with keeping_attribute_errors(self):
            return self._run._text_added_in(self.index)

    def __getattr__(self, name: str) -> Any:
        raise_kept(self)
        raise AttributeError(f"a step has no {name!r}{suggest(name, ('index', 'tokens', 'text', 'component'))}")


class WritingRun(Run):
    """A run in which a model may write."""

    _chosen: Chosen | None = None  # where it does

    def stream(self) -> Iterator[str | list[str]]:
        """The text as it is generated, piece by piece: `for piece in model.generate(prompt).stream(): print(piece)`."""
        self._check_generates("stream()")
        for step in self.steps:
            piece = step.text
            if piece and any(piece):
                yield piece

    def _make_step(self, index: int, path: str, call: tuple[tuple, dict]) -> Step:
        if self._chosen is None:
            return super()._make_step(index, path, call)
        return WritingStep(index, path or tree_of(self).title, call, self)

    def _check_generates(self, what: str) -> None:
        if self._chosen is None:
            raise InputError(f"run.{what} is there when the model writes: model.generate(...), not model.trace(...)")

    def _tokens_after(self, step: int) -> torch.Tensor:
        """All token ids after a step. Those of the present step are waited for."""
        if step < len(self._chosen.steps):
            return self._chosen.steps[step]
        chooses = Target(self._chosen, "__call__", f"steps[{step}].tokens")
        return Points(tree_of(self), chooses, self).input

    def _text_added_in(self, step: int) -> str | list[str]:
        ids = self._tokens_after(step)
        known = self._chosen.starts
        start = known[step] if step < len(known) else self._chosen.start_of(ids)
        return one_or_many([_added(self._chosen.tokenizer, row[start:]) for row in ids])


def decoded(tokenizer: Any, ids: torch.Tensor) -> str:
    """Token ids as text."""
    if tokenizer is None:
        raise InputError("a text needs a tokenizer, and the model has none: LanguageModel((model, tokenizer))")
    return tokenizer.decode(ids, skip_special_tokens=True)


def one_or_many(texts: list[str]) -> str | list[str]:
    """The only text, or all."""
    return texts[0] if len(texts) == 1 else texts


def _added(tokenizer: Any, ids: torch.Tensor) -> str:
    """What the last of `ids` adds to the text. A letter of several tokens comes with the last of them."""
    whole, before = decoded(tokenizer, ids), decoded(tokenizer, ids[:-1]).rstrip(_INCOMPLETE)
    return "" if whole.endswith(_INCOMPLETE) else whole[len(before) :]
