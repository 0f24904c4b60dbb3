"""A value that is read again after the model has passed it, and changed in place, is an error, as `=` is."""

import pytest
import torch
from torch import nn

from diffsight import Model, OutOfOrderError


def net_and_input():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)), torch.randn(2, 4)


@pytest.mark.parametrize("goes_on", [True, False])
def test_an_edit_in_place_behind_the_point(goes_on):
    net, x = net_and_input()
    late = r"\[0\].output was read again and changed in place too late: the model is at \[1\].output"
    with pytest.raises(OutOfOrderError, match=late), torch.no_grad(), Model(net).trace(x) as run:
        run[0].output
        run[1].output
        run[0].output[:] = 0
        if goes_on:
            run[2].output


def test_what_is_no_late_edit():
    net, x = net_and_input()
    with torch.no_grad(), Model(net).trace(x) as run:
        run[0].output
        run[0].output[:] = 1  # the model stands there
        run[1].input
        run[0].output[0] = 2  # the same tensor as the one that the model stands at
        run[1].output
        run[0].output.clone().zero_()
    expected = torch.ones(2, 4)
    expected[0] = 2
    assert torch.equal(run.result, net[1:](expected))
