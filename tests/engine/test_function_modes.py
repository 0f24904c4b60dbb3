"""PyTorch's function modes (`with torch.device(...)` is one): the body and the model each keep their own."""

import pytest
import torch
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from diffsight import Model
from models.nets import Calling, linear

X = torch.ones(1, 4)


class Counting(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen.append(getattr(func, "__name__", str(func)))
        return func(*args, **(kwargs or {}))


def within(mode):
    """Return a net that runs `b` inside its own mode."""

    def forward(self, x):
        x = self.a(x)
        with mode:
            x = self.b(x)
        return self.c(x)

    return Calling(forward, a=linear(1), b=linear(2), c=linear(3))


def making():
    """Return a net that creates a tensor in every part."""

    def forward(self, x):
        x = self.a(x) + torch.zeros(4)
        x = self.b(x) + torch.zeros(4)
        return self.c(x)

    return Calling(forward, a=linear(1), b=linear(2), c=linear(3))


def test_the_body_is_not_in_a_mode_of_the_model():
    mode = Counting()
    net = within(mode)
    expected, bare = net(X), mode.seen[:]
    mode.seen.clear()
    with Model(net).trace(X) as run:
        run.b.output
        assert _get_current_function_mode_stack() == []
        torch.cos(X)
    assert mode.seen == bare
    assert torch.equal(run.result, expected)


def test_the_model_is_not_in_a_mode_of_the_body():
    net = making()
    with Model(net).trace(X) as run:
        run.a.output
        with torch.device("meta"):
            assert run.b.output.device.type == "cpu"
            assert torch.zeros(1).device.type == "meta"
            run.c.output
    assert torch.equal(run.result, net(X))


def test_a_run_opened_and_read_inside_a_mode_keeps_it():
    mode = Counting()
    with mode:
        run = Model(making()).trace(X)
        run.a.output
    run.result
    assert mode.seen.count("zeros") == 2


def test_two_runs_in_modes_of_their_own():
    modes = Counting(), Counting()
    nets = [within(mode) for mode in modes]
    expected = [net(X) for net in nets]
    bare = [mode.seen[:] for mode in modes]
    for mode in modes:
        mode.seen.clear()
    with Model(nets[0]).trace(X) as x, Model(nets[1]).trace(X) as y:
        x.b.output, y.b.output  # each is parked inside its mode
        x.c.output, y.c.output  # and leaves it first in, first out
    assert [mode.seen for mode in modes] == bare
    assert torch.equal(x.result, expected[0])
    assert torch.equal(y.result, expected[1])


@pytest.mark.parametrize("how", ["error", "stop", "drop"])
def test_no_mode_is_left_behind(how):
    mode = Counting()
    run = Model(within(mode)).trace(X)
    run.b.output
    if how == "stop":
        run.stop()
    elif how == "error":
        with pytest.raises(KeyError), run:
            raise KeyError
    del run
    assert _get_current_function_mode_stack() == []
    mode.seen.clear()
    torch.cos(X)
    assert mode.seen == []


def test_without_a_seed_the_random_state_is_shared():
    """As in the bare call: the random state is saved only if the run has its own random stream."""
    net = Calling(lambda self, x: self.b(self.a(x) + torch.rand(4)), a=linear(1), b=linear(2))
    with torch.random.fork_rng():
        torch.manual_seed(3)
        expected = net(X)
        torch.manual_seed(3)
        with Model(net).trace(X) as run:
            run.b.output
    assert torch.equal(run.result, expected)
