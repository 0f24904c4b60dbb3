"""Texts of several lengths in one batch: each row is computed as if it were alone, in every kind of architecture."""

import pytest
import torch
import transformers

from diffsight import LanguageModel, logit_lens
from diffsight.errors import InputError
from models import architectures

pytestmark = pytest.mark.usefixtures("no_gradients")

LONG = architectures.tokens(1, 9)[0]
SHORT = LONG[2:6] + 3
BATCH = [LONG.tolist(), SHORT.tolist()]

# By what they know positions: a table (GPT-2, OPT), a table with a place for padding (RoBERTa and kin), rotation
# (Llama, GPT-NeoX), a slope (BLOOM, MPT), their own order (Mamba). All leave out what is padded on the left.
ON_THE_LEFT = [
    "gpt2",
    "opt",
    "codegen",
    "roberta",
    "xlm-roberta",
    "camembert",
    "llama",
    "gpt_neox",
    "bloom",
    "mpt",
    "mamba",
]
# A table that counts the padding along (BART and kin), a state that takes everything in, attention to chosen tokens.
ON_THE_RIGHT = ["bart", "pegasus", "marian", "rwkv", "xlstm", "deepseek_v32"]


@pytest.mark.parametrize("kind", ON_THE_LEFT + ON_THE_RIGHT)
def test_a_row_is_computed_as_if_it_were_alone(kind):
    net = architectures.build_causal(kind)
    model = LanguageModel(net)
    with model.trace(BATCH) as run:
        hidden, logits, following = run.layers_output[0], run.logits, run.next_token_probs
        of_short = run.rows[1].next_token_probs
    assert bool(run.mask[1, 0]) == (kind in ON_THE_RIGHT)
    for row, ids in enumerate((LONG, SHORT)):
        alone = net(ids[None]).logits[0]
        real = run.mask[row].bool()
        assert torch.allclose(logits[row][real], alone, atol=1e-5)
        assert torch.allclose(following[row], alone[-1].softmax(-1), atol=1e-5)
        assert torch.allclose(hidden[row][real], model.trace(ids).layers_output[0][0], atol=1e-5)
    assert torch.equal(of_short, following[1:])
    both = logit_lens(model, BATCH, positions=-1, keep_logits=True).logits
    assert torch.allclose(both[1, -1, 0], net(SHORT[None]).logits[0, -1], atol=1e-5)


def test_generating_where_padding_cannot_be_ignored():
    model = LanguageModel(architectures.build_causal("rwkv"))
    with pytest.raises(InputError, match="RwkvForCausalLM cannot ignore padding"):
        model.generate(BATCH, max_new_tokens=2)
    alike = [BATCH[0], [token + 1 for token in BATCH[0]]]
    assert len(model.generate(alike, max_new_tokens=2).result) == 2


@pytest.mark.parametrize("pass_ids", [torch.Tensor.clone, torch.Tensor.tolist, lambda ids: {"input_ids": ids}])
def test_generate_finds_the_padding_in_token_ids_as_the_bare_model_does(pass_ids):
    net = architectures.build_causal("llama")
    net.generation_config.pad_token_id, model = 0, LanguageModel(net)
    padded, length = torch.stack([LONG, torch.cat([torch.zeros(len(LONG) - len(SHORT)).long(), SHORT])]), len(LONG)
    arguments = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    bare = net.generate(padded, **arguments)
    assert torch.equal(bare[1, length:], net.generate(SHORT[None], **arguments)[0, len(SHORT) :])
    assert torch.equal(model.generate(pass_ids(padded), **arguments).result, bare)
    of_user = {"generation_config": transformers.GenerationConfig(**arguments)}  # without a padding token
    assert torch.equal(model.generate(pass_ids(padded), **of_user).result, net.generate(padded, **of_user))
    with model.generate(pass_ids(padded), **arguments) as run:
        before = run.layers_output[1].clone()
        run.steer(1, torch.ones(before.shape[-1]), positions=0)  # of each row, its first token that is not padding
        added = run.layers_output[1] - before
    assert torch.equal(run.mask.bool(), padded != 0)
    assert added.sum(-1).nonzero().tolist() == [[0, 0], [1, length - len(SHORT)]]
    assert torch.equal(model.trace(pass_ids(padded)).result.logits, net(padded).logits)  # a forward pass finds none


def test_lists_of_token_ids_have_a_mask():
    net = architectures.build_causal("llama")
    net.generation_config.pad_token_id = None
    model, alike = LanguageModel(net), [LONG.tolist(), (LONG + 1).tolist()]
    with model.trace(alike) as run:
        assert run.mask.tolist() == [[1] * len(LONG)] * 2 and run.rows[1].mask.tolist() == [[1] * len(LONG)]
    with model.generate(alike, max_new_tokens=1) as run:
        assert run.mask is None  # transformers infers none without a padding token
    net.generation_config.pad_token_id = LONG[0].item()
    with model.generate([LONG.tolist(), LONG[:2].tolist()], max_new_tokens=1) as run:
        assert run.mask.sum(1).tolist() == [len(LONG), 2]  # lists of different lengths hold real tokens only


def test_roberta_generates_from_several_lengths():
    model = LanguageModel(architectures.build_causal("roberta"))
    arguments = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "pad_token_id": 1}
    both = model.generate(BATCH, **arguments).result[:, -3:]
    alone = [model.generate(ids, **arguments).result[0, -3:] for ids in (LONG, SHORT)]
    assert torch.equal(both, torch.stack(alone))


def test_the_context_of_a_table_with_a_place_for_padding():
    """Of the 64 entries of this one, the first belongs to the padding."""
    net = architectures.build_causal("roberta")
    model = LanguageModel(net)
    assert net.config.max_position_embeddings == 64 and net.roberta.embeddings.padding_idx == 0
    assert model.trace(torch.full((1, 63), 7)).result.logits.shape[1] == 63
    with pytest.raises(InputError, match="64 tokens, and the model's context is 63"):
        model.trace(torch.full((1, 64), 7))


@pytest.mark.parametrize("kind", ["gpt2", "opt", "gpt_neo", "bert", "codegen", "gptj", "ctrl", "marian"])
def test_the_context_of_a_table_of_positions(kind):
    net = architectures.build_causal(kind, max_position_embeddings=48)
    ids = architectures.tokens(length=49)
    with pytest.raises((IndexError, RuntimeError)), torch.no_grad():
        net(ids)
    with pytest.raises(InputError, match="too long: it has 49 tokens, and the model's context is 48"):
        LanguageModel(net).trace(ids)
    with torch.no_grad():
        assert torch.equal(LanguageModel(net).trace(ids[:, 1:]).result.logits, net(ids[:, 1:]).logits)


@pytest.mark.parametrize("rope", ["default", "linear", "dynamic", "yarn"])
@torch.no_grad()
def test_rotary_models_run_beyond_the_context_of_their_training(rope):
    rope = {"rope_type": rope, "rope_theta": 10000.0} | ({} if rope == "default" else {"factor": 4.0})
    net = architectures.build_causal("llama", max_position_embeddings=8, rope_parameters=rope)
    ids = architectures.tokens(length=14)
    assert torch.equal(LanguageModel(net).trace(ids).result.logits, net(ids).logits)


@pytest.mark.parametrize("kind", ["jamba", "rwkv", "xglm", "gemma3_text"])
@torch.no_grad()
def test_other_models_without_a_table_of_positions_have_no_limit(kind):
    net = architectures.build_causal(kind, max_position_embeddings=8)
    ids = architectures.tokens(length=14)
    assert torch.equal(LanguageModel(net).trace(ids).result.logits, net(ids).logits)


BAD = [
    ({}, "the dictionary is empty"),
    (b"abc", "not bytes"),
    ({"input_id": [5]}, r"takes no 'input_id' in a dictionary of inputs \(did you mean 'input_ids'"),
    ({"input_ids": [[5]], "attention_masks": [[1]]}, r"no 'attention_masks' in .* \(did you mean 'attention_mask'"),
    (transformers.BatchEncoding({"input_ids": [[5]], "banana": [[1]]}), "GPT2LMHeadModel takes no 'banana'"),
    ({"input_ids": [[5]], "max_new_tokens": 3}, "takes no 'max_new_tokens'"),
    ({"input_ids": [[5]], 3: 3}, "takes no 3 in a dictionary"),
    ([[]], "the prompt has no tokens"),
    ([[5], []], "the prompt has no tokens"),
]


@pytest.mark.parametrize("given, words", BAD, ids=lambda value: repr(value) if not isinstance(value, str) else "")
def test_no_input(given, words):
    with pytest.raises(InputError, match=words):
        LanguageModel(architectures.build_causal("gpt2")).trace(given)


def test_what_a_tokenizer_returns_for_its_user_is_left_out():
    model, own = LanguageModel(architectures.build_causal("gpt2")), {"special_tokens_mask": [[0, 0]], "length": [2]}
    own |= {"offset_mapping": [[(0, 1), (1, 2)]], "overflow_to_sample_mapping": [0]}
    for mask in ({}, {"attention_mask": [[1, 1]]}):
        given = {"input_ids": [[5, 6]], **mask}
        assert torch.equal(model.trace({**given, **own}).result.logits, model.trace(given).result.logits)
        options = {"max_new_tokens": 2, "do_sample": False}
        assert torch.equal(model.generate({**given, **own}, **options).result, model.generate(given, **options).result)
    with pytest.raises(InputError, match="takes no 'attention_masks'"):
        model.generate({"input_ids": [[5]], "attention_masks": [[1]]}, max_new_tokens=1)


def test_token_ids_of_numpy():
    net = architectures.build_causal("gpt2")
    model, ids = LanguageModel(net), torch.stack([LONG, LONG + 1])
    assert torch.equal(model.trace(ids.numpy()).result.logits, net(ids).logits)
    assert torch.equal(model.trace(ids[0].numpy()).result.logits, net(ids[:1]).logits)
