"""`project_on_vocab` does what a model does between its last layer and its logits."""

import pytest
import torch
import transformers

from diffsight import LanguageModel
from diffsight.extending import tree_of
from models import architectures

# A norm and a head alone; a cap, a scale, a divisor, a scale before the head, several streams, another layout.
KINDS = ("gpt2", "gemma2", "cohere", "granite", "minicpm3", "deepseek_v4", "xlnet")
IDS = architectures.tokens(2)


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def last_hidden(net, ids, layers):
    """Return the output of the last layer, from a plain hook."""
    seen = []
    hook = net.get_submodule(layers)[-1].register_forward_hook(lambda module, args, output: seen.append(output))
    logits = net(ids).logits
    hook.remove()
    return (seen[0] if isinstance(seen[0], torch.Tensor) else seen[0][0]), logits


@torch.no_grad()
def test_the_last_layer_gives_the_logits(kind):
    net = architectures.build_causal(kind)
    model = LanguageModel(net)
    hidden, logits = last_hidden(net, IDS, tree_of(model).names_of(net)["layers"])
    assert torch.equal(model.project_on_vocab(hidden), logits)


@pytest.mark.parametrize("given", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_hidden_states_of_another_type_are_cast(kind, dtype, given):
    net = architectures.build_causal(kind).to(dtype)
    model = LanguageModel(net)
    hidden, logits = last_hidden(net, IDS, tree_of(model).names_of(net)["layers"])
    found = model.project_on_vocab(hidden.to(given))
    assert found.dtype == logits.dtype
    assert torch.equal(found, model.project_on_vocab(hidden.to(given).to(dtype)))
    if torch.finfo(given).bits > torch.finfo(dtype).bits:
        assert torch.equal(found, logits)


@pytest.mark.parametrize("kind", ["gpt2", "gemma2"])
@torch.no_grad()
def test_positions_can_be_chosen(kind):
    net = architectures.build_causal(kind)
    model = LanguageModel(net)
    hidden, logits = last_hidden(net, IDS, tree_of(model).names_of(net)["layers"])
    assert torch.allclose(model.project_on_vocab(hidden[:, -1]), logits[:, -1], atol=1e-6)
    assert torch.allclose(model.project_on_vocab(hidden[0, 2]), logits[0, 2], atol=1e-6)


@pytest.mark.parametrize("cap", [None, 0.05])
@torch.no_grad()
def test_the_tail_is_read_off_the_model_not_its_name(cap):
    net = architectures.build_causal("gemma3_text", final_logit_softcapping=cap)
    model = LanguageModel(net)
    hidden, logits = last_hidden(net, IDS, "model.layers")
    assert torch.equal(model.project_on_vocab(hidden), logits)
    assert (logits.abs().max() < 0.05) == (cap is not None)


def test_in_an_open_run_nothing_moves_and_nothing_stays(kind):
    net = architectures.build_causal(kind)
    model = LanguageModel(net)
    with torch.no_grad():
        bare = net(IDS).logits
        with model.trace(IDS) as run:
            early = run.layers_output[0]
            first = run.project_on_vocab(early)
            hidden = run.layers_output[-1]
            assert torch.equal(run.project_on_vocab(hidden), bare)
            assert torch.equal(run.logits, bare)
        assert first.shape == bare.shape
        assert not torch.equal(first, bare)
        assert torch.equal(net(IDS).logits, bare)
    assert not any("forward" in vars(module) for module in net.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())


@pytest.mark.parametrize("kind", ["gpt2", "gemma2"])
def test_gradients_pass_through(kind):
    model = LanguageModel(architectures.build_causal(kind))
    with model.trace(IDS, grad=True) as run:
        hidden = run.layers_output[0]
        hidden.retain_grad()
        run.project_on_vocab(hidden)[:, -1, 7].sum().backward()
    assert hidden.grad[:, -1].abs().sum() > 0
    assert hidden.grad[:, :-1].abs().sum() == 0


@torch.no_grad()
def test_an_encoder_with_a_decoder_scales_before_its_head():
    config = transformers.T5Config(
        vocab_size=64, d_model=32, d_ff=64, d_kv=8, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    torch.manual_seed(0)
    net = transformers.T5ForConditionalGeneration(config).eval()
    model = LanguageModel(net)
    with model.trace(IDS, decoder_input_ids=IDS[:, :3]) as run:
        hidden = run.layers_output[-1]
        assert torch.equal(run.project_on_vocab(hidden), run.logits)


@pytest.mark.parametrize("kind", ["gpt2", "gemma2"])
def test_a_scan_gives_shapes(kind):
    model = LanguageModel(architectures.build_causal(kind))
    with model.scan(IDS) as run:
        assert run.project_on_vocab(run.layers_output[0]).shape == (2, 6, architectures.VOCABULARY)
