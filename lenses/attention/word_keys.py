"""Which keys of the attention modules belong to the words of a prompt.

words = WordKeys(model, prompt, None, None, record_encoding(model, prompt, arguments).encoders)
words.names                             # ("red", "circle"): the words that were asked for, or all of the prompt
words.keys(attention)                   # the keys of each word in a product, a list for each word
"""

from collections.abc import Mapping, Sequence

from diffsight.errors import InputError, suggest
from diffsight.pipelines.diffusion.attention import Attention
from diffsight.pipelines.diffusion.encoder_calls import EncoderRecord
from diffsight.pipelines.diffusion.model import DiffusionModel
from diffsight.pipelines.diffusion.prompts import text_tokenizer
from diffsight.pipelines.words import PromptWords, align_words


class WordKeys:
    """The words of a prompt, and their keys.

    Args:
        model: The model.
        prompt: The prompt.
        words: The words to look for, each one or several words of the prompt. None: all words of the prompt.
        encoder: The text encoder whose tokens count. None: every text encoder.
        records: The calls of the text encoders that encode the prompt, by name.
        in_order: Whether the prompt is made of these words in this order, so that each is the next one in the prompt,
            even if it also occurs in another.

    Raises:
        InputError: A word is not in the prompt, or the encoder does not exist.
    """

    def __init__(
        self,
        model: DiffusionModel,
        prompt: str,
        words: Sequence[str] | str | None,
        encoder: str | None,
        records: Mapping[str, EncoderRecord],
        in_order: bool = False,
    ) -> None:
        records = {name: record for name, record in records.items() if record.calls}
        if encoder is not None and encoder not in records:
            raise InputError(f"there is no text encoder {encoder!r}{suggest(encoder, records)}: {', '.join(records)}")
        self._aligned: dict[str, PromptWords] = {}
        for name, record in records.items():
            if record.tokenizer is not None and record.prompt.rows and encoder in (None, name):
                ids = record.prompt.ids[record.prompt.rows[0]].tolist()
                tokenizer = text_tokenizer(getattr(model.pipeline, record.tokenizer))
                self._aligned[name] = align_words(tokenizer, prompt, ids)
        if not self._aligned:
            raise InputError(f"{type(model.pipeline).__name__} has no text encoder whose tokens are known")
        first = next(iter(self._aligned.values()))
        words = [words] if isinstance(words, str) else words
        self.names = tuple(dict.fromkeys(words or (word for word in first.words if word[0].isalnum())))
        self._places: dict[str, Sequence[tuple[int, int]]] = {}
        if not self.names:
            raise InputError(f"the prompt {prompt!r} has no words")
        end = 0
        for word in self.names:
            places = first.places(word)
            self._places[word] = [place for place in places if place[0] == end] if in_order else places
            for place in self._places[word]:
                _, end = place
                first.span(*place)

    def keys(self, attention: Attention) -> list[list[int]]:
        """Return the keys of each word in a product.

        Raises:
            InputError: None of the tokens of a word is among the keys.
        """
        return [self._of_word(attention, word) for word in self.names]

    def _of_word(self, attention: Attention, word: str) -> list[int]:
        found = set()
        for encoder, keys in attention.text.items():
            if encoder in self._aligned:
                spans = (self._aligned[encoder].span(*place) for place in self._places[word])
                tokens = [token for span in spans for token in span]
                found |= {keys[token] for token in tokens if token < len(keys) and keys[token] is not None}
        if not found:
            raise InputError(
                f"{word!r} has no key in {attention.name}: the text read there does not contain its tokens"
            )
        return sorted(found)
