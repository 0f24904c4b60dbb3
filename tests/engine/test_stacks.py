"""Runs reuse the stacks of runs that have ended, and nothing of those runs remains on them."""

import contextvars
import ctypes
import gc
import subprocess
import sys
import threading
import weakref

import pytest
import torch
from greenlet import greenlet

from diffsight import Model
from helpers import outputs
from models.nets import Calling, linear


class Box:
    """Something that can be referred to weakly."""


@pytest.fixture
def without_collector():
    gc.disable()
    yield
    gc.enable()


@pytest.fixture
def new_stack(net, x):
    """Use all idle stacks, so that the next run begins on a new one, which later runs take over."""
    runs = [Model(net).trace(x) for _ in range(101)]
    for run in runs:
        run.first.output
    yield
    for run in runs:
        run.stop()


def test_nothing_of_an_ended_run_is_held(net, x, without_collector):
    setting = contextvars.ContextVar("setting")
    box = Box()
    setting.set(box)
    model = Model(net)
    with model.trace(x) as run:
        hidden = run.layers[1].output
    kept = [weakref.ref(value) for value in (hidden, run.result, box)]
    setting.set(None)
    del hidden, run, box
    assert [ref() for ref in kept] == [None] * 3


def test_nothing_of_a_stopped_or_failed_run_is_held(net, x, without_collector):
    model = Model(net)
    with model.trace(x) as run:
        hidden = run.layers[1].output
        run.stop()
    kept = [weakref.ref(hidden)]
    del hidden, run
    with pytest.raises(ZeroDivisionError), model.trace(x) as run:
        hidden = run.layers[1].output
        raise ZeroDivisionError
    kept.append(weakref.ref(hidden))
    del hidden, run
    assert [ref() for ref in kept] == [None] * 2


def test_nothing_of_a_run_that_begins_with_a_call_is_held(net, x, new_stack, without_collector):
    with Model(net).trace(x) as run:
        hidden = run.layers[1](x + 1, hook=True)
    kept = weakref.ref(hidden)
    del hidden, run
    assert kept() is None


def below(depth, function):
    return below(depth - 1, function) if depth else function()


def test_a_run_from_deep_down_takes_no_room_from_later_ones(net, x, new_stack):
    def read():
        with Model(net).trace(x) as run:
            run.first.output

    below(700, read)
    deep = Calling(lambda self, x: below(600, lambda: self.part(x)), part=linear())
    with Model(deep).trace(x) as run:
        hidden = run.part.output
    assert torch.equal(hidden, deep(x))


def test_runs_in_threads_that_end(net, x):
    model, found = Model(net), []

    def work():
        for _ in range(3):
            with model.trace(x) as run:
                found.append(run.layers[1].output)

    for _ in range(5):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    (want,) = outputs(net.layers[1], net, x)
    assert len(found) == 15 and all(torch.equal(value, want) for value in found)


def test_a_run_that_goes_from_one_greenlet_of_the_user_to_another(net, x):
    model = Model(net)
    run = greenlet(lambda: model.trace(x)).switch()
    first = greenlet(lambda: run.layers[0].output).switch()
    last = greenlet(lambda: run.finish()).switch()
    again = greenlet(lambda: model.trace(x).finish()).switch()
    assert (
        torch.equal(first, outputs(net.layers[0], net, x)[0])
        and torch.equal(last, net(x))
        and torch.equal(again, net(x))
    )


def test_a_hundred_runs_at_once(net, x):
    model = Model(net)
    runs = [model.trace(x + i) for i in range(150)]
    values = [run.layers[1].output for run in runs]
    assert all(torch.equal(run.finish(), net(x + i)) for i, run in enumerate(runs))
    assert all(torch.equal(value, outputs(net.layers[1], net, x + i)[0]) for i, value in enumerate(values))


def test_errors_look_at_no_frame_beyond_a_stack(net, x):
    """PyTorch's errors note 64 frames of the C stack; the one that they skip is the function that notes them."""
    backtrace = getattr(ctypes.CDLL(None), "backtrace", None)
    if backtrace is None:
        pytest.skip("this C library has no backtrace()")
    frames, found = (ctypes.c_void_p * 65)(), []

    def look(*_):
        found.append((backtrace(frames, 65), frames[64]))

    handle = net.layers[1].register_forward_pre_hook(look)
    model = Model(net)

    def run_from(depth):
        if depth:
            return next(map(run_from, [depth - 1]))
        with model.trace(x) as run:
            run.layers[0].output

    for depth in (0, 20, 0, 5):
        run_from(depth)
    handle.remove()
    assert found == [(65, found[0][1])] * 4  # the last is the same, wherever the run was opened


ERRORS_AT_DEPTHS = """
import torch
from torch import nn
from diffsight import Model

model, x, misshapen = Model(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))), torch.zeros(2, 4), torch.zeros(2, 3)

def below(depth, function):
    return next(map(lambda _: below(depth - 1, function), [0])) if depth else function()

def fail(depth):
    with model.trace(x) as run:
        run[0].output
        below(depth % 8, lambda: setattr(run[1], "input", misshapen))
        below(depth, lambda: run.finish())

failed = 0
for i in range(100):
    try:
        below(i * 7 % 30, lambda: fail(i * 11 % 30))
    except Exception:
        failed += 1
print(failed)
"""


def test_errors_of_a_model_that_is_run_from_anywhere():
    """They have crashed the process, see `Stack`."""
    ran = subprocess.run([sys.executable, "-c", ERRORS_AT_DEPTHS], capture_output=True, text=True)
    assert ran.returncode == 0 and ran.stdout.strip() == "100", ran.stderr
