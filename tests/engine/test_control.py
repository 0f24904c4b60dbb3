"""Leaving calls out, stopping, and calling modules from the body."""

import pytest
import torch

from diffsight import Model, OutOfOrderError
from diffsight.errors import AssignmentError, NeverReachedError, RunClosedError
from helpers import footprint, replaced
from models.nets import Calling, Net, inputs, linear

# ---- skip


def test_skip_ahead(net, x):
    with Model(net).trace(x) as run:
        run.layers[1].skip(inputs(1))
        assert torch.equal(run.layers[1].output, inputs(1))
    assert torch.equal(run.result, net.last(net.layers[2](inputs(1))))


def test_skip_at_the_inputs(net, x):
    """A layer is skipped: its input becomes its output."""
    with Model(net).trace(x) as run:
        for layer in run.layers:
            layer.skip(layer.input)
    assert torch.equal(run.result, net.last(net.first(x)))


def test_skip_at_all_the_inputs(net, x):
    with Model(net).trace(x) as run:
        (given,), _ = run.last.inputs
        run.last.skip(given)
    assert torch.equal(run.result, net.layers[2](net.layers[1](net.layers[0](net.first(x)))))


def test_what_is_skipped_does_not_run(x):
    ran = []
    part = Calling(lambda self, x: ran.append("part") or x)
    net = Calling(lambda self, x: self.part(x) + 1, part=part)
    with Model(net).trace(x) as run:
        run.part.skip(x)
    assert ran == [] and torch.equal(run.result, x + 1)
    assert torch.equal(net(x), x + 1) and ran == ["part"]


def test_skip_one_call_of_several(x):
    net = Calling(lambda self, x: self.step(self.step(self.step(x))), step=linear())
    with Model(net).trace(x) as run:
        run.step.calls[1].skip(inputs(1))
        assert torch.equal(run.step.output, net.step(x))
    assert torch.equal(run.result, net.step(inputs(1)))


def test_skip_the_whole_model(net, x):
    with Model(net).trace(x) as run:
        run.skip("nothing ran")
    assert run.result == "nothing ran" and net.log == []


def test_skip_in_one_step(net, x):
    with Model(net).generate(x) as run:
        for step in run.steps:
            if step.index == 1:
                run.layers[0].skip(run.first.output)
    second = net.first(net(x))
    for module in (*net.layers[1:], net.last):
        second = module(second)
    assert torch.equal(run.result, net(second))


def test_skip_too_late(net, x):
    with Model(net).trace(x) as run:
        run.layers[0].output
        with pytest.raises(OutOfOrderError, match=r"layers\[0\]\.skip"):
            run.layers[0].skip(x)
        run.layers[1].input, run.layers[1].leaf.output
        with pytest.raises(OutOfOrderError, match=r"layers\[1\]\.skip"):
            run.layers[1].skip(x)
    assert torch.equal(run.result, net(x))


def test_skip_that_is_never_reached(net, x):
    with pytest.raises(NeverReachedError, match=r"unused\.skip"), Model(net).trace(x) as run:
        run.unused.skip(x)


def test_skip_leaves_inputs_to_read_and_output_to_replace(net, x):
    with Model(net).trace(x) as run:
        run.last.skip(inputs(1))
        run.last.output = inputs(2)
        assert torch.equal(run.last.input, net.layers[2](net.layers[1](net.layers[0](net.first(x)))))
    assert torch.equal(run.result, inputs(2))


def test_skip_a_block_of_gpt2(gpt2, ids):
    with Model(gpt2).trace(ids) as run:
        run.transformer.h[1].skip(run.transformer.h[1].input)
    hidden = []
    first, second = gpt2.transformer.h[:2]
    handle = first.register_forward_hook(lambda module, args, out: hidden.append(out))
    with replaced(second, lambda out: hidden[-1]):
        assert torch.equal(run.result.logits, gpt2(ids).logits)
    handle.remove()


def test_skip_in_one_of_two_runs(net):
    model = Model(net)
    with model.trace(inputs(1)) as x, model.trace(inputs(2)) as y:
        x.layers[1].skip(x.layers[1].input)
        y.layers[1].input
        x.last.output, y.last.output
    assert torch.equal(x.result, net.last(net.layers[2](net.layers[0](net.first(inputs(1))))))
    assert torch.equal(y.result, net(inputs(2)))


# ---- stop


def test_stop(net, x):
    before = footprint(net)
    with Model(net).trace(x) as run:
        value = run.layers[0].output
        run.stop()
        assert footprint(net) == before
    assert net.log == ["first", "layers[0]"]
    assert torch.equal(value, net.layers[0](net.first(x)))


def test_stop_before_anything(net, x):
    with Model(net).trace(x) as run:
        run.stop()
    assert net.log == []


def test_stopping_twice_and_after_the_end(net, x):
    with Model(net).trace(x) as run:
        run.first.output
        run.stop()
        run.stop()
    finished = Model(net).trace(x)
    result = finished.result
    finished.stop()
    assert finished.result is result


def test_after_a_stop_nothing_can_be_asked_for(net, x):
    with Model(net).trace(x) as run:
        run.first.output
        run.stop()
        for late in (lambda: run.last.output, lambda: run.first.output, lambda: run.result, run.finish):
            with pytest.raises(RunClosedError, match="stopped"):
                late()
        with pytest.raises(RunClosedError, match="stopped"):
            run.last.output = x


def test_stop_in_a_loop(net, x):
    seen = []
    with Model(net).generate(x, steps=5) as run:
        for step in run.steps:
            seen.append(step.index)
            run.first.output
            if step.index == 2:
                run.stop()
    assert seen == [0, 1, 2] and net.log.count("first") == 3
    assert list(run.steps) == []


def test_a_stop_unwinds_the_model(x):
    done = []

    def forward(self, x):
        try:
            return self.part(x)
        finally:
            done.append("unwound")
            self.part(x)  # whatever it calls on its way out is nobody's business

    net = Calling(forward, part=linear())
    with Model(net).trace(x) as run:
        run.part.output
        run.stop()
        assert done == ["unwound"]


# ---- calls from the body


def test_modules_called_from_the_body_do_not_fire(net, x):
    with Model(net).trace(x) as run:
        run.last.output = inputs(1)
        early = run.last(run.first.output)
        assert torch.equal(early, net.last(net.first(x)))
    assert torch.equal(run.result, inputs(1))


def test_calls_from_the_body_do_not_count(net, x):
    with Model(net).trace(x) as run:
        hidden = run.layers[0].output
        for _ in range(3):
            run.layers[1](hidden), run.last(hidden), net.layers[2](hidden)
        assert torch.equal(run.layers[1].leaf.output, net.layers[1].leaf(hidden))
        assert torch.equal(run.last.output, net(x))


def test_the_whole_model_called_from_the_body(net, x):
    model = Model(net)
    with model.trace(x) as run:
        run.first.output = inputs(1)
        run.layers[0].input
        assert torch.equal(model(x), Net()(x)) and torch.equal(net(x), Net()(x))
        assert torch.equal(run.layers[0].output, net.layers[0](inputs(1)))


def test_a_logit_lens(gpt2, ids):
    with Model(gpt2).trace(ids) as run:
        lens = [run.lm_head(run.transformer.ln_f(block.output)) for block in run.transformer.h]
        logits = run.lm_head.output
    states = gpt2(ids, output_hidden_states=True).hidden_states
    plain = [gpt2.lm_head(gpt2.transformer.ln_f(state)) for state in states[1:-1]] + [gpt2.lm_head(states[-1])]
    assert all(map(torch.equal, lens, plain))
    assert torch.equal(lens[-1], logits) and torch.equal(run.result.logits, logits)


def test_the_bodys_call_of_a_skipped_module(net, x):
    with Model(net).trace(x) as run:
        run.layers[1].skip(x)
        assert torch.equal(run.layers[1](x), Net().layers[1](x))
    assert torch.equal(run.result, net.last(net.layers[2](x)))


def test_stop_in_an_invoke(net, x):
    """It ends its own pass only."""
    with Model(net).trace() as run:
        with run.invoke(x) as first:
            early = first.layers[0].output
            first.stop()
        with run.invoke(x) as second:
            second.last.input = early
    assert torch.equal(second.result, net.last(early))
    with pytest.raises(RunClosedError, match="was stopped"):
        first.result


@pytest.mark.parametrize("value", [0, 1.5, True, "zero"])
def test_what_no_module_returns_is_not_skipped_with(net, x, value):
    with pytest.raises(AssignmentError, match="the value that the module should return"), Model(net).trace(x) as run:
        run.layers[0].skip(value)
