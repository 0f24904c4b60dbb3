"""Modules that a model calls in threads of its own: a run does not see such calls, and says so."""

from concurrent.futures import ThreadPoolExecutor
from threading import Thread

import pytest
import torch
from torch import nn

from diffsight import Model, OutOfOrderError
from diffsight.errors import DiffsightError, NeverReachedError


class Net(nn.Module):
    """Calls `branch` in another thread; with `again`, later in its own as well."""

    def __init__(self, again=False):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)
        self.branch, self.again = nn.Sequential(nn.Linear(4, 4), nn.Tanh()), again
        self.pool = ThreadPoolExecutor(1)

    def forward(self, x):
        x = self.first(x)
        with torch.no_grad():
            x = self.pool.submit(self.branch, x).result()
        return self.last(self.branch(x) if self.again else x)


ASKS = {
    "read": lambda run, path: run[path].output,
    "assigned": lambda run, path: setattr(run[path], "output", torch.zeros(2, 4)),
    "skipped": lambda run, path: run[path].skip(torch.zeros(2, 4)),
    "recorded": lambda run, path: run.record(path),
}


@pytest.mark.parametrize("path", ["branch", "branch[0]", "branch[1]"])
@pytest.mark.parametrize("ask", ASKS.values(), ids=ASKS)
@pytest.mark.parametrize("known", [False, True], ids=["the first run", "a later run"])
def test_a_later_call_is_not_given_as_the_first(ask, path, known):
    net, x = Net(again=True), torch.randn(2, 4)
    model = Model(net)
    if known:
        with model.trace(x) as run:
            run.last.output
    with pytest.raises(DiffsightError, match=r"branch.* in a thread of its own"), model.trace(x) as run:
        ask(run, path)
        run.last.output


def test_a_value_that_is_only_passed_in_a_thread():
    net, x = Net(), torch.randn(2, 4)
    with pytest.raises(NeverReachedError, match=r"branch\[0\].output.* in a thread of its own"):
        with Model(net).trace(x) as run:
            run.branch[0].output
    with pytest.raises(OutOfOrderError, match="threads that the model starts are not seen"):
        with Model(net).trace(x) as run:
            run.branch[0].output = x


def test_everything_else_can_be_read_and_changed():
    net, x = Net(again=True), torch.randn(2, 4)
    with torch.no_grad(), Model(net).trace(x) as run:
        run.first.output = run.first.output * 2
        value = run.last.input
    with torch.no_grad():
        assert torch.equal(value, net.branch(net.branch(net.first(x) * 2))) and torch.equal(run.result, net.last(value))


def test_calls_of_somebody_else_do_not_count():
    """A thread that calls the same model, or a part of the model in its body, while the run is open."""
    net, x, got = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)), torch.randn(2, 4), []

    def in_thread(function):
        thread = Thread(target=function)
        thread.start()
        thread.join()

    def run_in_thread():
        with torch.no_grad(), Model(net).trace(x) as run:
            run[0].output
            run[1](x), net(x)
            got.append(run[1].output)

    with torch.no_grad(), Model(net).trace(x) as run:
        run[0].output
        in_thread(lambda: net(x))
        in_thread(run_in_thread)
        got.append(run[1].output)
    with torch.no_grad():
        assert torch.equal(got[0], net[:2](x)) and torch.equal(got[1], net[:2](x))
