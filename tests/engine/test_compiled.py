"""Modules that `torch.compile` has compiled: their points, the points inside them, and what is left behind."""

import warnings

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from diffsight import Model
from helpers import footprint, outputs
from models.nets import Net as Logging


class Net(Logging):
    """Without the log, whose length compiled code would depend on."""

    def forward(self, x):
        x = self.first(x)
        for layer in self.layers:
            x = layer(x)
        return self.last(x)


def compile_layer(net, backend):
    net.layers[1].compile(backend=backend)
    return net


def compile_whole(net, backend):
    net.compile(backend=backend)
    return net


def wrap_layer(net, backend):
    net.layers[1] = torch.compile(net.layers[1], backend=backend)
    return net


def wrap_whole(net, backend):
    return torch.compile(net, backend=backend)


def compile_forward(net, backend):
    net.layers[1].forward = torch.compile(net.layers[1].forward, backend=backend)
    return net


@pytest.fixture
def counter():
    torch._dynamo.reset()
    yield CompileCounter()
    torch._dynamo.reset()


@pytest.fixture(
    params=[compile_layer, compile_whole, compile_forward, wrap_layer, wrap_whole], ids=lambda way: way.__name__
)
def compiled(request, counter, x):
    """Return a net compiled in one of five ways, which has run once, and the same net uncompiled."""
    net = request.param(Net(), counter)
    net(x)
    return net


def left(net, counter):
    return footprint(net), [vars(module).get("_compiled_call_impl") for module in net.modules()], counter.frame_count


def test_an_unread_run_gives_the_same_bits(compiled, counter, x):
    expected, before = compiled(x), left(compiled, counter)
    with Model(compiled).trace(x) as run:
        pass
    assert torch.equal(run.result, expected) and left(compiled, counter) == before


def test_its_own_points(compiled, counter, x):
    plain, expected = Net(), compiled(x)
    before = left(compiled, counter)
    with Model(compiled).trace(x) as run:
        first, second = run.layers[1].input, run.layers[1].output
    assert torch.allclose(first, outputs(plain.layers[0], plain, x)[0])
    assert torch.allclose(second, outputs(plain.layers[1], plain, x)[0])
    assert torch.allclose(run.result, expected) and left(compiled, counter) == before


def test_points_inside_a_compiled_module(compiled, counter, x):
    plain, expected = Net(), compiled(x)
    before = left(compiled, counter)
    with Model(compiled).trace(x) as run:
        leaf, last = run.layers[1].leaf.output, run.layers[2].output
        with_run = run.last.input
    assert torch.allclose(leaf, outputs(plain.layers[1].leaf, plain, x)[0])
    assert torch.allclose(last, outputs(plain.layers[2], plain, x)[0]) and with_run is last
    assert torch.allclose(run.result, expected) and left(compiled, counter) == before
    assert torch.equal(compiled(x), expected)


def test_edits_and_skips(compiled, counter, x):
    plain, expected = Net(), compiled(x)
    before = left(compiled, counter)
    with Model(compiled).trace(x) as run:
        run.layers[1].leaf.output = torch.zeros_like(x)
        run.layers[2].skip(run.layers[2].input + 1)
    hidden = outputs(plain.layers[0], plain, x)[0]
    hidden = hidden + plain.layers[1].out(torch.zeros_like(x)) + 1
    assert torch.allclose(run.result, plain.last(hidden))
    assert left(compiled, counter) == before and torch.equal(compiled(x), expected)


def test_a_run_before_the_first_call_compiles_nothing_extra(counter, x):
    net = compile_layer(Net(), counter)
    with Model(net).trace(x) as run:
        run.layers[1].output
    assert counter.frame_count == 1
    assert torch.equal(net(x), run.result) and counter.frame_count == 1


def test_what_runs_uncompiled_is_named_once(compiled, x):
    model = Model(compiled)
    with pytest.warns(UserWarning, match="is compiled: a run that reads or changes values inside it") as seen:
        for _ in range(2):
            with model.trace(x) as run:
                run.layers[1].leaf.output
    assert len(seen) == 1 and seen[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with model.trace(x) as run:
            run.layers[1].output
