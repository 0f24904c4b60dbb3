"""The columns of `encoder_patching`: which tokens of the source replace which tokens of the target.

find_columns(source, target, words="circle", into="square", align="each")       # of PromptWords
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from diffsight.errors import InputError
from diffsight.pipelines.numbers import as_integer, unpacked
from diffsight.pipelines.words import PromptWords

WordOrTokens = str | int | range


@dataclass(frozen=True)
class Column:
    """Tokens of the source that replace tokens of the target."""

    title: str
    source: range
    target: range

    def aligned(self, state: torch.Tensor, align: str) -> tuple[range, torch.Tensor]:
        """Return the tokens of the target, and the hidden states that replace them.

        Args:
            state: The hidden state of the source, (tokens, features).
            align: As in `encoder_patching`.
        """
        taken, tokens = state[self.source.start : self.source.stop], self.target
        if align == "last":
            return tokens[-1:], taken[-1:]
        return tokens, taken.mean(0, keepdim=True) if align == "mean" else taken


def find_columns(
    source: PromptWords,
    target: PromptWords,
    words: WordOrTokens | Sequence[WordOrTokens] | None,
    into: WordOrTokens | Sequence[WordOrTokens] | None,
    align: str,
) -> list[Column]:
    """Return the columns for the arguments `words`, `into` and `align` of `encoder_patching`.

    Raises:
        InputError: A word does not occur in its prompt or occurs several times, or the numbers of words or tokens
            differ.
    """
    pairs = list(_pairs(source, target, words, into))
    for item, taken, place in pairs:
        if align == "each" and len(taken) != len(place):
            raise InputError(
                f"{_shown(item)} has {len(taken)} tokens in the source, but replaces {len(place)} in the target, "
                f'{target.text(place)!r}: use align="last" or "mean", or words with the same number of tokens'
            )
    return [Column(_title(source.text(taken), target.text(place)), taken, place) for _, taken, place in pairs]


def _pairs(
    source: PromptWords, target: PromptWords, words: Any, into: Any
) -> Iterable[tuple[WordOrTokens, range, range]]:
    """Yield each item, its tokens in the source, and the tokens in the target that they replace."""
    if words is None:
        if into is not None:
            raise InputError("`into` says what `words` replace, so pass `words` as well")
        sizes = len(source.tokens), len(target.tokens)
        if sizes[0] != sizes[1]:
            raise InputError(
                f"the prompts have {sizes[0]} and {sizes[1]} tokens, so their tokens cannot be paired one by one: "
                "pass words of the source as words=, and the words they replace as into="
            )
        for a, b in zip(source.tokens, target.tokens):
            yield a, range(a, a + 1), range(b, b + 1)
        return
    words, into = _listed("words", words), None if into is None else _listed("into", into)
    if into is not None and len(into) != len(words):
        raise InputError(f"into has {len(into)} items for {len(words)} words: pass one for each")
    for i, item in enumerate(words):
        yield item, _tokens(source, item), _tokens(target, into[i]) if into else _same_place(source, target, item)


def _same_place(source: PromptWords, target: PromptWords, item: WordOrTokens) -> range:
    """Return the tokens in the target at the place of `item` in the source."""
    if not isinstance(item, str):
        return _tokens(target, item)
    if len(source.words) != len(target.words):
        raise InputError(
            f"the prompts have {len(source.words)} and {len(target.words)} words (including punctuation), so it is "
            f"unclear what {item!r} replaces: pass the words it replaces as into="
        )
    return target.span(*source.place(item))


def _tokens(prompt: PromptWords, item: WordOrTokens) -> range:
    if isinstance(item, str):
        return prompt[item]
    tokens = range(int(item), int(item) + 1) if not isinstance(item, range) else item
    if not tokens or tokens.step != 1 or tokens.start < 0 or tokens.stop > len(prompt.ids):
        asked = f"are no tokens {item!r}" if isinstance(item, range) else f"is no token {item!r}"
        raise InputError(f"there {asked}: {prompt.prompt!r} has the tokens 0 to {len(prompt.ids) - 1}")
    return tokens


def _listed(name: str, items: Any) -> list[WordOrTokens]:
    items = unpacked(items)
    listed = list(items) if isinstance(items, (list, tuple)) else [items]
    for item in listed:
        if not isinstance(item, (str, range)) and as_integer(item) is None:
            raise InputError(f"{name} must be words, token numbers or ranges of token numbers, not {item!r}")
    if not listed:
        raise InputError(f"{name} is empty: pass at least one")
    return listed


def _title(taken: str, place: str) -> str:
    return taken if taken == place else f"{taken} → {place}"


def _shown(item: WordOrTokens) -> str:
    return repr(item) if isinstance(item, (str, range)) else f"token {item}"
