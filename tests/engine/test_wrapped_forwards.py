"""A body that wraps the forward of a module in another function, as LoRA, accelerate and `mock.patch` do."""

import functools
from unittest import mock

import pytest
import torch
from torch import nn

from diffsight import Model
from diffsight.errors import DiffsightError


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.before, self.layer = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.layer(self.layer(self.before(x)) + 1)


@pytest.fixture
def net_and_input():
    torch.manual_seed(0)
    with torch.no_grad():
        yield Twice(), torch.randn(2, 4)


def outputs(net, x):
    seen = []
    hook = net.layer.register_forward_hook(lambda module, args, output: seen.append(output))
    net(x)
    hook.remove()
    return seen


def doubled(forward):
    return lambda x: forward(x) * 2


class Adapter(nn.Module):
    def __init__(self, forward):
        super().__init__()
        self.original, self.extra = forward, nn.Linear(4, 4)

    def forward(self, x):
        return self.original(x) + self.extra(x)


@pytest.mark.parametrize("wrap", [doubled, functools.partial, lambda forward: Adapter(forward).forward])
def test_each_call_of_a_wrapped_forward_counts_once(net_and_input, wrap):
    net, x = net_and_input
    with Model(net).trace(x) as run:
        run.before.output
        net.layer.forward = wrap(net.layer.forward)
        first, second = run.layer.output, run.layer.calls[1].output
    with Model(net).trace(x) as later:
        again = later.layer.calls[1].output
    expected = outputs(net, x)
    assert torch.equal(first, expected[0]) and torch.equal(second, expected[1])
    assert torch.equal(again, expected[1])


def test_an_edit_of_a_later_call_of_a_wrapped_forward(net_and_input):
    net, x = net_and_input
    with Model(net).trace(x) as run:
        run.before.output
        net.layer.forward = doubled(net.layer.forward)
        run.layer.calls[1].output = torch.zeros(2, 4)
    assert torch.equal(run.result, torch.zeros(2, 4))


def test_a_forward_that_is_wrapped_twice(net_and_input):
    net, x = net_and_input
    net.layer.forward = doubled(net.layer.forward)
    with Model(net).trace(x) as run:
        run.before.output
        net.layer.forward = doubled(net.layer.forward)
        first = run.layer.output
        net.layer.forward = doubled(net.layer.forward)
        second = run.layer.calls[1].output
    inner = nn.Linear.forward
    assert torch.equal(first, inner(net.layer, net.before(x)) * 4)
    assert torch.equal(second, inner(net.layer, first + 1) * 8)


def test_a_patch_that_ends_in_the_body(net_and_input):
    net, x = net_and_input
    with Model(net).trace(x) as run:
        run.before.output
        with mock.patch.object(net.layer, "forward", lambda x: x * 3):
            assert torch.equal(run.layer.output, net.before(x) * 3)
        second = run.layer.calls[1].output
    assert torch.equal(second, net.layer(net.before(x) * 3 + 1))
    assert "forward" not in vars(net.layer)


def test_a_patch_that_ends_after_the_run_is_taken_back_by_the_next_one(net_and_input):
    net, x = net_and_input
    with Model(net).trace(x) as run:
        run.before.output
        patch = mock.patch.object(net.layer, "forward", lambda x: x * 3)
        patch.start()
    patch.stop()
    with Model(net).trace(x) as run:
        second = run.layer.calls[1].output
    assert torch.equal(second, outputs(net, x)[1])
    assert "forward" not in vars(net.layer)


def test_a_hook_of_accelerate_that_is_added_in_the_body_and_removed_later(net_and_input):
    hooks = pytest.importorskip("accelerate.hooks")
    net, x = net_and_input
    with Model(net).trace(x) as run:
        run.before.output
        hooks.add_hook_to_module(net.layer, hooks.ModelHook())
        second = run.layer.calls[1].output
    hooks.remove_hook_from_module(net.layer)
    expected = outputs(net, x)[1]
    with Model(net).trace(x) as run:
        assert torch.equal(run.layer.calls[1].output, expected) and torch.equal(second, expected)
    assert "forward" not in vars(net.layer)


class Patches(nn.Module):
    """Wraps the forward pass of a part when it is first called."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.is_patched = nn.Linear(4, 4), nn.Tanh(), False

    def forward(self, x):
        x = self.first(x)
        if not self.is_patched:
            self.is_patched, old = True, self.second.forward
            self.second.forward = lambda x: old(x) * 2
        return self.second(x)


@pytest.mark.parametrize("before", [False, True])
def test_a_forward_that_the_model_wraps_during_the_call(before):
    x = torch.randn(2, 4)
    with torch.no_grad():
        for act in (lambda part: part.output, lambda part: setattr(part, "output", torch.ones(2, 4))):
            with pytest.raises(DiffsightError, match="the model has replaced the `forward` of that module"):
                with Model(Patches()).trace(x) as run:
                    if before:
                        run.first.output
                    act(run.second)
        net = Patches()
        with Model(net).trace(x) as run:
            run.first.output
        assert torch.equal(run.result, net(x))
        with Model(net).trace(x) as run:
            assert torch.equal(run.second.output, net(x))


def test_a_call_that_the_model_wraps_cannot_be_skipped():
    with pytest.raises(DiffsightError, match="the model has replaced the `forward` of that module"):
        with torch.no_grad(), Model(Patches()).trace(torch.randn(2, 4)) as run:
            run.second.skip(torch.ones(2, 4))


def test_a_forward_that_replaces_itself_when_it_is_called():
    class Prepared(nn.Linear):
        def forward(self, x):
            self.forward = super().forward
            return super().forward(x)

    net, x = nn.Sequential(Prepared(4, 4), nn.Tanh()), torch.randn(2, 4)
    with torch.no_grad():
        for _ in range(2):
            with Model(net).trace(x) as run:
                assert torch.equal(run[0].output, nn.functional.linear(x, net[0].weight, net[0].bias))
