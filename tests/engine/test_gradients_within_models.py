"""Models that compute gradients within their forward pass, such as forces, in runs opened without gradients."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn

from diffsight import Model
from diffsight.errors import DiffsightError


class Pair(nn.Module):
    def forward(self, x):
        return {"a": x, "b": (2 * x).view(x.shape)}


class Forces(nn.Module):
    """Returns the forces at `x`, the gradients of an energy, in any grad mode."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.lin, self.energy, self.pair = nn.Linear(4, 4), nn.Linear(4, 1), Pair()

    def forward(self, x):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            pair = self.pair(torch.tanh(self.lin(x)))
            return torch.autograd.grad(self.energy(pair["a"] * pair["b"] + x).sum(), x)[0]


def double(run):
    run.lin.output = run.lin.output * 2


def double_in_place(run):
    run.lin.output *= 2


def double_a_view(run):
    run.lin.output[:, :] *= 2


def double_rows(run):
    for row in run.rows:
        row.lin.output = row.lin.output * 2


def double_rows_in_place(run):
    for row in run.rows:
        row.lin.output[:] *= 2


def double_the_second(run):
    run.pair.output = {**run.pair.output, "b": run.pair.output["b"] * 2}


def double_the_second_in_place(run):
    run.pair.output["b"].mul_(2)


def double_an_item(run):
    pair = run.pair.output
    pair["b"] = pair["b"] * 2


def double_the_second_of_rows(run):
    for row in run.rows:
        pair = row.pair.output
        pair["b"] = pair["b"] * 2


def double_where_it_was_read_with_gradients(run):
    with torch.enable_grad():
        output = run.lin.output
    output *= 2


def double_after_a_call(run):
    output = run.lin.output
    run.energy(torch.zeros(2, 4), hook=True)
    output *= 2


def double_by_skipping(run):
    run.lin.skip(torch.nn.functional.linear(run.lin.input, run.lin.weight, run.lin.bias) * 2)


def double_ahead(run):
    run.pair.input = torch.tanh(run.lin.output * 2)


OF_LIN = [
    double,
    double_in_place,
    double_a_view,
    double_rows,
    double_rows_in_place,
    double_where_it_was_read_with_gradients,
    double_after_a_call,
    double_by_skipping,
    double_ahead,
]
OF_PAIR = [double_the_second, double_the_second_in_place, double_an_item, double_the_second_of_rows]
WAYS = {
    "in the block": lambda net, x, change: _traced(Model(net), x, change),
    "in an edit": lambda net, x, change: Model(net).edit(change).trace(x).result,
}


def _traced(model, x, change):
    with model.trace(x) as run:
        change(run)
    return run.result


def forces_with(change, x):
    """Return the forces if hooks make the change."""
    net = Forces()
    if change in OF_LIN:
        net.lin.register_forward_hook(lambda m, a, output: output * 2)
    else:
        net.pair.register_forward_hook(lambda m, a, output: {**output, "b": output["b"] * 2})
    return net(x)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("change", OF_LIN + OF_PAIR)
def test_changes_without_gradients_are_errors(change, way):
    x, net = torch.randn(2, 4), Forces()

    def with_gradients(run):
        with torch.enable_grad():
            change(run)

    with torch.no_grad():
        assert torch.allclose(WAYS[way](net, x, with_gradients), forces_with(change, x), atol=1e-6)
        with pytest.raises(DiffsightError, match=r"within `with torch.enable_grad\(\):`"):
            WAYS[way](net, x, change)
        assert torch.equal(Model(net).trace(x).result, net(x))
    assert torch.allclose(WAYS[way](net, x, change), forces_with(change, x), atol=1e-6)


@pytest.mark.parametrize("within", [torch.enable_grad, nullcontext])
def test_the_model_may_change_what_was_read_without_gradients(within):
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 1))
    x = torch.randn(2, 4)

    class Energy(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x):
            with torch.enable_grad():
                return self.net(x)

    with torch.no_grad(), Model(Energy()).trace(x) as run:
        with within():
            run.net[0].output
            run.net[1].output
            run.net[2].output
    assert torch.equal(run.result, net(x))


def test_gradients_may_be_left_out_of_a_run_that_has_them():
    x, net = torch.randn(2, 4), Forces()
    with Model(net).trace(x) as run:
        with torch.no_grad():
            run.lin.output = run.lin.output * 2
            run.pair.output["b"].mul_(1)
    net.lin.register_forward_hook(lambda m, a, output: (output * 2).detach())
    assert torch.allclose(run.result, net(x), atol=1e-6)
