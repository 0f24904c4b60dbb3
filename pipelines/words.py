"""Align the words of a prompt with its tokens, for any tokenizer.

    aligned = align_words(tokenizer, "a red hexagon above a red square")
    aligned["hexagon"]              # range(3, 6): its tokens
    aligned["red square"]           # range(8, 10)
    aligned.find("red")             # (range(2, 3), range(8, 9)): everywhere it occurs
    aligned.words, aligned.spans    # all words, and the tokens of each

The tokens are decoded one after the other, and their text is aligned with the prompt character by character, ignoring
case, accents and spaces. This needs no knowledge of the tokenizer and works for byte-level BPE, CLIP, sentencepiece or
a list of words. The tokens may be truncated, have padding, or contain a template around the prompt.
"""

import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from difflib import SequenceMatcher
from itertools import groupby
from typing import Any, NamedTuple

from diffsight.errors import InputError, suggest

# A character that is written without spaces (Chinese, Japanese), a word, or a punctuation mark.
_WIDE = "\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_WIDE}]|[^\W{_WIDE}]+|[^\w\s]")
_BEFORE_WORDS = ("▁", "Ġ")  # the space before a word in sentencepiece and byte-level BPE, as a token
_UNKNOWN = "\ufffd"


@dataclass(frozen=True)
class PromptWords:
    """The words of a prompt and the tokens of each. Punctuation marks are words too.

    Attributes:
        prompt: The prompt.
        ids: The token ids.
        words: The words.
        spans: The tokens of each word, as indices of `ids`. None for a word without tokens, which was cut off or
            dropped by the tokenizer.
        pieces: Each token as text.
    """

    prompt: str
    ids: tuple[int, ...]
    words: tuple[str, ...]
    spans: tuple[range | None, ...]
    pieces: tuple[str, ...] = field(repr=False)

    @property
    def tokens(self) -> range:
        """The tokens of the prompt, from its first to its last."""
        spans = [span for span in self.spans if span is not None]
        if not spans:
            raise InputError(f"none of the tokens belong to the prompt {self.prompt!r}")
        return range(min(span.start for span in spans), max(span.stop for span in spans))

    @property
    def cut(self) -> str:
        """The end of the prompt that has no tokens, or an empty string."""
        last = next((i for i in reversed(range(len(self.words))) if self.spans[i] is not None), -1)
        if not any(word[0].isalnum() for word in self.words[last + 1 :]):
            return ""
        text = unicodedata.normalize("NFC", self.prompt)
        return text[_found(text)[last + 1].start() :].rstrip()

    def text(self, span: range) -> str:
        """Return the text of tokens: the whole words that they contain, or else the pieces of one word."""
        inside = range(span.start, span.stop)
        whole = [w for w, of in zip(self.words, self.spans) if of and of[0] in inside and of[-1] in inside]
        return " ".join(whole) or "".join(self.pieces[span.start : span.stop])

    def find(self, text: str) -> tuple[range, ...]:
        """Return the tokens of one or several consecutive words, at each place where they occur.

        Raises:
            InputError: The words do not occur, or they have no tokens.
        """
        return tuple(self.span(*place) for place in self.places(text))

    def places(self, text: str) -> tuple[tuple[int, int], ...]:
        """Return where words occur, as pairs `(start, stop)` of word numbers."""
        wanted, known = [_key(word) for word in _split(text)], [_key(word) for word in self.words]
        starts = range(len(known) - len(wanted) + 1) if wanted else ()
        found = tuple((at, at + len(wanted)) for at in starts if known[at : at + len(wanted)] == wanted)
        if not found:
            shown = list(dict.fromkeys(word for word in self.words if word[0].isalnum()))
            raise InputError(
                f"{text!r} does not occur in the prompt {self.prompt!r}{suggest(text, shown)}: "
                f"its words are {', '.join(shown)}"
            )
        return found

    def span(self, start: int, stop: int) -> range:
        """Return the tokens of the words from number `start` up to, but not including, `stop`."""
        spans = self.spans[start:stop]
        there = [span for span in spans if span is not None]
        if not there or (self.cut and None in spans):
            why = "the prompt is truncated before it" if self.cut else "the tokenizer drops it"
            left_out = f" (left out: {self.cut!r})" if self.cut else ""
            raise InputError(f"{' '.join(self.words[start:stop])!r} has no tokens, because {why}{left_out}")
        return range(there[0].start, there[-1].stop)

    def __getitem__(self, text: str) -> range:
        """Return the tokens of words that occur once. Raise InputError if they occur several times."""
        return self.span(*self.place(text))

    def place(self, text: str) -> tuple[int, int]:
        """Return the place of words that occur once, as in `places`."""
        found = self.places(text)
        if len(found) > 1:
            tokens = ", ".join(_shown(self.span(*place)) for place in found)
            raise InputError(
                f"{text!r} occurs {len(found)} times in the prompt {self.prompt!r}: pass a longer text that "
                f"occurs once or, where token numbers are allowed, one of {tokens}"
            )
        return found[0]


def align_words(tokenizer: Any, prompt: str, ids: Sequence[int] | None = None) -> PromptWords:
    """Align the words of a prompt with its tokens.

    Args:
        tokenizer: The tokenizer.
        prompt: The prompt.
        ids: The token ids of the prompt, or of a text that contains it. `tokenizer(prompt)` by default.

    Raises:
        InputError: `tokenizer` is not a tokenizer.
    """
    if not hasattr(tokenizer, "convert_ids_to_tokens"):
        raise InputError(
            f"align_words takes a tokenizer, such as model.tokenizer or model.pipeline.tokenizer, not a "
            f"{type(tokenizer).__name__}"
        )
    ids = [int(i) for i in (tokenizer(prompt, verbose=False)["input_ids"] if ids is None else ids)]
    added = _vectors_of_a_token(tokenizer, ids)
    if added:
        return _with_vectors(
            tokenizer, align_words(tokenizer, prompt, [ids[n] for n in added]), ids, list(added.values())
        )
    words = _split(prompt)
    characters = [(character, number) for number, word in enumerate(words) for character in _key(word)]
    decoded = _decode(tokenizer, ids)
    places = _match("".join(character for character, _ in characters), decoded)
    tokens: list[set[int]] = [set() for _ in words]
    for (_, number), place in zip(characters, places):
        if place is not None:
            tokens[number] |= {decoded[place].first, decoded[place].last}
    for gap, unknown in _gaps(places, decoded):
        lacking = list(dict.fromkeys(characters[i][1] for i in gap))
        for k, number in enumerate(lacking if unknown else ()):
            start, stop = (n * len(unknown) // len(lacking) for n in (k, k + 1))
            tokens[number] |= set(unknown[start : max(stop, start + 1)])
        if not unknown and gap.stop == len(characters) and any(words[number].isalnum() for number in lacking):
            for number in lacking:  # the word is cut off, entirely or at its end
                tokens[number].clear()
    marked = tokenizer.convert_ids_to_tokens(ids)
    spans = (range(min(some), max(some) + 1) if some else None for some in tokens)
    spans = tuple(_with_mark(span, marked) for span in spans)
    pieces = (tokenizer.decode([i]).strip() or mark for i, mark in zip(ids, marked))
    return PromptWords(prompt, tuple(ids), tuple(words), spans, tuple(pieces))


def _vectors_of_a_token(tokenizer: Any, ids: list[int]) -> dict[int, range]:
    """Return the tokens of a prompt, each with the indices of its vectors. Textual inversion tokens have several.

    A pipeline reads `<cat>` with three vectors as `<cat> <cat>_1 <cat>_2`. Empty if there is no such token."""
    known = getattr(tokenizer, "get_added_vocab", dict)()
    spans: dict[int, range] = {}
    first = 0
    for n, piece in enumerate(tokenizer.convert_ids_to_tokens(ids)):
        if n and piece in known and piece == f"{tokenizer.convert_ids_to_tokens(ids[first])}_{n - first}":
            spans[first] = range(first, n + 1)
        else:
            first = n
            spans[n] = range(n, n + 1)
    return spans if len(spans) < len(ids) else {}


def _with_vectors(tokenizer: Any, aligned: PromptWords, ids: list[int], vectors: list[range]) -> PromptWords:
    """Return the alignment of a prompt in which token *i* of `aligned` stands for the tokens `vectors[i]` of `ids`."""
    spans = (span and range(vectors[span.start].start, vectors[span.stop - 1].stop) for span in aligned.spans)
    marked = tokenizer.convert_ids_to_tokens(ids)
    pieces = (tokenizer.decode([i]).strip() or mark for i, mark in zip(ids, marked))
    return replace(aligned, ids=tuple(ids), spans=tuple(spans), pieces=tuple(pieces))


class _Character(NamedTuple):
    """A character of the decoded tokens, and the indices of the first and last token it comes from."""

    text: str
    first: int
    last: int


def _match(prompt: str, decoded: list[_Character]) -> list[int | None]:
    """Return, for each character of the prompt, its index in the decoded characters."""
    stream = "".join(character.text for character in decoded)
    whole = [match.start() for match in re.finditer(f"(?={re.escape(prompt)})", stream)] if prompt else []
    if whole:  # the last match outside other words, since a template may also contain the prompt earlier
        start = max(whole, key=lambda at: (_begins(decoded, at) and _begins(decoded, at + len(prompt)), at))
        return list(range(start, start + len(prompt)))
    places: list[int | None] = [None] * len(prompt)
    for a, b, length in SequenceMatcher(None, prompt, stream, autojunk=False).get_matching_blocks():
        places[a : a + length] = range(b, b + length)
    return places


def _begins(decoded: list[_Character], place: int) -> bool:
    """Return whether a token begins at an index, or the last token ends there."""
    return place in (0, len(decoded)) or decoded[place - 1].last != decoded[place].last


def _gaps(places: list[int | None], decoded: list[_Character]) -> Iterator[tuple[range, list[int]]]:
    """Yield the stretches of characters that no token decodes to, each with the unknown tokens at that place."""
    start = 0
    for lacking, run in groupby(places, key=lambda place: place is None):
        stop = start + len(list(run))
        if lacking:
            left, right = (
                (places[start - 1] + 1 if start else 0),
                (places[stop] if stop < len(places) else len(decoded)),
            )
            yield (
                range(start, stop),
                [character.first for character in decoded[left:right] if character.text == _UNKNOWN],
            )
        start = stop


def _decode(tokenizer: Any, ids: list[int]) -> list[_Character]:
    """Return the decoded characters of the tokens. A character may span several tokens.

    Tokens that the tokenizer adds decode to nothing, and unknown tokens decode to the unknown character."""
    decoded: list[_Character] = []
    content, unknown = _content(tokenizer, ids)
    read: list[int] = []
    before, first = "", None
    for number in content:
        if ids[number] == unknown:
            decoded.append(_Character(_UNKNOWN, number, number))
            continue
        read.append(ids[number])
        first = number if first is None else first
        text = tokenizer.decode(read, clean_up_tokenization_spaces=False)
        if text.endswith(_UNKNOWN):
            continue  # the token ends inside a character
        text = _key(text)
        decoded += [_Character(character, first, number) for character in text[len(before) :]]
        before, first = text, None
    return decoded


def _content(tokenizer: Any, ids: list[int]) -> tuple[list[int], int | None]:
    """Return the indices of the tokens that may belong to a prompt (no padding, no tokens added by the tokenizer), and
    the id of the unknown token or None. Byte-level tokenizers have none and report their end token instead."""
    names = ("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id")
    added = {getattr(tokenizer, name, None) for name in names}
    padding, unknown = (getattr(tokenizer, name, None) for name in ("pad_token_id", "unk_token_id"))
    start, stop = 0, len(ids)
    while stop > start and ids[stop - 1] == padding:
        stop -= 1
    while start < stop and ids[start] == padding:
        start += 1
    added |= set(tokenizer.all_special_ids) - {
        padding,
        unknown,
    }  # the padding token may occur in prompts: SDXL's "!"
    return [n for n in range(start, stop) if ids[n] not in added], None if unknown in added else unknown


def _with_mark(span: range | None, marked: list[str]) -> range | None:
    """Return a span, extended by the token of the space before the word if the space is a separate token."""
    if span is None or span.start == 0 or marked[span.start - 1] not in _BEFORE_WORDS:
        return span
    return span if marked[span.start].startswith(_BEFORE_WORDS) else range(span.start - 1, span.stop)


def _split(text: str) -> list[str]:
    return [match[0] for match in _found(unicodedata.normalize("NFC", text))]


def _found(text: str) -> list[re.Match]:
    return [match for match in _WORD.finditer(text) if _key(match[0])]


def _key(text: str) -> str:
    """Normalize a text for comparison: remove case, accents and spaces."""
    plain = "".join(character.casefold() for character in unicodedata.normalize("NFKD", text))
    return "".join(character for character in plain if not character.isspace() and not unicodedata.combining(character))


def _shown(span: range) -> str:
    return str(span.start) if len(span) == 1 else str(span)
