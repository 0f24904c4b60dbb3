"""A GPT-2 of twelve layers with random weights, and a byte-level tokenizer trained here.

The cells of these tests are our own, in the manner of nnsight's guides, which were written when the layers of
transformers returned tuples. Expected values come from ordinary hooks.
"""

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from compat.notebooks.cells import EIFFEL, GARDEN, LAYERS
from diffsight.compat import LanguageModel


@pytest.fixture(scope="session")
def tokenizer():
    plain = Tokenizer(models.BPE())
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        min_frequency=1,
        show_progress=False,
    )
    plain.train_from_iterator([EIFFEL, GARDEN, " Paris Rome York John Mary"], trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=plain, eos_token="<|endoftext|>", bos_token="<|endoftext|>", model_max_length=64
    )


@pytest.fixture(scope="session")
def net(tokenizer):
    config = transformers.GPT2Config(
        n_layer=LAYERS, n_embd=32, n_head=4, n_positions=64, vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=0
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.GPT2LMHeadModel(config).eval()
        for parameter in model.parameters():  # larger than usual, so that edits make a difference
            torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.fixture(scope="session")
def folder(net, tokenizer, tmp_path_factory):
    place = tmp_path_factory.mktemp("saved") / "gpt2"
    net.save_pretrained(place)
    tokenizer.save_pretrained(place)
    return str(place)


@pytest.fixture
def model(net, tokenizer):
    return LanguageModel((net, tokenizer))


@pytest.fixture
def ids(tokenizer):
    return {text: tokenizer(text, return_tensors="pt")["input_ids"] for text in (EIFFEL, GARDEN)}
