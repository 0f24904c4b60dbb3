"""Several runs open at once: of two models, of the same model, one within another."""

import pytest
import torch

from diffsight import Model
from diffsight.errors import NoRunError
from helpers import footprint, outputs, replaced
from models.nets import Net, inputs


def test_two_models_feed_each_other():
    one, two = Net(1), Net(2)
    with Model(one).trace(inputs(1)) as x, Model(two).trace(inputs(2)) as y:
        y.layers[1].output = x.layers[1].output
    assert torch.equal(x.result, one(inputs(1)))
    assert torch.equal(y.result, two.last(two.layers[2](outputs(one.layers[1], one, inputs(1))[0])))


def test_both_ways(net):
    """Each layer's output goes to the other run, while both are under way."""
    other = Net(1)
    with Model(net).trace(inputs(1)) as x, Model(other).trace(inputs(2)) as y:
        for a, b in zip(x.layers, y.layers):
            mine, yours = a.output, b.output
            a.output, b.output = yours, mine
    u, v = net.first(inputs(1)), other.first(inputs(2))
    for a, b in zip(net.layers, other.layers):
        u, v = b(v), a(u)
    assert torch.equal(x.result, net.last(u)) and torch.equal(y.result, other.last(v))


def test_the_same_model_twice(net):
    before = footprint(net)
    model = Model(net)
    with model.trace(inputs(1)) as x, model.trace(inputs(2)) as y:
        for a, b in zip(x.layers, y.layers):
            mine, yours = a.output, b.output
            a.output, b.output = yours, mine
    u, v = net.first(inputs(1)), net.first(inputs(2))
    for layer in net.layers:
        u, v = layer(v), layer(u)
    assert torch.equal(x.result, net.last(u)) and torch.equal(y.result, net.last(v))
    assert footprint(net) == before


def test_patching_from_a_run_with_another_input(gpt2, ids):
    model = Model(gpt2)
    with model.trace(ids) as clean, model.trace(ids + 1) as other:
        clean.transformer.h[1].output[:, 1] = other.transformer.h[1].output[:, 1]
    (source,) = outputs(gpt2.transformer.h[1], gpt2, ids + 1)

    def patch(out):
        out = out.clone()
        out[:, 1] = source[:, 1]
        return out

    with replaced(gpt2.transformer.h[1], patch):
        assert torch.equal(clean.result.logits, gpt2(ids).logits)
    assert torch.equal(other.result.logits, gpt2(ids + 1).logits)


@pytest.mark.parametrize("first_to_end", ["x", "y"])
@pytest.mark.parametrize("part", ["input", "output"])
@pytest.mark.parametrize("first_to_ask", ["x", "y"])
def test_one_ends_while_the_other_waits_at_the_same_module(net, first_to_ask, part, first_to_end):
    model = Model(net)
    runs = {"x": model.trace(inputs(1)), "y": model.trace(inputs(2))}
    expected = {"x": net(inputs(1)), "y": net(inputs(2))}
    order = ["x", "y"] if first_to_ask == "x" else ["y", "x"]
    for name in order:
        getattr(runs[name].layers[1], part)
    other = "y" if first_to_end == "x" else "x"
    assert torch.equal(runs[first_to_end].finish(), expected[first_to_end])
    assert torch.equal(runs[other].finish(), expected[other])


@pytest.mark.parametrize("part", ["input", "output"])
def test_one_stops_while_the_other_waits_at_the_same_module(net, part):
    model = Model(net)
    before = footprint(net)
    with model.generate(inputs(1)) as x, model.generate(inputs(2)) as y:
        for _ in zip(x.steps[:2], y.steps[:2]):
            getattr(x.first, part), getattr(y.first, part)
        getattr(x.first.calls[2], part)
        y.stop()
    assert torch.equal(x.result, Net().generate(inputs(1)))
    assert footprint(net) == before


def test_steps_of_two_runs(net):
    other = Net(1)
    with Model(net).generate(inputs(1)) as x, Model(other).generate(inputs(2)) as y:
        for a, b in zip(x.steps, y.steps):
            assert a.index == b.index
            y.layers[1].output = x.layers[1].output
    sources = outputs(net.layers[1], net.generate, inputs(1))
    taken = iter(sources)
    with replaced(other.layers[1], lambda out: next(taken)):
        assert torch.equal(y.result, other.generate(inputs(2)))
    assert torch.equal(x.result, net.generate(inputs(1)))


def test_steps_of_the_same_model_twice(gpt2, ids, greedy):
    model = Model(gpt2)
    sources = outputs(gpt2.transformer.h[1], gpt2.generate, ids, **greedy)
    with model.generate(ids, **greedy) as x, model.generate(ids + 1, **greedy) as y:
        for _ in zip(x.steps, y.steps):
            y.transformer.h[1].output = x.transformer.h[1].output
    taken = iter(sources)
    with replaced(gpt2.transformer.h[1], lambda out: next(taken)):
        assert torch.equal(y.result, gpt2.generate(ids + 1, **greedy))
    assert torch.equal(x.result, gpt2.generate(ids, **greedy))


def test_steps_of_runs_of_different_length(net):
    other = Net(1)
    seen = []
    with Model(net).generate(inputs(1), steps=4) as x, Model(other).generate(inputs(2), steps=2) as y:
        for a, b in zip(x.steps, y.steps):
            seen.append((a.index, b.index))
            x.first.output, y.first.output
    assert seen == [(0, 0), (1, 1)]
    assert torch.equal(x.result, net.generate(inputs(1), steps=4))
    assert torch.equal(y.result, other.generate(inputs(2), steps=2))


def test_runs_left_open_and_finished_in_any_order(net):
    before = footprint(net)
    model = Model(net)
    runs = [model.trace(inputs(seed)) for seed in range(4)]
    for run, layer in zip(runs, (0, 1, 2, 0)):
        run.layers[layer].output[:] += 1
    for seed in (2, 0, 3, 1):
        with replaced(net.layers[(0, 1, 2, 0)[seed]], lambda out: out + 1):
            expected = net(inputs(seed))
        assert torch.equal(runs[seed].finish(), expected)
    assert footprint(net) == before


def test_an_error_of_one_run_ends_both(net):
    before = footprint(net)
    model = Model(net)
    with pytest.raises(KeyError), model.trace(inputs(1)) as x, model.trace(inputs(2)) as y:
        x.layers[0].output, y.layers[1].output
        raise KeyError
    assert footprint(net) == before


# ---- a run within a run of the same model


def test_the_model_means_the_innermost_run(net):
    model = Model(net)
    layer = model.layers[1]
    with model.trace(inputs(1)) as outer:
        assert torch.equal(model.first.output, net.first(inputs(1)))
        with model.trace(inputs(2)) as inner:
            assert torch.equal(model.first.output, net.first(inputs(2)))
            model.layers[0].output = inputs(3)
            assert torch.equal(outer.layers[0].output, net.layers[0](net.first(inputs(1))))
            assert torch.equal(layer.output, net.layers[1](inputs(3)))
        assert torch.equal(layer.output, outputs(net.layers[1], net, inputs(1))[0])
        assert outer.layers[1].output is layer.output
    assert torch.equal(outer.result, net(inputs(1)))
    assert torch.equal(inner.result, net.last(net.layers[2](net.layers[1](inputs(3)))))


def test_an_unread_run_within_a_run(net):
    model = Model(net)
    with model.trace(inputs(1)) as outer:
        outer.last.output = inputs(3)
        outer.first.output
        assert torch.equal(model.trace(inputs(2)).result, Net()(inputs(2)))
    assert torch.equal(outer.result, inputs(3))


def test_a_run_for_every_layer_within_a_run(net):
    model = Model(net)
    with model.trace(inputs(1)) as outer:
        for index, layer in enumerate(outer.layers):
            with model.trace(inputs(2)) as inner:
                inner.layers[index].output = layer.output
            (state,) = outputs(net.layers[index], net, inputs(1))
            with replaced(net.layers[index], lambda out, state=state: state):
                assert torch.equal(inner.result, net(inputs(2)))
    assert torch.equal(outer.result, net(inputs(1)))


def test_two_wrappers_of_one_net_are_independent(net, x):
    one, two = Model(net), Model(net)
    with one.trace(x):
        with pytest.raises(NoRunError):
            two.first.output
        with two.trace(inputs(1)):
            assert torch.equal(one.first.output, net.first(x))
            assert torch.equal(two.first.output, net.first(inputs(1)))


def test_a_run_dropped_while_another_is_open(net):
    model = Model(net)
    with model.trace(inputs(1)) as x:
        x.layers[0].output
        y = model.trace(inputs(2))
        y.layers[0].output
        del y
        assert torch.equal(model.layers[1].output, outputs(net.layers[1], net, inputs(1))[0])
    assert torch.equal(x.result, net(inputs(1)))
