"""Which tokens the words of a prompt are, whatever tokenizer made them.

    aligned = align_words(tokenizer, "a red hexagon above a red square")
    aligned["hexagon"]              # range(3, 6): its tokens
    aligned["red square"]           # range(8, 10)
    aligned.find("red")             # (range(2, 3), range(8, 9)): everywhere it occurs
    aligned.words, aligned.spans    # all words, and the tokens of each

What the tokens say, each decoded behind those before it, is laid along the prompt, letter by letter and without regard
to case, accents and spaces. So nothing has to be known of the tokenizer, be it byte-level BPE, that of CLIP,
sentencepiece or a list of words, and the tokens may come with a template around the prompt, with padding, or cut.
"""

import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from itertools import groupby
from typing import Any, NamedTuple

from diffsight.errors import InputError, suggest

# A letter that is written without spaces (Chinese, Japanese), a word, or a mark.
_WIDE = "\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_WIDE}]|[^\W{_WIDE}]+|[^\w\s]")
_BEFORE_WORDS = ("▁", "Ġ")  # how sentencepiece and byte-level BPE write the space before a word, here as tokens
_UNKNOWN = "\ufffd"


@dataclass(frozen=True)
class PromptWords:
    """A prompt's words, in `words`, with the tokens of each, in `spans`: numbers of `ids`, None for a word that has no
    tokens, because it was cut off or the tokenizer drops it. Marks such as a comma are words too."""

    prompt: str
    ids: tuple[int, ...]
    words: tuple[str, ...]
    spans: tuple[range | None, ...]
    pieces: tuple[str, ...] = field(repr=False)  # each token as text

    @property
    def tokens(self) -> range:
        """The tokens of the prompt, from its first to its last."""
        spans = [span for span in self.spans if span is not None]
        if not spans:
            raise InputError(f"none of the tokens are of the prompt {self.prompt!r}")
        return range(min(span.start for span in spans), max(span.stop for span in spans))

    @property
    def cut(self) -> str:
        """What the prompt ends with and has no tokens; empty where all of it has."""
        last = next((i for i in reversed(range(len(self.words))) if self.spans[i] is not None), -1)
        if not any(word[0].isalnum() for word in self.words[last + 1 :]):
            return ""
        text = unicodedata.normalize("NFC", self.prompt)
        return text[_found(text)[last + 1].start() :].rstrip()

    def text(self, span: range) -> str:
        """What tokens say: the words that are whole among them, or else the pieces of one."""
        inside = range(span.start, span.stop)
        whole = [w for w, of in zip(self.words, self.spans) if of and of[0] in inside and of[-1] in inside]
        return " ".join(whole) or "".join(self.pieces[span.start : span.stop])

    def find(self, text: str) -> tuple[range, ...]:
        """The tokens of one word or several that follow each other, at each place where they occur.

        Raises InputError, with the words that there are, where they do not occur; and where their tokens were cut."""
        return tuple(self.span(*place) for place in self.places(text))

    def places(self, text: str) -> tuple[tuple[int, int], ...]:
        """The same as the numbers of the first and behind the last of the words."""
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
        """The tokens of the words from number `start` up to number `stop`."""
        spans = self.spans[start:stop]
        there = [span for span in spans if span is not None]
        if not there or (self.cut and None in spans):
            why = "the prompt is cut before it" if self.cut else "the tokenizer drops it"
            left_out = f": these words are left out: {self.cut!r}" if self.cut else ""
            raise InputError(f"{' '.join(self.words[start:stop])!r} has no tokens, since {why}{left_out}")
        return range(there[0].start, there[-1].stop)

    def __getitem__(self, text: str) -> range:
        """The tokens of words that occur once; InputError where they occur several times."""
        return self.span(*self.place(text))

    def place(self, text: str) -> tuple[int, int]:
        """The place of words that occur once, as in `places`."""
        found = self.places(text)
        if len(found) > 1:
            tokens = ", ".join(_shown(self.span(*place)) for place in found)
            raise InputError(
                f"{text!r} occurs {len(found)} times in the prompt {self.prompt!r}: give the tokens instead, {tokens}"
            )
        return found[0]


def align_words(tokenizer: Any, prompt: str, ids: Sequence[int] | None = None) -> PromptWords:
    """The words of `prompt` and their tokens among `ids`, which are what the tokenizer makes of it, or of a text that
    it stands in; by default `tokenizer(prompt)`."""
    ids = [int(i) for i in (tokenizer(prompt, verbose=False)["input_ids"] if ids is None else ids)]
    words = _split(prompt)
    letters = [(letter, number) for number, word in enumerate(words) for letter in _key(word)]
    said = _said(tokenizer, ids)
    places = _lay("".join(letter for letter, _ in letters), said)
    tokens: list[set[int]] = [set() for _ in words]
    for (_, number), place in zip(letters, places):
        if place is not None:
            tokens[number] |= {said[place].first, said[place].last}
    for gap, unknown in _gaps(places, said):
        lacking = list(dict.fromkeys(letters[i][1] for i in gap))
        for k, number in enumerate(lacking if unknown else ()):
            start, stop = (n * len(unknown) // len(lacking) for n in (k, k + 1))
            tokens[number] |= set(unknown[start : max(stop, start + 1)])
        if not unknown and gap.stop == len(letters) and any(words[number].isalnum() for number in lacking):
            for number in lacking:  # cut off, or the rest of it is
                tokens[number].clear()
    marked = tokenizer.convert_ids_to_tokens(ids)
    spans = (range(min(some), max(some) + 1) if some else None for some in tokens)
    spans = tuple(_with_mark(span, marked) for span in spans)
    pieces = (tokenizer.decode([i]).strip() or mark for i, mark in zip(ids, marked))
    return PromptWords(prompt, tuple(ids), tuple(words), spans, tuple(pieces))


class _Letter(NamedTuple):
    """A letter that tokens say, the number of the first and of the last of them."""

    text: str
    first: int
    last: int


def _lay(prompt: str, said: list[_Letter]) -> list[int | None]:
    """The place in what the tokens say of each letter of the prompt."""
    stream = "".join(letter.text for letter in said)
    whole = [match.start() for match in re.finditer(f"(?={re.escape(prompt)})", stream)] if prompt else []
    if whole:  # the last, since a template may say the same before; it is no part of another word
        start = max(whole, key=lambda at: (_begins(said, at) and _begins(said, at + len(prompt)), at))
        return list(range(start, start + len(prompt)))
    places: list[int | None] = [None] * len(prompt)
    for a, b, length in SequenceMatcher(None, prompt, stream, autojunk=False).get_matching_blocks():
        places[a : a + length] = range(b, b + length)
    return places


def _begins(said: list[_Letter], place: int) -> bool:
    """Whether a token begins, or all end, at a place."""
    return place in (0, len(said)) or said[place - 1].last != said[place].last


def _gaps(places: list[int | None], said: list[_Letter]) -> Iterator[tuple[range, list[int]]]:
    """The letters that no token says, each run of them with the unknown tokens that lie there."""
    start = 0
    for lacking, run in groupby(places, key=lambda place: place is None):
        stop = start + len(list(run))
        if lacking:
            left, right = (places[start - 1] + 1 if start else 0), (places[stop] if stop < len(places) else len(said))
            yield range(start, stop), [letter.first for letter in said[left:right] if letter.text == _UNKNOWN]
        start = stop


def _said(tokenizer: Any, ids: list[int]) -> list[_Letter]:
    """What the tokens say. A letter may take several; those that the tokenizer adds say nothing, and those that stand
    for what it does not know say the unknown letter."""
    said: list[_Letter] = []
    content, unknown = _content(tokenizer, ids)
    read: list[int] = []
    before, first = "", None
    for number in content:
        if ids[number] == unknown:
            said.append(_Letter(_UNKNOWN, number, number))
            continue
        read.append(ids[number])
        first = number if first is None else first
        text = tokenizer.decode(read, clean_up_tokenization_spaces=False)
        if text.endswith(_UNKNOWN):
            continue  # the token ends within a letter
        text = _key(text)
        said += [_Letter(letter, first, number) for letter in text[len(before) :]]
        before, first = text, None
    return said


def _content(tokenizer: Any, ids: list[int]) -> tuple[list[int], int | None]:
    """The numbers of the tokens that may be a prompt's: no padding, and none that the tokenizer adds. And the token for
    what it does not know; byte-level tokenizers know everything, and name their end instead."""
    names = ("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id")
    added = {getattr(tokenizer, name, None) for name in names}
    padding, unknown = (getattr(tokenizer, name, None) for name in ("pad_token_id", "unk_token_id"))
    start, stop = 0, len(ids)
    while stop > start and ids[stop - 1] == padding:
        stop -= 1
    while start < stop and ids[start] == padding:
        start += 1
    added |= set(tokenizer.all_special_ids) - {padding, unknown}  # padding may be a mark that prompts have: SDXL's "!"
    return [n for n in range(start, stop) if ids[n] not in added], None if unknown in added else unknown


def _with_mark(span: range | None, marked: list[str]) -> range | None:
    """With the token for the space before a word, where that is one of its own."""
    if span is None or span.start == 0 or marked[span.start - 1] not in _BEFORE_WORDS:
        return span
    return span if marked[span.start].startswith(_BEFORE_WORDS) else range(span.start - 1, span.stop)


def _split(text: str) -> list[str]:
    return [match[0] for match in _found(unicodedata.normalize("NFC", text))]


def _found(text: str) -> list[re.Match]:
    return [match for match in _WORD.finditer(text) if _key(match[0])]


def _key(text: str) -> str:
    """A text as it is compared: without case, accents and spaces."""
    plain = "".join(letter.casefold() for letter in unicodedata.normalize("NFKD", text))
    return "".join(letter for letter in plain if not letter.isspace() and not unicodedata.combining(letter))


def _shown(span: range) -> str:
    return str(span.start) if len(span) == 1 else str(span)
