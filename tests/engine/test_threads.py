"""A run belongs to the thread that opened it; runs in different threads do not disturb each other."""

import gc
import threading

import pytest
import torch
from greenlet import greenlet

from diffsight import DiffsightError, Model
from diffsight.envoy import flow_of
from diffsight.errors import WrongThreadError
from helpers import footprint, outputs
from models.nets import Net, inputs


def in_a_thread(function):
    """Return what `function` returns or raises in a new thread."""
    box = {}

    def target():
        try:
            box["value"] = function()
        except BaseException as error:
            box["error"] = error

    thread = threading.Thread(target=target)
    thread.start()
    thread.join(20)
    assert not thread.is_alive(), "hangs"
    if "error" in box:
        raise box["error"]
    return box["value"]


@pytest.mark.parametrize("started", [False, True])
def test_another_thread_gets_an_error(net, x, started):
    with Model(net).trace(x) as run:
        if started:
            run.first.output
        layer = run.layers[1]
        for use in (
            lambda: layer.output,
            lambda: run.last.input,
            lambda: setattr(layer, "output", x),
            lambda: layer.skip(x),
            lambda: list(run.steps),
            lambda: run.result,
            run.finish,
            run.stop,
        ):
            with pytest.raises(WrongThreadError, match="thread"):
                in_a_thread(use)
        assert torch.equal(layer.output, outputs(net.layers[1], net, x)[0])
    assert torch.equal(run.result, net(x))


def test_a_with_statement_in_another_thread_leaves_the_run_open(net, x):
    run = Model(net).trace(x)
    run.first.output

    def enter(read):
        with run:
            if read:
                run.layers[0].output

    for read in (False, True):
        with pytest.raises(WrongThreadError):
            in_a_thread(lambda read=read: enter(read))
    assert torch.equal(run.layers[1].output, outputs(net.layers[1], net, x)[0])
    assert torch.equal(run.finish(), net(x))


def test_in_another_thread_the_model_has_no_run_of_this_one(net, x):
    model = Model(net)
    with model.trace(x):
        model.first.output
        with pytest.raises(DiffsightError):
            in_a_thread(lambda: model.first.output)

        def own():
            with model.trace(inputs(1)):
                return model.first.output

        assert torch.equal(in_a_thread(own), net.first(inputs(1)))
        assert torch.equal(model.layers[0].output, net.layers[0](net.first(x)))


def test_two_threads_on_two_models():
    """Every value is taken while the other run stands between two of its own."""
    barrier = threading.Barrier(2, timeout=20)
    results = {}
    given = {seed: (Net(seed), inputs(seed)) for seed in (0, 1)}  # here: the random state belongs to all threads

    def work(seed):
        net, start = given[seed]
        model = Model(net)
        values = []
        with torch.set_grad_enabled(seed == 0), model.generate(start, steps=5) as run:
            for _ in run.steps:
                for part in (run.first, *run.layers, run.last):
                    barrier.wait()
                    values.append(part.output)
                    assert torch.is_grad_enabled() == (seed == 0)
                run.last.output = values[-1] * 2
        results[seed] = (values, run.result)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert set(results) == {0, 1}
    for seed, (values, result) in results.items():
        (net, value), plain = given[seed], []
        for _ in range(5):
            for module in (net.first, *net.layers, net.last):
                value = module(value)
                plain.append(value)
            value = value * 2
        assert all(map(torch.equal, values, plain)) and torch.equal(result, value)
        assert result.requires_grad == (seed == 0)


def test_two_threads_on_one_net():
    net = Net()
    clean = footprint(net)
    barrier = threading.Barrier(2, timeout=20)
    results = {}

    def work(seed):
        model = Model(net)
        with model.trace(inputs(seed)) as run:
            for layer in run.layers:
                barrier.wait()
                layer.output = layer.output + seed
        results[seed] = run.result

    threads = [threading.Thread(target=work, args=(seed,)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    for seed in (1, 2):
        value = net.first(inputs(seed))
        for layer in net.layers:
            value = layer(value) + seed
        assert torch.equal(results[seed], net.last(value))
    assert footprint(net) == clean


def test_a_run_whose_last_name_goes_away_in_another_thread(net, x):
    clean = footprint(net)
    holder = [Model(net).trace(x)]
    holder[0].layers[1].input
    in_a_thread(holder.clear)
    gc.collect()
    assert footprint(net) == clean
    assert torch.equal(Model(net).trace(x).result, net(x))


def test_a_thread_with_the_number_of_an_ended_one_is_another_thread(net, x):
    opened, numbers, errors = [], [], []

    def read():
        if numbers and threading.get_ident() != numbers[0]:
            return  # wait until the number comes again
        numbers.append(threading.get_ident())
        try:
            opened.append(Model(net).trace(x)) if not opened else opened[0].first.output
        except Exception as error:
            errors.append(error)

    for _ in range(1000):
        if len(numbers) < 2:
            in_a_thread(read)
    assert len(numbers) == 2
    assert [type(error) for error in errors] == [WrongThreadError]


def test_a_run_that_has_ended_does_not_hold_the_stack_of_its_thread():
    """Otherwise greenlet may free that stack, when the thread has ended, while the run still refers to it."""
    run = Model(Net()).trace(inputs())
    run.finish()
    held = [name for name, value in vars(flow_of(run)).items() if isinstance(value, greenlet)]
    assert run.result is not None and held == []
