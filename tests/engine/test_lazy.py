"""A run does nothing before a value is asked for, runs only as far as that value, and adds nothing elsewhere."""

import torch

from diffsight import Model
from helpers import footprint
from models.nets import Net, inputs


def test_nothing_runs_before_the_first_value(net, x):
    run = Model(net).trace(x)
    repr(run), dir(run), run.layers[1], run.steps
    run.last.output = torch.zeros(2, 4)
    assert net.log == []
    run.first.output
    assert net.log == ["first"]


def test_the_model_goes_as_far_as_it_is_asked(net, x):
    with Model(net).trace(x) as run:
        assert net.log == []
        run.layers[1].leaf.output
        assert net.log == ["first", "layers[0]", "layers[1]"]
        run.layers[1].output
        assert net.log == ["first", "layers[0]", "layers[1]"]
    assert net.log == ["first", "layers[0]", "layers[1]", "layers[2]", "last"]


def test_the_end_of_the_block_runs_the_model(net, x):
    with Model(net).trace(x) as run:
        assert net.log == []
    assert net.log[-1] == "last"
    assert torch.equal(run.result, net(x))


def test_a_run_without_a_block_is_a_future(net, x):
    run = Model(net).trace(x)
    assert net.log == []
    result = run.result
    assert torch.equal(result, Net()(x))
    assert run.result is result and run.finish() is result
    assert net.log.count("last") == 1


def test_a_result_asked_for_in_the_block(net, x):
    with Model(net).trace(x) as run:
        run.first.output
        result = run.result
        assert net.log[-1] == "last"
    assert run.result is result and torch.equal(result, net(x))


def test_a_run_left_open_is_finished_later(net, x):
    run = Model(net).trace(x)
    run.layers[0].output[:] = 0
    assert net.log[-1] == "layers[0]"
    result = run.finish()
    assert torch.equal(result, net.last(net.layers[2](net.layers[1](torch.zeros(2, 4)))))


def test_a_value_of_a_run_that_is_not_kept(net, x):
    assert torch.equal(Model(net).trace(x).first.output, net.first(x))
    assert net.log == ["first"]


def test_calling_the_model_calls_it(net, x):
    model = Model(net)
    assert torch.equal(model(x), net(x))
    assert torch.equal(model.first(x), net.first(x))


def test_arguments_go_to_the_module_as_they_are():
    seen = []

    class Taking(torch.nn.Module):
        def forward(self, *args, **kwargs):
            seen.append((args, kwargs))
            return 1

    model = Model(Taking())
    assert model.trace(1, model=2, run=None).result == 1
    with model.trace((3,), x=[4]) as run:
        assert run.inputs == (((3,),), {"x": [4]})
    assert seen == [((1,), {"model": 2, "run": None}), (((3,),), {"x": [4]})]


def test_an_unread_run_has_no_hooks_at_all_while_it_runs(x):
    seen = []

    class Looking(Net):
        def forward(self, x):
            seen.append(footprint(self))
            return super().forward(x)

    net = Looking()
    clean = footprint(net)
    with Model(net, methods=["generate"]).trace(x) as run:
        pass
    assert seen == [clean]
    assert torch.equal(run.result, net(x))


def test_reading_changes_no_bit_and_no_random_number():
    net = torch.nn.Sequential(torch.nn.Linear(4, 64), torch.nn.Dropout(0.5), torch.nn.Linear(64, 4)).train()
    torch.manual_seed(3)
    expected = net(inputs()), torch.rand(())
    torch.manual_seed(3)
    with Model(net).trace(inputs()) as unread:
        pass
    assert torch.equal(unread.result, expected[0]) and torch.equal(torch.rand(()), expected[1])
    torch.manual_seed(3)
    with Model(net).trace(inputs()) as read:
        for layer in read[:]:
            layer.input, layer.output
    assert torch.equal(read.result, expected[0]) and torch.equal(torch.rand(()), expected[1])


def test_gpt2_gives_the_same_bits(gpt2, ids, greedy):
    model = Model(gpt2)
    expected = gpt2(ids).logits
    with model.trace(ids) as unread:
        pass
    with model.trace(ids) as read:
        hidden = [block.output for block in read.transformer.h]
    assert torch.equal(unread.result.logits, expected)
    assert torch.equal(read.result.logits, expected)
    plain = gpt2(ids, output_hidden_states=True).hidden_states
    assert all(map(torch.equal, hidden[:-1], plain[1:-1]))  # the last of transformers' is behind ln_f
    assert torch.equal(model.generate(ids, **greedy).result, gpt2.generate(ids, **greedy))
