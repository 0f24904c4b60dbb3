"""Pairs of positions: which tokens of one prompt take the place of which tokens of another.

clean, corrupted = PromptTokens.of(model, run_of_clean), PromptTokens.of(model, run_of_corrupted)
pair_positions(clean, corrupted, "each")                    # a pair for each token
pair_positions(clean, corrupted, "words")                   # a pair for each word
pair_positions(clean, corrupted, ["Paris", -1, range(2, 4)])
pair_positions(clean, corrupted, [("Eiffel Tower", "Colosseum")], align="last")
"""

from collections.abc import Iterable, Sequence
from typing import Any

from diffsight.errors import InputError
from diffsight.lenses.encoders.columns import Column
from diffsight.lenses.sites.prompt_tokens import PromptTokens
from diffsight.pipelines.numbers import unpacked
from diffsight.pipelines.words import PromptWords

Position = str | int | range | tuple[Any, Any]
Positions = str | Position | Sequence[Position] | None
_KEYWORDS = ("each", "words", "all")
ALIGN = ("each", "last", "mean")


def pair_positions(
    source: PromptTokens, target: PromptTokens, positions: Positions, align: str = "each"
) -> list[Column]:
    """Return which tokens of `source` replace which tokens of `target`, a pair for each position.

    Args:
        source: The tokens of the prompt that values come from.
        target: The tokens of the prompt that they go into.
        positions: "all": all tokens together. "each": every token by itself. "words": every word by itself. A list: its
            items are words, token numbers and ranges of numbers, at the same place in both prompts, or pairs of these,
            the first for `source` and the second for `target`.
        align: What to do if the numbers of tokens differ. "each": raise an error; "last": pair the last tokens;
            "mean": the mean over the source's tokens replaces each of the target's tokens.

    Raises:
        InputError: A position does not exist in a prompt, or numbers of tokens or words differ.
    """
    if align not in ALIGN:
        raise InputError(f"align must be one of {', '.join(map(repr, ALIGN))}, not {align!r}")
    columns = list(_columns(source, target, unpacked(positions)))
    for column in columns:
        if align == "each" and len(column.source) != len(column.target):
            raise InputError(
                f"{source.title(column.source)!r} has {len(column.source)} tokens and {target.title(column.target)!r} "
                f'has {len(column.target)}: pass align="last" or "mean", or positions with the same number of tokens'
            )
    return columns


def _columns(source: PromptTokens, target: PromptTokens, positions: Positions) -> Iterable[Column]:
    if positions == "all":
        _check_same_length(source, target, "all")
        return [Column("all tokens", range(len(source)), range(len(target)))]
    if positions == "each":
        _check_same_length(source, target, "each")
        spans = [range(i, i + 1) for i in range(len(source))]
        return [Column(_title(source.texts[s.start], target.texts[s.start]), s, s) for s in spans]
    if positions == "words":
        return _by_word(source.with_words(), target.with_words())
    if isinstance(positions, str) or not isinstance(positions, Iterable) or isinstance(positions, (range, tuple)):
        positions = [positions]
    listed = list(positions)
    if not listed:
        raise InputError(f"no positions are chosen: pass some, or one of {', '.join(map(repr, _KEYWORDS))}")
    return [_column(source, target, position) for position in listed]


def _column(source: PromptTokens, target: PromptTokens, position: Position) -> Column:
    if isinstance(position, tuple):
        if len(position) != 2:
            raise InputError(f"a pair of positions has two items, one for each prompt, not {position!r}")
        taken, place = source.span(position[0]), target.span(position[1])
    else:
        taken = source.span(position)
        place = _same_place(source, target, position) if isinstance(position, str) else target.span(position)
    return Column(_title(source.title(taken), target.title(place)), taken, place)


def _same_place(source: PromptTokens, target: PromptTokens, text: str) -> range:
    """Return the tokens of the words in `target` at the same place as the words `text` in `source`."""
    ours, theirs = source.with_words(), target.with_words()
    if len(ours.words) != len(theirs.words):
        raise InputError(
            f"the prompts have {len(ours.words)} and {len(theirs.words)} words (including punctuation), so it is "
            f"unclear which tokens {text!r} replaces: pass a pair, ({text!r}, …)"
        )
    return theirs.span(*ours.place(text))


def _by_word(source: PromptWords, target: PromptWords) -> Iterable[Column]:
    if len(source.words) != len(target.words):
        raise InputError(
            f"the prompts have {len(source.words)} and {len(target.words)} words, so they cannot be paired one by one: "
            f"{' '.join(source.words)!r} and {' '.join(target.words)!r}. Pass pairs, [(word, word), …]"
        )
    for number, (ours, theirs) in enumerate(zip(source.words, target.words)):
        yield Column(_title(ours, theirs), source.span(number, number + 1), target.span(number, number + 1))


def _check_same_length(source: PromptTokens, target: PromptTokens, positions: str) -> None:
    if len(source) != len(target):
        raise InputError(
            f'positions="{positions}" pairs the tokens of two prompts one by one, but they have {len(source)} and '
            f"{len(target)} tokens:\n  {' '.join(map(repr, source.texts))}\n  {' '.join(map(repr, target.texts))}\n"
            'Align them by words with positions="words", or pass pairs of words such as '
            'positions=[("Rome", "Los Angeles")] with align="last"'
        )


def _title(taken: str, place: str) -> str:
    taken, place = taken.strip() or taken, place.strip() or place
    return taken if taken == place else f"{taken} → {place}"
