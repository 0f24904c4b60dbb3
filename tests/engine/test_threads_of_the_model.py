"""Modules that a model calls in threads of its own: a run does not see such calls, and says so."""

from concurrent.futures import ThreadPoolExecutor
from queue import Queue
from threading import Thread

import pytest
import torch
from torch import nn

from diffsight import Model, OutOfOrderError
from diffsight.engine.threads import THIS_THREAD, calls_in_threads, runs_beside_main
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


def test_a_thread_that_had_a_run_before():
    net, x = Net(again=True), torch.randn(2, 4)
    with torch.no_grad():
        net.pool.submit(lambda: Model(nn.Sequential(nn.Tanh())).trace(x).finish()).result()
        run = net.pool.submit(lambda: Model(nn.Sequential(nn.Tanh())).trace(x)).result()
        net.pool.submit(lambda: run[0].output).result()
        net.pool.submit(run.stop).result()
        with pytest.raises(DiffsightError, match="in a thread of its own"), Model(net).trace(x) as run:
            run.branch.output


class Posts(nn.Module):
    """Calls `branch` in the main thread, then in the thread that it runs in."""

    def __init__(self):
        super().__init__()
        self.branch, self.posted = nn.Sequential(nn.Linear(4, 4)), Queue()

    def forward(self, x):
        done = Queue()
        self.posted.put(lambda: done.put(self.branch(x)))
        return self.branch(done.get(timeout=20))


def test_a_run_in_a_thread_whose_model_calls_a_module_in_the_main_thread():
    net, x, errors = Posts(), torch.randn(2, 4), []

    def read():
        try:
            with torch.no_grad(), Model(net).trace(x) as run:
                run.branch.output
        except DiffsightError as error:
            errors.append(str(error))

    thread = Thread(target=read)
    thread.start()
    with torch.no_grad():
        net.posted.get(timeout=20)()
    thread.join()
    assert ["in a thread of its own" in error for error in errors] == [True]


def test_calls_that_are_certain_to_be_somebody_elses():
    """Calls before the run, and those of modules outside of the model, or around it."""
    shared, x = nn.Sequential(nn.Linear(4, 4), nn.Tanh()), torch.randn(2, 4)
    one, other = nn.Sequential(shared, nn.Linear(4, 4)), nn.Sequential(shared, nn.Linear(4, 4))
    with torch.no_grad(), ThreadPoolExecutor(1) as pool, Model(one).trace(x) as beside:
        beside[0][0].input  # the shared modules stay hooked
        pool.submit(shared, x).result()
        for function in (other, nn.Sequential(one, nn.Tanh()), shared[:1]):
            with Model(one).trace(x) as run:
                run[0].input
                pool.submit(function, x).result()
                value = run[0][0].output
                assert torch.equal(value, shared[0](x)) and torch.equal(run[0].output, shared(x))
        with pytest.raises(DiffsightError, match="thread"), Model(one).trace(x) as run:
            run[0].input
            pool.submit(shared, x).result()  # it may be the model itself that calls it
            run[0][0].output


def test_calls_in_threads_that_end_within_a_run_are_forgotten():
    net, x = nn.Sequential(nn.Sequential(nn.Linear(4, 4))), torch.randn(2, 4)
    before = set(THIS_THREAD.runs)
    with torch.no_grad(), ThreadPoolExecutor(1) as pool, Model(net).trace(x) as run:
        run[0].input
        for _ in range(50):
            pool.submit(nn.Sequential(net), x).result()
        assert len(calls_in_threads[id(net)]) < 20 and before < THIS_THREAD.runs
        pool.submit(lambda: Model(net).trace(x).finish()).result()
    assert id(net) not in calls_in_threads and before == THIS_THREAD.runs and not runs_beside_main


@pytest.mark.parametrize("way", ["record", "follow"])
def test_what_cannot_be_recorded_is_told(way):
    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.heads = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

        def forward(self, x):
            with ThreadPoolExecutor(2) as pool:
                return sum(pool.map(lambda head: head(x), self.heads))

    with (
        torch.no_grad(),
        pytest.raises(OutOfOrderError, match=r"not all values of heads\[0\] were recorded or followed"),
        Model(Heads()).trace(torch.randn(2, 4)) as run,
    ):
        run.record("heads[*]") if way == "record" else run.follow("heads[0]", print)
