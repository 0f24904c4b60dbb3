"""Words and their tokens, with a real tokenizer of each kind, built here."""

import functools

import pytest
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from diffsight.errors import InputError
from diffsight.pipelines import align_words
from models import diffusion, text_encoders

PROMPT = "A red hexagon, above the café: 北京 (blue)"


def word_level():
    """Return a tokenizer with a list of words, like that of the packaged pipelines."""
    words = ["<unk>", "<s>", "</s>", "<pad>", "a", "red", "above", "the", "blue"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    special = {"unk_token": "<unk>", "pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def word_piece():
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "red", "hex", "##ag", "##on", ",", "above", "the", "cafe"]
    pieces += [":", "(", ")", "b", "##lue"]
    return transformers.BertTokenizer(vocab={piece: i for i, piece in enumerate(pieces)})


# Of each, the tokens of "hexagon", "café" and "blue", as the tokenizer writes them.
KINDS = {
    "clip": (diffusion.clip_tokenizer, "h e x a g o n</w>", "c a f Ã ©</w>", "blue</w>"),
    "sentencepiece": (diffusion.t5_tokenizer, "▁ h e x a g o n", "▁ c a f <unk>", "b l u e"),
    "byte fallback": (diffusion.gemma_tokenizer, "▁ h e x a g o n", "▁ c a f <0xC3> <0xA9>", "blue"),
    "byte level": (text_encoders.qwen_tokenizer, "Ġ h e x a g o n", "Ġ c a f Ã ©", "b l u e"),
    "words": (word_level, "<unk>", "<unk>", "blue"),
    "word pieces": (word_piece, "hex ##ag ##on", "cafe", "b ##lue"),
}


@functools.cache
def tokenizer_of(kind):
    return KINDS[kind][0]()


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def written(tokenizer, aligned, span):
    return " ".join(tokenizer.convert_ids_to_tokens(list(aligned.ids[span.start : span.stop])))


def test_words_and_their_tokens(kind):
    tokenizer = tokenizer_of(kind)
    aligned = align_words(tokenizer, PROMPT)
    assert aligned.words == ("A", "red", "hexagon", ",", "above", "the", "café", ":", "北", "京", "(", "blue", ")")
    assert list(aligned.ids) == tokenizer(PROMPT).input_ids
    for word, tokens in zip(("hexagon", "café", "blue"), KINDS[kind][1:], strict=True):
        assert written(tokenizer, aligned, aligned[word]) == tokens
    starts = [span.start for span in aligned.spans]
    assert starts == sorted(starts)


def test_words_that_follow_each_other(kind):
    aligned = align_words(tokenizer_of(kind), PROMPT)
    span = aligned["red hexagon"]
    assert (span.start, span.stop) == (aligned["red"].start, aligned["hexagon"].stop)
    assert aligned.text(span) == "red hexagon"


def test_the_offsets_of_the_tokenizer_agree():
    """The tokens that start within a word, told by the tokenizer's own offsets."""
    tokenizer = diffusion.clip_tokenizer()
    prompt = "a bored dog above a red hexagon"
    given = tokenizer(prompt, return_offsets_mapping=True)
    aligned = align_words(tokenizer, prompt)
    for word in ("bored", "dog", "hexagon"):
        start = prompt.index(word)
        inside = [i for i, (a, b) in enumerate(given["offset_mapping"]) if start <= a < b <= start + len(word)]
        assert list(aligned[word]) == inside


def test_case_and_accents_do_not_matter(kind):
    aligned = align_words(tokenizer_of(kind), PROMPT)
    assert aligned["RED"] == aligned["red"]
    assert aligned["Cafe"] == aligned["café"]


def test_a_word_inside_another_does_not_count(kind):
    aligned = align_words(tokenizer_of(kind), "a red cared")
    assert len(aligned.find("red")) == 1


def test_words_that_occur_several_times(kind):
    aligned = align_words(tokenizer_of(kind), "a red square above a red circle")
    first, second = aligned.find("red")
    assert first.stop <= aligned["square"].start < second.start
    with pytest.raises(InputError, match=r"'red' occurs 2 times .* pass a longer text that occurs once"):
        aligned["red"]


def test_words_that_do_not_occur(kind):
    with pytest.raises(InputError, match=r"'circel' does not occur .*'circle'\?\): its words are a, red, circle"):
        align_words(tokenizer_of(kind), "a red circle")["circel"]


@pytest.mark.parametrize("text", ["", " ", "red hexagon"])
def test_invalid_words(text):
    with pytest.raises(InputError, match="does not occur"):
        align_words(diffusion.clip_tokenizer(), "a red circle")[text]


@pytest.mark.parametrize("kind", ["clip", "sentencepiece"])
def test_words_that_were_cut_off(kind):
    tokenizer = tokenizer_of(kind)
    prompt = "a red hexagon above a blue square"
    ids = tokenizer(prompt, truncation=True, max_length=8).input_ids  # ends within the hexagon
    aligned = align_words(tokenizer, prompt, ids)
    assert aligned["red"] == align_words(tokenizer, prompt)["red"]
    assert aligned.cut == "hexagon above a blue square"
    for word in ("hexagon", "square"):
        with pytest.raises(InputError, match=rf"'{word}' has no tokens.*'hexagon above a blue square'"):
            aligned[word]


def test_padding_with_a_punctuation_mark():
    """SDXL's second tokenizer pads with exclamation marks."""
    tokenizer = diffusion.clip_tokenizer("!")
    aligned = align_words(tokenizer, "a red square!", tokenizer("a red square!", padding="max_length").input_ids)
    assert list(aligned["!"]) == [4]
    assert aligned.tokens == range(1, 5)


def test_a_template_around_the_prompt():
    tokenizer = diffusion.gemma_tokenizer()
    text = "Describe a red circle.\nPrompt: a red circle above a square\nassistant"
    ids = tokenizer(text, padding="max_length", max_length=70).input_ids
    aligned = align_words(tokenizer, "a red circle above a square", ids)
    assert tokenizer.decode(ids[: aligned["red"].stop]).endswith("Prompt: a red")
    assert tokenizer.decode(ids[: aligned.tokens.stop]).endswith("above a square")


def test_it_takes_a_tokenizer():
    with pytest.raises(InputError, match="align_words takes a tokenizer"):
        align_words(diffusion.stable_diffusion(), "a red circle")
