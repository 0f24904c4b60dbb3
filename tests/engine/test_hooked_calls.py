"""Calls that a body makes itself: outside the run, and with `hook=True` through the points of the run."""

from weakref import ref

import pytest
import torch
from torch import nn

from diffsight import Model, OutOfOrderError
from diffsight.errors import NoRunError
from diffsight.extending import run_of
from helpers import footprint, outputs, replaced
from models.nets import Branch, linear


@pytest.fixture
def probed(net):
    """Return the net with a module that its forward pass never calls."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        net.probe = Branch()
    return net


def test_a_plain_call_fires_no_points(probed, x):
    with Model(probed).trace(x) as run:
        seen = run.record("probe.leaf")
        run.probe(run.first.output)
    assert not seen


def test_a_hooked_call_fires_its_points(probed, x):
    with Model(probed).trace(x) as run:
        seen = run.record(["probe.leaf", "probe.leaf.lin.input"])
        hidden = run.first.output
        answer = run.probe(hidden, hook=True)
    assert torch.equal(answer, probed.probe(hidden))
    assert torch.equal(seen["probe.leaf.output"], probed.probe.leaf(hidden))
    assert torch.equal(seen["probe.leaf.lin.input"], hidden)
    assert torch.equal(run.result, probed(x))


def test_assignments_ahead_reach_a_hooked_call(probed, x):
    value = torch.ones_like(x)
    with Model(probed).trace(x) as run:
        run.probe.leaf.output = value
        answer = run.probe(run.first.output, hook=True)
        run.layers[0].output = answer
    with replaced(probed.probe.leaf, lambda _: value):
        expected = probed.probe(probed.first(x))
    assert torch.equal(answer, expected)
    with replaced(probed.layers[0], lambda _: expected):
        assert torch.equal(run.result, probed(x))


def test_before_the_model_moves(probed, x):
    with Model(probed).trace(x) as run:
        run.probe.out.output = torch.zeros_like(x)
        answer = run.probe(x, hook=True)
        hidden = run.first.output
    assert torch.equal(answer, x)
    assert torch.equal(hidden, probed.first(x))


def test_a_module_of_the_model_called_again_counts_as_a_call(net, x):
    first = outputs(net.last, net, x)[0]
    with Model(net).trace(x) as run:
        hidden = run.layers[0].output
        early = run.last(hidden, hook=True)
        late = run.last.calls[1].output
    assert torch.equal(early, net.last(hidden)) and torch.equal(late, first)


def test_the_body_keeps_its_grad_mode(probed, x):
    with torch.no_grad():
        run = Model(probed).trace(x)
    with run:
        hidden = run.first.output
        assert not hidden.requires_grad
        assert run.probe(hidden, hook=True).requires_grad
        with torch.no_grad():
            assert not run.probe(hidden, hook=True).requires_grad
    assert not run.result.requires_grad


def test_an_error_in_it_is_the_bodys(probed, x):
    before = footprint(probed)
    with Model(probed).trace(x) as run:
        with pytest.raises(RuntimeError):
            run.probe(torch.ones(2, 9), hook=True)
        hidden = run.layers[0].output  # the model itself is unharmed
    assert torch.equal(hidden, outputs(probed.layers[0], probed, x)[0])
    assert torch.equal(run.result, probed(x)) and footprint(probed) == before


def test_points_of_a_finished_call_can_be_read(probed, x):
    with Model(probed).trace(x) as run:
        hidden = run.first.output
        answer = run.probe(hidden, hook=True)
        leaf, given, output = run.probe.leaf.output, run.probe.leaf.lin.input, run.probe.output
    assert output is answer and given is hidden
    assert torch.equal(leaf, probed.probe.leaf(probed.first(x)))


def test_points_of_an_earlier_call_are_too_late(probed, x):
    with pytest.raises(OutOfOrderError), Model(probed).trace(x) as run:
        run.probe(run.first.output, hook=True)
        run.layers[0].output
        run.probe.leaf.output


def test_an_edit_and_a_row_read_the_points_of_their_calls(probed, x):
    seen = []

    def edit(run):
        run.probe(run.first.output, hook=True)
        seen.append(run.probe.leaf.output)

    model = Model(probed).edit(edit)
    with model.trace(x) as run:
        run.layers[0].output
        run.probe(x, hook=True)
        with pytest.raises(OutOfOrderError):
            run.probe.leaf.output  # that of the edit's call
        assert torch.equal(run.probe.leaf.calls[1].output, probed.probe.leaf(x))
    assert torch.equal(seen[0], probed.probe.leaf(probed.first(x)))


def test_values_of_a_finished_call_are_let_go(probed, x):
    with Model(probed).trace(x) as run:
        run.probe(run.first.output, hook=True)
        leaf = ref(run.probe.leaf.output)
        run.probe(run.first.output, hook=True)
        run.layers[0].output
        assert leaf() is None
        run.probe(run.first.output, hook=True)
        last = ref(run.probe.leaf.calls[2].output)
    assert last() is None


def test_outside_of_a_run_is_an_error(probed, x):
    with pytest.raises(NoRunError):
        Model(probed).probe(x, hook=True)


def test_methods(x):
    class Coder(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = linear()

        def forward(self, x):
            return self.encode(x)

        def encode(self, x):
            return self.lin(x)

    net = Coder()
    with Model(net, methods=["encode"]).trace(x) as run:
        kept = run.record("encode.output")
        run.encode(x + 1, hook=True)
    hooked, own = kept["encode.output"]
    assert torch.equal(hooked, net.encode(x + 1)) and torch.equal(own, net.encode(x))


def test_rows_see_each_others_calls(probed, x):
    """A row's function calls the probe; another row's function reads inside that call."""

    def calls(row):
        hidden = row.first.output
        return row.probe(hidden, hook=True), row.last.output

    def reads(row):
        return run_of(row).probe.leaf.output, row.last.output

    with Model(probed).trace(x) as run:
        (answer, last0), (inside, last1) = run.each([calls, reads])
    hidden = probed.first(x)[:1]
    assert torch.equal(inside, probed.probe.leaf(hidden))
    assert torch.equal(answer, probed.probe(hidden))
    assert torch.equal(torch.cat([last0, last1]), probed(x))


def test_the_body_reads_inside_a_rows_call(probed, x):
    """The reverse: the body reads inside a call made by a row's function."""

    def outer(row):
        return row.probe(row.first.output, hook=True)

    def inner(row):
        seen = run_of(row).probe.leaf.output
        return run_of(row).unused(seen, hook=True)

    with Model(probed).trace(x) as run:
        kept = run.record("unused")
        answer, through = run.each([outer, inner])
    leaf = probed.probe.leaf(probed.first(x)[:1])
    assert torch.equal(through, probed.unused(leaf)) and torch.equal(kept["unused.output"], through)
    assert torch.equal(answer, probed.probe(probed.first(x)[:1]))


def test_next_is_the_call_after(net, x):
    expected = outputs(net.last, net.generate, x)
    with Model(net).generate(x) as run:
        first, second, third = run.last.output, run.last.next().output, run.last.next().next().output
    for value, wanted in zip((first, second, third), expected, strict=True):
        assert torch.equal(value, wanted)
