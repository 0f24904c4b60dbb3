"""Modules that are called several times: `.output` is the first call in the scope, `.calls[i]` any other."""

import pytest
import torch
from torch import nn

from diffsight import Model, OutOfOrderError
from helpers import outputs, record, replaced
from models.nets import WIDTH, Calling, inputs, linear


@pytest.fixture
def four():
    """Calls `step` four times."""

    def forward(self, x):
        for _ in range(4):
            x = self.step(x)
        return x

    return Calling(forward, step=linear())


def test_every_call_by_number(four, x):
    with Model(four).trace(x) as run:
        values = [run.step.calls[i].output for i in range(4)]
        assert run.step.output is values[0]
    assert all(map(torch.equal, values, outputs(four.step, four, x)))


def test_several_numbers_are_refused(four, x):
    with Model(four).trace(x) as run:
        with pytest.raises(IndexError, match="takes the number of a call"):
            run.step.calls[torch.tensor([0, 1])]
        assert run.step.calls[torch.tensor(1)].output is run.step.calls[1].output


def test_inputs_by_number(four, x):
    with record(four.step) as calls, Model(four).trace(x) as run:
        assert run.step.calls[1].input is calls[0][2]
        assert run.step.calls[3].inputs == ((calls[2][2],), {})


def test_an_edit_of_one_call(four, x):
    with Model(four).trace(x) as run:
        run.step.calls[2].output = inputs(1)
        assert torch.equal(run.step.output, four.step(x))
    with replaced(four.step, lambda out: inputs(1), only=2):
        assert torch.equal(run.result, four(x))


def test_an_edit_in_place_of_one_call(four, x):
    with Model(four).trace(x) as run:
        run.step.calls[1].output[:] = 0
    assert torch.equal(run.result, four.step(four.step(torch.zeros(2, WIDTH))))


def test_an_earlier_call_is_too_late(four, x):
    with Model(four).trace(x) as run:
        run.step.calls[2].input
        for late in (lambda: run.step.output, lambda: run.step.calls[1].output, lambda: run.step.calls[0].input):
            with pytest.raises(OutOfOrderError):
                late()
        last = run.step.calls[3].output
    assert torch.equal(last, four(x))


@pytest.mark.parametrize("wrong", [-1, 1.0, "0", slice(None)])
def test_calls_are_numbered_from_0(four, x, wrong):
    with Model(four).trace(x) as run, pytest.raises(IndexError):
        run.step.calls[wrong]


def test_calls_cannot_be_iterated(four, x):
    with Model(four).trace(x) as run, pytest.raises(TypeError):
        list(run.step.calls)


def test_calls_are_counted_from_the_beginning_of_a_step(x):
    net = Calling(lambda self, x: self.part(self.part(x)), part=linear())

    def generate(x):
        for _ in range(3):
            x = net(x)
        return x

    net.generate = generate
    values = outputs(net.part, generate, x)
    with Model(net).generate(x) as run:
        for step in run.steps:
            assert torch.equal(run.part.output, values[2 * step.index])
            assert torch.equal(run.part.calls[1].output, values[2 * step.index + 1])
    with Model(net).generate(x) as run:
        assert torch.equal(run.part.calls[3].output, values[3])
        for step in run.steps:
            if step.index == 2:
                assert torch.equal(run.part.calls[1].output, values[5])


def test_a_call_that_the_step_does_not_make(x):
    net = Calling(lambda self, x: self.part(self.part(x)), part=linear())
    net.generate = lambda x: net(net(x))
    with Model(net).generate(x) as run:
        for _ in run.steps:
            with pytest.raises(OutOfOrderError):
                run.part.calls[2].output
    assert torch.equal(run.result, net.generate(x))


class Recursive(nn.Module):
    """Calls itself `depth` times, before it runs its own layer."""

    def __init__(self):
        super().__init__()
        self.layer = linear()

    def forward(self, x, depth: int):
        if depth:
            x = self(x, depth - 1)
        return self.layer(x) + depth


@pytest.mark.parametrize("wrapped", [False, True], ids=["the model itself", "a child"])
def test_a_module_that_calls_itself(wrapped, x):
    tree = Recursive()
    net = Calling(lambda self, x, depth: self.tree(x, depth), tree=tree) if wrapped else tree
    inner_to_outer = outputs(tree, net, x, 2)
    with Model(net).trace(x, 2) as run:
        part = run.tree if wrapped else run
        for number in range(3):  # the outermost call begins first and ends last
            assert part.calls[number].inputs[0][1] == 2 - number
        for number in (2, 1, 0):
            assert torch.equal(part.calls[number].output, inner_to_outer[2 - number])
    with Model(net).trace(x, 2) as run:
        (run.tree if wrapped else run).calls[1].output = x
    assert torch.equal(run.result, tree.layer(x) + 2)


def test_a_recursive_module_asked_for_while_it_runs(x):
    """Calls that have begun are counted even if nobody asked for them."""
    tree = Recursive()
    net = Calling(lambda self, x: self.after(self.tree(x, 2)), tree=tree, after=linear(1))
    inner_to_outer = outputs(tree, net, x)
    with Model(net).trace(x) as run:
        run.tree.layer.calls[1].output  # in the middle one of three calls: one has returned, two are running
        assert torch.equal(run.tree.calls[1].output, inner_to_outer[1])
        assert torch.equal(run.tree.output, inner_to_outer[2])
        with pytest.raises(OutOfOrderError):
            run.tree.calls[2].output
    assert torch.equal(run.result, net(x))
