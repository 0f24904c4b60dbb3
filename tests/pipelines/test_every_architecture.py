"""Every causal language model that transformers can build from a small configuration: names, accessors, bit-identity.

Each is built from its default configuration, reduced by the names of its fields (`models/architectures.py`)."""

import warnings

import pytest
import torch

from diffsight import LanguageModel
from diffsight.errors import InputError, OutOfOrderError, PointNotFoundError
from diffsight.extending import tree_of
from diffsight.pipelines.language.name_check import NamesWarning
from models import architectures

# What transformers itself cannot make of a small configuration alone.
NOT_CONSTRUCTED = {
    "gemma3n": "its vision tower needs timm",
    "gemma4_assistant": "a draft model: reads the hidden states and keys of another model, not tokens",
    "gemma4_unified_assistant": "a draft model: reads the hidden states and keys of another model, not tokens",
}

# What has no place in the standard names.
UNSUPPORTED = {
    "blt": "three models, over bytes and over patches",
    "hrm_text": "two stacks of layers that call each other in cycles",
    "longcat_flash": "two attentions and two MLPs in every layer",
    "reformer": "reversible layers: two streams of hidden states",
    "xlm": "no layers: a list of attentions and a list of MLPs side by side",
}
SUPPORTED = [kind for kind in architectures.causal_types() if kind not in NOT_CONSTRUCTED | UNSUPPORTED]

# Attention that makes several products in one call.
SEVERAL_PRODUCTS = {
    "diffllama": "the same probabilities times each half of the values",
}

# Attention in which no probabilities are multiplied with the values, in some layers or in all.
NO_PROBABILITIES = {
    *(
        "bailing_hybrid",
        "bamba",
        "falcon_mamba",
        "granitemoehybrid",
        "jamba",
        "kimi_linear",
        "lfm2_moe",
        "lfm3",
        "mamba",
    ),
    *("mamba2", "minimax", "nemotron_h", "olmo_hybrid", "qwen3_5", "qwen3_5_moe", "qwen3_5_moe_text", "qwen3_5_text"),
    *("qwen3_next", "qwen4_exp", "qwen4_exp_text", "recurrent_gemma", "rwkv", "xlstm", "zamba", "zamba2"),
}


def test_at_least_95_of_100_are_supported():
    constructed = len(SUPPORTED) + len(UNSUPPORTED)
    assert constructed > 150
    assert len(SUPPORTED) / constructed >= 0.95


def test_a_layer_with_two_attentions():
    net = architectures.build_causal("longcat_flash", _attn_implementation="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NamesWarning)
        model = LanguageModel(net)
    for name in ("attention_probs", "q", "heads_output"):
        with pytest.raises(InputError, match=r"self_attn is a ModuleList.*: .*self_attn\[0\], .*self_attn\[1\]"):
            with model.trace(architectures.inputs_of(net)) as run:
                getattr(run, name)[0]


@pytest.mark.parametrize("kind", SUPPORTED)
def test_a_causal_language_model(kind):
    net = architectures.build_causal(kind, _attn_implementation="eager")
    ids = architectures.inputs_of(net)
    with warnings.catch_warnings():
        warnings.simplefilter("error", NamesWarning)
        model = LanguageModel(net)
    with torch.no_grad():
        bare = net(ids)
        assert torch.equal(model.trace(ids).result.logits, bare.logits)  # nothing is read
        check_hidden_states(model, net, ids, bare.logits)
        if kind in SEVERAL_PRODUCTS:
            check_several_products(model, ids, bare.logits)
            return
        check_parts(model, ids, bare.logits)
        check_probabilities(model, net, ids, bare.logits, kind)


def check_hidden_states(model, net, ids, logits):
    """Check that layers are read in order and set, as by plain hooks."""
    seen, hooks = [], []
    for layer in net.get_submodule(tree_of(model).names_of(net)["layers"]):
        hooks.append(layer.register_forward_hook(lambda m, args, output: seen.append(output)))
    net(ids)
    for hook in hooks:
        hook.remove()
    with model.trace(ids) as run:
        if hasattr(model, "embed_tokens"):
            assert isinstance(run.embed_tokens.output, torch.Tensor)
        for index in range(len(model.layers)):
            assert isinstance(run.layers_input[index], torch.Tensor)
            hidden = run.layers_output[index]
            expected = seen[index] if isinstance(seen[index], torch.Tensor) else seen[index][0]
            assert torch.equal(hidden, expected)
            run.layers_output[index] = hidden.clone()
        assert torch.equal(run.logits, logits)
        assert torch.allclose(run.next_token_probs.sum(-1), torch.ones(len(ids)), atol=1e-5)
    if hasattr(model, "lm_head") and net.config.model_type not in OTHER_TAILS:
        assert torch.equal(model.project_on_vocab(hidden), logits)
    with model.trace(ids) as run:
        run.layers_output[-1] = torch.zeros_like(hidden)
    assert not torch.equal(run.result.logits, logits)


def check_parts(model, ids, logits):
    """Check that assigning the present values of attention, projections, heads and MLP changes nothing."""
    assert any(hasattr(layer, "self_attn") for layer in model.layers)
    for name, part in PARTS.items():
        with model.trace(ids) as run:
            for index, layer in enumerate(model.layers):
                if hasattr(layer, part):
                    put_back(getattr(run, name), index, may_fail=part != "mlp" and name != "attentions_output")
        assert torch.equal(run.result.logits, logits)


PARTS = dict.fromkeys(("attentions_output", "heads_output", "q", "k", "v"), "self_attn") | {"mlps_output": "mlp"}


def put_back(values, index, may_fail):
    try:
        value = values[index]
    except (InputError, OutOfOrderError):  # what makes no product of queries, keys and values says so
        assert may_fail
    else:
        values[index] = value.clone()


def check_several_products(model, ids, logits):
    """Check that none is taken for the only one, and that each can be read by its number."""
    with pytest.raises(InputError, match="several products in one call"):
        with model.trace(ids) as run:
            run.attention_probs[0]
    with model.trace(ids) as run:
        products = run.layers[0].self_attn.products
        assert torch.equal(products[0].attention_probs, products[1].attention_probs)
    assert torch.equal(run.result.logits, logits)


def check_probabilities(model, net, ids, logits, kind):
    """Check that the probabilities are those of transformers, and that setting them has an effect."""
    found = {}
    for index in range(len(model.layers)):
        with model.trace(ids) as run:
            try:
                found[index] = run.attention_probs[index]
            except (InputError, OutOfOrderError, PointNotFoundError):
                assert kind in NO_PROBABILITIES
                continue
        assert torch.equal(run.result.logits, logits)
    for index in list(found)[:1]:
        with model.trace(ids) as run:
            run.attention_probs[index] = torch.zeros_like(found[index])
        assert not torch.equal(run.result.logits, logits)
    if kind not in NO_PROBABILITIES | OTHER_ATTENTIONS:
        given = net(ids, output_attentions=True).attentions
        assert all(torch.equal(probs, given[index]) for index, probs in found.items())


# Where the logits are not made of what the last layer gives alone, each of its own token's.
OTHER_TAILS = {
    "cpmant",  # cuts off what belongs to its prompt
    "inkling2_text",  # mixes in earlier hidden states
    "prophetnet",  # cuts off a stream of predictions
}

# Where `output_attentions` gives another thing than what meets the values.
OTHER_ATTENTIONS = {
    "cpmant",  # cuts off what belongs to its prompt
}
