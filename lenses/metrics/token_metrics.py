"""Metrics of language models: numbers that are computed from the logits of one token of the prompt.

    logit_difference(" Paris", " Rome")             # logit of the first minus logit of the second
    token_probability(" Paris")
    kl_divergence()                                 # from the clean run's distribution to the row's, in nats

With several prompt pairs, tokens may be lists with one token for each pair.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from diffsight.errors import InputError
from diffsight.lenses.metrics.metric import LAST_LOGITS, LOGITS, Metric, Outcome
from diffsight.lenses.tokens.choosing import check_language_model, choose_tokens
from diffsight.pipelines.numbers import as_integer

Token = str | int
Tokens = Token | Sequence[Token]


@dataclass(frozen=True)
class TokenMetric(Metric):
    """A metric on the logits of one token of the prompt.

    Attributes:
        name: "logit difference", "probability" or "KL divergence".
        tokens: The tokens that the metric measures, each a token or a list with one token for each pair.
        position: The token of the prompt whose logits count; -1 is the last.
        ids: The ids of `tokens`: for each of them, one id for each pair or one id for all pairs.
    """

    name: str
    tokens: tuple[Tokens, ...] = ()
    position: int = -1
    ids: tuple[tuple[int, ...], ...] = ()

    @property
    def reads(self) -> tuple[str, ...]:
        return (LAST_LOGITS,) if self.position == -1 else (LOGITS,)

    def bound(self, model: Any, pairs: int) -> "TokenMetric":
        check_language_model(self.name, model)
        found = []
        for tokens in self.tokens:
            ids = choose_tokens(model, tokens)
            if len(ids) not in (1, pairs):
                raise InputError(f"{self.name}: {len(ids)} tokens for {pairs} prompt pairs: pass one, or one for each")
            found.append(ids)
        return replace(self, ids=tuple(found))

    def values(self, outcome: Outcome, clean: Outcome, pair: int) -> torch.Tensor:
        logits = self._logits(outcome)
        if self.name == "KL divergence":
            wanted = self._logits(clean).log_softmax(-1)
            possible = ~wanted.isneginf()[0]  # a token with the logit -inf adds nothing
            wanted, found = wanted[:, possible], logits.log_softmax(-1)[:, possible]
            return (wanted.exp() * (wanted - found)).sum(-1)
        first, *second = (ids[pair if len(ids) > 1 else 0] for ids in self.ids)
        if second:
            return logits[:, first] - logits[:, second[0]]
        return logits.softmax(-1)[:, first]

    def _logits(self, outcome: Outcome) -> torch.Tensor:
        """Return the logits at the position, (rows, vocabulary)."""
        count = outcome.logits.shape[1]
        if not -count <= self.position < count:
            raise InputError(f"{self.name}: there is no position {self.position}: there are {count} tokens")
        return outcome.logits[:, self.position].float()


def logit_difference(right: Tokens, wrong: Tokens, position: int = -1) -> TokenMetric:
    """Return the metric: the logit of one token minus the logit of another, as the next token.

        logit_difference(" Paris", " Rome")
        logit_difference([" Paris", " Tokyo"], [" Rome", " Osaka"])     # for two prompt pairs

    Args:
        right: The token that the clean run should prefer: a string that is one token, an id, or a list with one for
            each prompt pair.
        wrong: The other token.
        position: The token of the prompt whose logits count; -1 is the last.
    """
    return TokenMetric("logit difference", (right, wrong), _checked(position))


def token_probability(token: Tokens, position: int = -1) -> TokenMetric:
    """Return the metric: the probability of a token as the next token. For arguments, see `logit_difference`."""
    return TokenMetric("probability", (token,), _checked(position))


def kl_divergence(position: int = -1) -> TokenMetric:
    """Return the metric: the Kullback-Leibler divergence of a row's next-token distribution from the clean run's, sum
    p_clean log(p_clean / p_row), in nats. It is 0 for the clean run itself.

    Args:
        position: The token of the prompt whose distribution counts; -1 is the last.
    """
    return TokenMetric("KL divergence", (), _checked(position))


def _checked(position: Any) -> int:
    number = as_integer(position)
    if number is None:
        raise InputError(f"position is the number of a token, -1 for the last, not {position!r}")
    return number
