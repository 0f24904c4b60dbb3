"""Concepts: words that attend to the image but do not affect it (Helbling et al., ConceptAttention, ICML 2025).

Two rows are drawn from the same noise. The first row has the prompt. In the second, the words replace the prompt in the
text stream, and after each attention the image continues with the output of the first row. So the image is the same in
both rows, and the words attend to themselves and to the image.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from diffsight.errors import InputError
from diffsight.lenses.attention.word_keys import WordKeys
from diffsight.lenses.encoders.drawing import for_each_row
from diffsight.pipelines.diffusion.attention import Attention
from diffsight.pipelines.diffusion.encoding import record_encoding
from diffsight.pipelines.diffusion.model import DiffusionModel

_SAME = 1e-3  # the relative difference of queries that computing in a batch may cause


class Concepts:
    """Words that replace the prompt of one text encoder.

    Args:
        model: The model.
        prompt: The prompt of the image.
        words: The words.
        encoder: The text encoder that reads the words. None: the last one with a prompt of its own.
        joint: The joint attention products of text and image.
        arguments: The arguments of the pipeline.

    Raises:
        InputError: The pipeline has no joint attention, or the words cannot be given to the encoder alone.
    """

    def __init__(
        self,
        model: DiffusionModel,
        prompt: str,
        words: Sequence[str] | str | None,
        encoder: str | None,
        joint: Sequence[Attention],
        arguments: Mapping[str, Any],
    ) -> None:
        if not joint:
            raise InputError(
                'method="concept" needs joint attention of text and image, but none was found in '
                f'{type(model.pipeline).__name__}: use method="cross"'
            )
        self._joint = joint
        named = [words] if isinstance(words, str) else words and list(dict.fromkeys(words))
        if named is None:
            named = WordKeys(model, prompt, None, encoder, record_encoding(model, prompt, arguments).encoders).names
        if not named or not all(isinstance(word, str) and word.strip() for word in named):
            raise InputError("words: pass a word, or a list of words")
        encoder = encoder or [name for name in joint[0].text if _argument(name) in model.argument_names][-1]
        text, argument = " ".join(named), _argument(encoder)
        given = {"prompt": prompt, **arguments, argument: text}
        records = record_encoding(model, given.pop("prompt"), given).encoders
        self._words = WordKeys(model, text, named, encoder, records, in_order=True)
        self.arguments = {**for_each_row(arguments, 2), "prompt": [prompt, prompt], argument: [prompt, text]}
        self.names = self._words.names

    def tokens(self, attention: Attention) -> list[list[int]]:
        """Return the queries of each word in the second row."""
        return self._words.keys(attention)

    def read(
        self, run: Any, is_read: Callable[[Attention], bool], add: Callable[[Attention, torch.Tensor], None]
    ) -> None:
        """Run one step. Let the image of the second row continue with the attention output of the first row, and call
        `add` with the products of the outputs of words and image, (heads, words, positions of the image)."""
        first, second = run.cond.rows
        for number, attention in enumerate(self._joint):
            image = slice(attention.image.start, attention.image.stop)
            if number == 0:
                _check_same(*(row[attention.path].q[:, image] for row in (first, second)))
            seen, words = (row[attention.path].heads_output for row in (first, second))
            if is_read(attention):
                spoken = [words[0, tokens].mean(0) for tokens in self.tokens(attention)]
                add(attention, torch.einsum("whf,nhf->hwn", torch.stack(spoken).float(), seen[0, image].float()))
            words[:, image] = seen[:, image]
            if attention.references is not None:
                references = slice(attention.references.start, attention.references.stop)
                words[:, references] = seen[:, references]


def _argument(encoder: str) -> str:
    """Return the argument of a pipeline that a text encoder reads: `prompt_2` for `text_encoder_2`."""
    number = re.search(r"_\d+$", encoder)
    return f"prompt{number.group()}" if number else "prompt"


def _check_same(a: torch.Tensor, b: torch.Tensor) -> None:
    if (a - b).norm() > _SAME * a.norm():
        raise InputError(
            'method="concept" cannot be used with this pipeline, because the words also affect the image in another '
            "way, such as through a pooled vector of the same text encoder"
        )
