"""The tokens of a prompt, and those that a position names: a word, the number of a token, a range of numbers.

tokens = PromptTokens.of(model, ids)
tokens.span("Paris"), tokens.span(-1), tokens.span(range(2, 4))
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from diffsight.errors import InputError
from diffsight.lenses.tokens.token_text import Spelling
from diffsight.pipelines.language.model import LanguageModel
from diffsight.pipelines.numbers import as_integer
from diffsight.pipelines.words import PromptWords, align_words


@dataclass(frozen=True)
class PromptTokens:
    """The tokens of a prompt.

    Attributes:
        text: The prompt, without special tokens.
        texts: Each token as text.
        words: The words of the prompt and the tokens of each; None if the model has no tokenizer.
    """

    text: str
    texts: tuple[str, ...]
    words: PromptWords | None = field(default=None, repr=False)

    @classmethod
    def of(cls, model: LanguageModel, ids: Sequence[int]) -> "PromptTokens":
        """Return the tokens with these ids."""
        spell, ids = Spelling(model), list(map(int, ids))
        text = spell.text(ids)
        words = None if model.tokenizer is None else align_words(model.tokenizer, text, ids)
        return cls(text, tuple(map(spell, ids)), words)

    def __len__(self) -> int:
        return len(self.texts)

    def span(self, position: str | int | range) -> range:
        """Return the tokens of a position: words that occur once, a token number (-1 is the last token), or a range of
        numbers.

        Raises:
            InputError: There are no such tokens.
        """
        if isinstance(position, str):
            return self.with_words()[position]
        if isinstance(position, range):
            if not position or position.step != 1 or position.start < 0 or position.stop > len(self):
                raise InputError(f"there are no tokens {position!r}: {self._shown()}")
            return position
        number = as_integer(position)
        if number is None:
            raise InputError(
                f"a position is a word, the number of a token, a range of numbers, or a pair of these, not {position!r}"
            )
        if not -len(self) <= number < len(self):
            raise InputError(f"there is no token {position!r}: {self._shown()}")
        place = number % len(self)
        return range(place, place + 1)

    def with_words(self) -> PromptWords:
        """Return the words. Raise InputError if the model has no tokenizer."""
        if self.words is None:
            raise InputError("positions given as words need a tokenizer, but the model has none: pass token numbers")
        return self.words

    def title(self, span: range) -> str:
        """Return the tokens of a span as one text."""
        return "".join(self.texts[span.start : span.stop]).strip() or "".join(self.texts[span.start : span.stop])

    def _shown(self) -> str:
        return f"the prompt has {len(self)} tokens, {' '.join(map(repr, self.texts))}"
