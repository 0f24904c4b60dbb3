"""Modules that hold the module around them as a child, which PyTorch allows."""

import pytest
import torch
from torch import nn

from diffsight import Model


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)
        self.first.parent = self

    def forward(self, x):
        return self.last(self.first(x))


@pytest.fixture(scope="module")
def net_and_input():
    torch.manual_seed(0)
    return Net(), torch.randn(2, 4)


def test_values_are_read_by_either_path(net_and_input):
    net, x = net_and_input
    with torch.no_grad(), Model(net).trace(x) as run:
        first, last = run.first.output, run.first.parent.last.output
    assert torch.equal(first, net.first(x)) and torch.equal(last, net.last(first))
    assert not any("forward" in vars(module) for module in net.modules())


def test_every_module_is_recorded_once(net_and_input):
    net, x = net_and_input
    with torch.no_grad(), Model(net).trace(x) as run:
        values = run.record("**")
    assert sorted(values) == ["first.output", "last.output", "output"]


def test_modules_of_a_run_are_envoys(net_and_input):
    net, x = net_and_input
    with torch.no_grad(), Model(net).trace(x) as run:
        paths = [path for path, _ in run.named_modules()]
        run.get_submodule("first.parent.last").output = torch.ones(2, 4)
    assert paths == [path for path, _ in net.named_modules()]
    assert torch.equal(run.result, torch.ones(2, 4))
