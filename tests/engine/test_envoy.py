"""Envoys outside a run are the module tree; in a run they are bound to it."""

from collections import OrderedDict

import pytest
import torch
from torch import nn

from diffsight import Model
from diffsight.envoy import Envoy
from diffsight.errors import PointNotFoundError
from models.nets import Net, inputs, linear


@pytest.fixture
def model(net):
    return Model(net)


def test_print_shows_the_tree(model, net):
    assert repr(model) == repr(net) and str(model) == str(net)
    assert repr(model.layers[1]) == repr(net.layers[1])


def test_children_by_name_and_by_number(model, net):
    assert model.layers[1].leaf.lin.path == "layers[1].leaf.lin"
    assert model.layers[-1].path == "layers[2]"
    assert [layer.path for layer in model.layers] == ["layers[0]", "layers[1]", "layers[2]"]
    assert [layer.path for layer in model.layers[1:]] == ["layers[1]", "layers[2]"]
    assert len(model.layers) == 3
    assert model["layers.1.leaf"].path == model["layers[1].leaf"].path == "layers[1].leaf"
    assert isinstance(model.layers[1], Envoy)


def test_numbers_in_a_run(model, net, x):
    with model.trace(x) as run:
        assert torch.equal(run.layers[-1].output, run["layers.2"].output)


def test_a_model_that_is_a_list(x):
    net = nn.Sequential(linear(1), linear(2))
    model = Model(net)
    assert len(model) == 2 and len(list(model)) == 2
    with model.trace(x) as run:
        first = run[0].output
        assert run[1].input is first
        assert torch.equal(run[-1].output, net(x))
    with model.trace(x) as run:
        assert len(run[:]) == 2
        values = [layer.output for layer in run]
    assert torch.equal(values[0], net[0](x)) and torch.equal(values[1], net(x))


def test_attributes_of_the_modules(model, net):
    assert model.first.weight is net.first.weight
    assert model.training is True
    assert model.layers[0].leaf.lin.in_features == 4
    assert model.log is net.log


def test_the_config_of_transformers(gpt2):
    model = Model(gpt2)
    assert model.config is gpt2.config
    assert model.transformer.h[0].attn.num_heads == 2
    assert model.dtype == torch.float32


def test_dir_lists_children(model):
    assert {"first", "layers", "last", "unused", "trace", "generate", "output", "input"} <= set(dir(model))
    assert {"leaf", "out", "output", "input", "inputs", "skip", "calls"} <= set(dir(model.layers[0]))
    assert {"weight", "bias"} <= set(dir(model.first))
    run = model.trace(inputs())
    assert {"first", "layers", "last", "result", "steps", "stop", "finish"} <= set(dir(run))


def test_looking_around_runs_nothing(model, net, x):
    run = model.trace(x)
    dir(run), dir(run.layers[0]), repr(run.layers[0]), repr(run), repr(run.layers[0].calls), hasattr(run, "nothing")
    assert net.log == []


def test_an_envoy_of_the_model_serves_every_run(model, net):
    layer = model.layers[1]
    for seed in (1, 2):
        with model.trace(inputs(seed)):
            value = layer.output
        assert torch.equal(value, net.layers[1](net.layers[0](net.first(inputs(seed)))))


def test_an_envoy_of_a_run_is_bound_to_it(model, net):
    with model.trace(inputs(1)) as run:
        layer = run.layers[0]
        with model.trace(inputs(2)) as inner:
            inner.first.output
            assert torch.equal(layer.output, net.layers[0](net.first(inputs(1))))
            assert [child.path for child in run.layers] == ["layers[0]", "layers[1]", "layers[2]"]
            assert torch.equal(list(run.layers)[1].output, net.layers[1](layer.output))


def test_assigning_through_the_run_and_through_the_model(model, net, x):
    with model.trace(x) as run:
        model.layers[0].output = inputs(1)
        run.layers[1].output = inputs(2)
        run["layers.2"].output = inputs(3)
    assert torch.equal(run.result, net.last(inputs(3)))


def test_calling_an_envoy_calls_the_module(model, net, x):
    assert torch.equal(model.layers[0](x), net.layers[0](x))
    with model.trace(x) as run:
        assert torch.equal(run.layers[0](x), net.layers[0](x))


def test_a_child_with_a_private_name(x):
    class Wrapping(nn.Module):
        def __init__(self):
            super().__init__()
            self._orig_mod = linear()

        def forward(self, x):
            return self._orig_mod(x)

    model = Model(Wrapping())
    with model.trace(x) as run:
        assert torch.equal(run["_orig_mod"].output, run.result)
    with model.trace(x) as run:
        assert torch.equal(run._orig_mod.output, run.result)


def test_modules_that_change_between_runs(model, net, x):
    with model.trace(x) as run:
        run.last.output
    net.last = linear(7)
    net.layers.append(linear(8))
    with model.trace(x) as run:
        value = run.layers[3].output
        assert torch.equal(run.last.output, net.last(value))
    assert len(model.layers) == 4
    del net.layers[0]
    with model.trace(x) as run:
        assert torch.equal(run.layers[0].output, net.layers[0](net.first(x)))
    with pytest.raises(PointNotFoundError):
        model.layers[3]


def test_a_number_means_what_the_list_holds_now(model, net, x):
    last = net.layers[-1]
    assert model.layers[2]._owner is model.layers[-1]._owner is last
    net.layers.append(linear(7))
    net.layers[0] = linear(8)
    assert model.layers[-1]._owner is net.layers[3] and model.layers[0]._owner is net.layers[0]
    assert model.layers[2]._owner is last
    for number in (4, -5):
        with pytest.raises(PointNotFoundError, match=r"layers has 4 children"):
            model.layers[number]


def test_the_same_module_under_two_names(x):
    net = Net()
    net.last = net.first
    with Model(net).trace(x) as run:
        assert run.first.output is run.last.output
        assert torch.equal(run.last.calls[1].output, net(x))


def test_names_with_brackets(x):
    net = nn.Sequential(OrderedDict({"x": nn.Sequential(linear()), "x[0]": nn.Tanh(), "a[b": nn.Tanh()}))
    with torch.no_grad(), Model(net).trace(x) as run:
        inner = run.x[0].output
        assert torch.equal(run["x[0]"].output, inner.tanh()) and torch.equal(run["a[b"].output, inner.tanh().tanh())
