"""Token ids as text."""

from diffsight.pipelines.language.model import LanguageModel


class Spelling:
    """Spells the tokens of a model. Without a tokenizer, a token is spelled as its id.

    spell = Spelling(model)
    spell(1234)                 # " Paris"
    spell.text([464, 3797])     # "The cat"
    """

    def __init__(self, model: LanguageModel) -> None:
        self._tokenizer = model.tokenizer
        self._known: dict[int, str] = {}

    def __call__(self, token: int) -> str:
        """Return one token as text."""
        if token not in self._known:
            self._known[token] = self._spell(token)
        return self._known[token]

    def text(self, ids: list[int]) -> str:
        """Return several tokens as one text, without special tokens."""
        if self._tokenizer is None:
            return " ".join(map(str, ids))
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def _spell(self, token: int) -> str:
        if self._tokenizer is None:
            return str(token)
        text = self._tokenizer.decode([token])
        piece = self._tokenizer.convert_ids_to_tokens(token) or ""
        return f" {text}" if piece.startswith("▁") and not text.startswith(" ") else text  # decode drops this space
