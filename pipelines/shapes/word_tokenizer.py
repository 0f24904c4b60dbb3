"""The tokenizer of the packaged pipelines: one token per word."""

from collections.abc import Mapping

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

TOKENS = 16  # positions of the text encoders: the longest caption has 12 words, and a start and an end


def make_word_tokenizer(vocabulary: Mapping[str, int], template: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer of lower-case words.

    Args:
        vocabulary: The id of every word, and of `<pad>`, `<start>`, `<end>` and `<unknown>`.
        template: The tokens around a text, `<start> $A <end>` or `$A <end>`.
    """
    tokenizer = Tokenizer(models.WordLevel(dict(vocabulary), unk_token="<unknown>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[(word, vocabulary[word]) for word in ("<start>", "<end>")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=TOKENS,
        padding_side="right",
        bos_token="<start>",
        eos_token="<end>",
        pad_token="<pad>",
        unk_token="<unknown>",
    )
