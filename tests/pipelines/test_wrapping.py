"""Wrapping a model changes nothing on it and calls nothing of it, whatever it is made of."""

import tempfile
import warnings

import pytest
import torch
import torch.distributed as dist
import transformers
from torch import nn
from torch.distributed.fsdp import fully_shard

from diffsight import LanguageModel, collect_activations
from helpers import first, outputs
from models.llama import llama

IDS = torch.arange(2, 12)[None]


def mixtral():
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=2,
    )
    return transformers.MixtralForCausalLM(config).eval()


def state_of(net):
    held = {path: dict(vars(module)) for path, module in net.named_modules()}
    return held, {path: dict(module._buffers) for path, module in net.named_modules()}


def test_a_layer_that_stands_twice_keeps_its_weights():
    net = llama(use_cache=False)
    a, b, c = net.model.layers
    net.model.layers = torch.nn.ModuleList([a, b, b, c])
    net.config.num_hidden_layers = 4
    weights, logits = dict(net.named_parameters()), net(IDS).logits
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = LanguageModel(net)
    assert all(parameter is weights[name] for name, parameter in net.named_parameters())
    assert len(model.layers_output) == 4
    assert torch.equal(model.trace(IDS).result.logits, logits)


def test_a_sharded_model_runs_after_wrapping():
    net = llama()
    logits = net(IDS).logits
    dist.init_process_group("gloo", init_method=f"file://{tempfile.mktemp()}", rank=0, world_size=1)
    try:
        mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
        for part in (*net.model.layers, net):
            fully_shard(part, mesh=mesh)
        LanguageModel(net)
        assert torch.equal(net(IDS).logits, logits)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("build", [llama, mixtral])
def test_hooks_and_forward_methods_of_the_user_are_not_called(build):
    net, called = build(), []
    layer, trunk = net.model.layers[1], net.model
    layer.register_forward_hook(lambda module, args, output: called.append(output[0].norm().item()))
    layer.register_forward_pre_hook(lambda module, args: called.append(args))
    trunk.norm.forward = lambda hidden: called.append(hidden)
    of_all_modules = nn.modules.module.register_module_forward_hook(lambda *call: called.append(call))
    try:
        LanguageModel(net)
        assert not called
        net.lm_head(torch.zeros(1, net.config.hidden_size))
        assert len(called) == 1
    finally:
        of_all_modules.remove()


@pytest.mark.parametrize("build", [llama, mixtral])
def test_nothing_changes_on_the_modules(build):
    net = build()
    net(IDS)
    before, buffers = state_of(net)
    LanguageModel(net)
    after, buffers_after = state_of(net)
    assert after == before
    for path, known in buffers.items():
        assert all(buffers_after[path][name] is buffer for name, buffer in known.items())


def test_a_layer_that_stands_in_the_list_twice():
    """The values of its second place are those of its second call."""
    net = llama()
    one, two, three = net.model.layers
    net.model.layers = nn.ModuleList([one, two, two, three])
    net.config.num_hidden_layers, net.config.use_cache = 4, False
    expected = [first(out) for layer in (one, two, three) for out in outputs(layer, net, IDS)]
    model = LanguageModel(net)
    with torch.no_grad(), model.trace(IDS) as run:
        assert all(map(torch.equal, run.layers_output, expected))
    with torch.no_grad(), model.trace(IDS) as run:
        run.steer(2, torch.ones(32))
        assert torch.equal(run.layers_output[1], expected[1])
        assert torch.equal(run.layers_input[3], expected[2] + 1)
    states = collect_activations(model, IDS, positions=None, layers=[1, 2])
    assert torch.equal(states[2], expected[2][0])
