"""A run needs no source code and no particular place: scripts, pipes, `exec`, helpers, generators, tracing, tasks."""

import asyncio
import subprocess
import sys
import textwrap

import pytest
import torch

import helpers
from diffsight import Model
from helpers import footprint, outputs, replaced
from models import nets
from models.nets import Net, inputs

SCRIPT = """
import torch
from torch import nn
from diffsight import Model, OutOfOrderError

net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
x = torch.ones(2, 4)
with Model(net).trace(x) as run:
    hidden = run[1].output
    hidden[:] = 1
    try: run[0].output
    except OutOfOrderError as error: print("too late")

assert torch.equal(run.result, net[2](torch.ones(2, 4)))
left_open = Model(net).trace(x)
left_open[0].output
print("done")
"""


@pytest.mark.parametrize("way", ["-c", "stdin"])
def test_without_a_file(way):
    command = [sys.executable, "-c", SCRIPT] if way == "-c" else [sys.executable, "-"]
    done = subprocess.run(command, input=SCRIPT if way == "stdin" else "", capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["too", "late", "done"], done.stderr
    assert done.returncode == 0 and "Traceback" not in done.stderr and "Exception" not in done.stderr


def test_exec(net, x):
    names = {"model": Model(net), "x": x, "torch": torch}
    exec(
        textwrap.dedent("""
        with model.trace(x) as run:
            hidden = run.layers[0].output
            run.layers[1].output = hidden * 2
        """),
        names,
    )
    with replaced(net.layers[1], lambda out: names["hidden"] * 2):
        assert torch.equal(names["run"].result, net(x))


def test_cell_after_cell(net, x):
    """A run stays open from one piece of code to the next, as in a notebook."""
    names = {"model": Model(net), "x": x}
    for cell in (
        "run = model.trace(x)",
        "hidden = run.layers[0].output",
        "hidden[:] = 0",
        "later = model.layers[1].output",
        "result = run.finish()",
    ):
        exec(cell, names)
    assert torch.equal(names["later"], net.layers[1](torch.zeros(2, 4)))
    assert torch.equal(names["result"], net.last(net.layers[2](names["later"])))


def test_names_are_bound_where_they_stand(net, x):
    total, kept = 0, {}
    with Model(net).trace(x) as run:
        for index, layer in enumerate(run.layers):
            total += layer.output.sum().item()
            if index == 1:
                kept["one"] = layer.output
    states = [outputs(layer, net, x)[0] for layer in net.layers]
    assert total == sum(state.sum().item() for state in states) and torch.equal(kept["one"], states[1])


def test_in_helpers(net, x):
    model = Model(net)

    def read(index):
        return model.layers[index].output

    def zero(layer, *, row):
        layer.output[row] = 0

    with model.trace(x) as run:
        first = read(0)
        zero(run.layers[1], row=0)
        [read(index) for index in (1, 2)]
    assert torch.equal(first, net.layers[0](net.first(x)))
    middle = net.layers[1](first).detach()
    middle[0] = 0
    assert torch.equal(run.result, net.last(net.layers[2](middle)))


def test_in_a_generator(net, x):
    def states(model):
        with model.trace(x) as run:
            for layer in run.layers:
                yield layer.output

    clean = footprint(net)
    assert all(map(torch.equal, states(Model(net)), [outputs(layer, net, x)[0] for layer in net.layers]))
    early = states(Model(net))
    next(early)
    assert footprint(net) != clean
    early.close()
    assert footprint(net) == clean


def test_in_tasks(net):
    """Two tasks of one thread, each with a run, that take turns."""

    async def work(seed):
        with Model(net).trace(inputs(seed)) as run:
            values = []
            for layer in run.layers:
                values.append(layer.output)
                await asyncio.sleep(0)
        return values, run.result

    async def both():
        return await asyncio.gather(work(1), work(2))

    for seed, (values, result) in zip((1, 2), asyncio.run(both())):
        assert all(map(torch.equal, values, [outputs(layer, net, inputs(seed))[0] for layer in net.layers]))
        assert torch.equal(result, net(inputs(seed)))


def test_under_tracing(net, x):
    """As coverage and debuggers do it: every line of the body and of the model is seen."""

    def body():
        with Model(net).trace(x) as run:
            first = run.first.output
            double = first * 2
            second = run.layers[1].output
            both = double + second
        return both, run.result

    seen = {}

    def tracer(frame, event, arg):
        if frame.f_code.co_filename not in (__file__, nets.__file__, helpers.__file__):
            return None
        seen.setdefault(frame.f_code, set()).add(frame.f_lineno)
        return tracer

    before = sys.gettrace()
    sys.settrace(tracer)
    try:
        both, result = body()
    finally:
        sys.settrace(before)
    assert torch.equal(both, net.first(x) * 2 + outputs(net.layers[1], net, x)[0])
    assert torch.equal(result, net(x))
    for code in (body.__code__, Net.forward.__code__):
        lines = {line for _, _, line in code.co_lines() if line is not None}
        assert lines <= seen[code] | {code.co_firstlineno}


def test_a_tracer_set_in_the_body(net, x):
    """`pdb.set_trace()` in a body: the lines after it are traced, also once the model has moved."""
    seen = []

    def tracer(frame, event, arg):
        if event == "line" and frame is body:
            seen.append(frame.f_lineno)
        return tracer

    body, before = sys._getframe(), sys.gettrace()
    try:
        with Model(net).trace(x) as run:
            run.first.output
            body.f_trace = tracer
            sys.settrace(tracer)
            start = body.f_lineno
            run.layers[0].output
            run.layers[1].output
            sys.settrace(before)
    finally:
        sys.settrace(before)
    assert [line - start for line in seen][:4] == [0, 1, 2, 3]


def test_no_trace_function_is_set(net, x):
    before = sys.gettrace(), sys.getprofile()
    with Model(net).trace(x) as run:
        run.first.output
        assert (sys.gettrace(), sys.getprofile()) == before
