"""A run leaves alone what a user does to the model's modules while it is open: copies, patches, unusual `forward`s."""

import copy
import io

import pytest
import torch
from torch import nn

from diffsight import Model


class Double(nn.Module):
    @staticmethod
    def forward(x):
        return 2 * x


def net_and_input():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh()), torch.randn(2, 4)


def pickled(net):
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("make", [copy.deepcopy, copy.copy, pickled])
def test_a_copy_that_is_made_in_a_run_holds_nothing_of_it(make):
    net, x = net_and_input()
    with torch.no_grad(), Model(net).trace(x) as run:
        run[0].output
        made = make(net)
        assert not {"forward", "__getstate__"} & set(vars(made))
        assert make is copy.copy or not any("forward" in vars(module) for module in made.modules())
    assert torch.equal(made(x), net(x))


def test_a_copy_keeps_a_forward_of_the_users_own():
    net, x = net_and_input()
    net[1].forward = torch.sigmoid
    with torch.no_grad(), Model(net).trace(x) as run:
        run[1].output
        made = copy.deepcopy(net)
    assert made[1].forward is torch.sigmoid and net[1].forward is torch.sigmoid
    assert torch.equal(made(x), net(x))


def test_a_static_forward():
    net, x = nn.Sequential(nn.Linear(4, 4), Double()), torch.randn(2, 4)
    with torch.no_grad(), Model(net).trace(x) as run:
        assert torch.equal(run[1].output, 2 * net[0](x))
    assert "forward" not in vars(net[1])


def test_a_forward_that_is_replaced_in_the_body():
    net, x = net_and_input()
    with torch.no_grad():
        hidden = net[0](x)
        with Model(net).trace(x) as run:
            run[0].output
            net[1].forward = torch.sigmoid
            assert torch.equal(run[1].output, torch.sigmoid(hidden))
        assert net[1].forward is torch.sigmoid and "__getstate__" not in vars(net[1])
        del net[1].forward
        with Model(net).trace(x) as run:
            run[1].output = torch.ones(2, 4)
            run[0].output
            net[1].forward = torch.sigmoid
        assert torch.equal(run.result, torch.ones(2, 4))
        with Model(net).trace(x) as run:
            run[0].output
            del net[1].forward
            assert torch.equal(run[1].output, torch.tanh(hidden))
    assert "forward" not in vars(net[1])
