"""The values of `.input`, `.inputs` and `.output`, and assigning to them."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from diffsight import DiffsightError, Model
from diffsight.errors import AssignmentError, PointNotFoundError
from helpers import footprint, outputs, record, replaced, with_input
from models.nets import Calling, inputs, linear


def test_values_are_the_models_own(net, x):
    with record(net.layers[1]) as calls, Model(net).trace(x) as run:
        given, all_given, output = run.layers[1].input, run.layers[1].inputs, run.layers[1].output
    ((args, kwargs, returned),) = calls
    assert given is args[0] and all_given == (args, kwargs) and output is returned
    assert type(output) is torch.Tensor


def test_values_equal_those_of_the_bare_call(net, x):
    with Model(net).trace(x) as run:
        values = {path: run[path].output for path in ("first", "layers.0.leaf.lin", "layers.0.leaf", "layers.2.out")}
    for path, value in values.items():
        assert torch.equal(value, outputs(net.get_submodule(path), net, x)[0])


def test_the_whole_models_values(net, x):
    with Model(net).trace(x) as run:
        assert run.input is x and run.inputs == ((x,), {})
        output = run.output
        assert torch.equal(output, net(x))
    assert run.result is output


def test_assigned_output(net, x):
    with Model(net).trace(x) as run:
        run.layers[1].output = run.layers[1].output * 2
        value = run.last.output
    with replaced(net.layers[1], lambda out: out * 2):
        expected = net(x)
    assert torch.equal(value, expected) and torch.equal(run.result, expected)
    assert not torch.equal(expected, net(x))


def test_assigned_input(net, x):
    new = inputs(1)
    with Model(net).trace(x) as run:
        run.layers[1].input
        run.layers[1].input = new
    assert torch.equal(run.result, with_input(net.layers[1], new, lambda: net(x)))


def test_assigned_output_of_the_whole_model(net, x):
    with Model(net).trace(x) as run:
        run.output = run.output + 1
    assert torch.equal(run.result, net(x) + 1)


def test_assigned_input_of_the_whole_model(net, x):
    with Model(net).trace(x) as run:
        run.input = inputs(1)
    assert torch.equal(run.result, net(inputs(1)))


@pytest.mark.parametrize("read_first", [True, False])
def test_assigned_inputs(read_first):
    scale = Calling(lambda self, x, factor=1.0, *, shift=0.0: x * factor + shift)
    net = Calling(lambda self, x: self.scale(x, 3.0, shift=1.0), scale=scale)
    x = inputs()
    with Model(net).trace(x) as run:
        if read_first:
            assert run.scale.inputs == ((x, 3.0), {"shift": 1.0})
        run.scale.inputs = ((x, 5.0), {})
    assert torch.equal(run.result, x * 5.0)


def test_input_is_the_first_keyword_where_nothing_is_positional():
    layer = Calling(lambda self, mask=None, hidden=None: hidden * mask)
    net = Calling(lambda self, x: self.layer(hidden=x, mask=2.0), layer=layer)
    x = inputs()
    with Model(net).trace(x) as run:
        assert run.layer.input is x
        assert run.layer.inputs == ((), {"hidden": x, "mask": 2.0})
        run.layer.input = x + 1
        assert torch.equal(run.layer.input, x + 1)
    assert torch.equal(run.result, (x + 1) * 2.0)


def test_input_by_keyword_assigned_ahead():
    net = Calling(lambda self, x: self.layer(input=x), layer=linear())
    with Model(net).trace(inputs()) as run:
        run.layer.input = inputs(1)
    assert torch.equal(run.result, net.layer(inputs(1)))


def test_input_by_keyword_of_gpt2(gpt2, ids):
    with Model(gpt2).trace(input_ids=ids) as run:
        assert run.input is ids
        run.input = ids + 1
    assert torch.equal(run.result.logits, gpt2(ids + 1).logits)


def test_edit_of_an_output_in_place(net, x):
    def edit(out):
        out = out.clone()
        out[:, 0] = 0
        return out

    with Model(net).trace(x) as run:
        run.layers[0].output[:, 0] = 0
    with replaced(net.layers[0], edit):
        assert torch.equal(run.result, net(x))


def test_edit_of_an_input_in_place(net, x):
    with Model(net).trace(x) as run:
        hidden = run.layers[1].input
        hidden[0] = 7
    expected = hidden.detach()
    for module in (*net.layers[1:], net.last):
        expected = module(expected)
    assert (expected - net(x)).abs().max() > 0.1 and torch.equal(run.result, expected)


def test_edit_of_the_keyword_arguments_in_place():
    layer = Calling(lambda self, x, scale=1.0: x * scale)
    net = Calling(lambda self, x: self.layer(x, scale=2.0), layer=layer)
    with Model(net).trace(inputs()) as run:
        run.layer.inputs[1]["scale"] = 5.0
    assert torch.equal(run.result, inputs() * 5.0)


def test_augmented_assignment(net, x):
    with Model(net).trace(x) as run:
        run.first.output *= 2
        run.layers[0].input += 1
        run.output -= 3
    expected = net.first(x) * 2 + 1
    for layer in net.layers:
        expected = layer(expected)
    assert torch.equal(run.result, net.last(expected) - 3)


def test_reading_again_gives_the_same_with_every_edit(net, x):
    new = inputs(1)
    with Model(net).trace(x) as run:
        first = run.first.output
        assert run.first.output is first
        run.first.output[0] = 0
        assert run.first.output is first and not first[0].any()
        run.first.output = new
        assert run.first.output is new
        run.first.output[1] = 5
        run.last.output
        assert run.first.output is new and (new[1] == 5).all()
    expected = new
    for module in (*net.layers, net.last):
        expected = module(expected)
    assert torch.equal(run.result, expected)


def test_reading_the_input_again_after_the_call(net, x):
    with Model(net).trace(x) as run:
        before = run.layers[1].input
        run.layers[1].input = replacement = before + 1
        run.layers[1].output, run.last.output
        assert run.layers[1].input is replacement
        assert run.layers[1].inputs == ((replacement,), {})


def test_a_tuple_can_be_edited_and_replaced():
    pair = Calling(lambda self, x: (x, x * 2))
    net = Calling(lambda self, x: sum(self.pair(x)), pair=pair)
    x = inputs()
    with Model(net).trace(x.clone()) as edited:
        edited.pair.output[1][:] = 0
    assert torch.equal(edited.result, x)
    with Model(net).trace(x) as swapped:
        first, second = swapped.pair.output
        swapped.pair.output = (first, second + 1)
    assert torch.equal(swapped.result, x + (x * 2 + 1))


@pytest.mark.parametrize("value", [0, False, "", (), {}, SimpleNamespace(a=1)], ids=repr)
def test_values_of_any_kind_pass(value):
    odd = Calling(lambda self, x: value)
    net = Calling(lambda self, x: (self.odd(x),), odd=odd)
    with Model(net).trace(1) as run:
        assert run.odd.output is value
    assert run.result == (value,)
    with Model(Calling(lambda self, x: (self.odd(x),), odd=Calling(lambda self, x: 5))).trace(1) as run:
        run.odd.output = value
    assert run.result == (value,)


def test_a_module_that_returns_nothing():
    noted = []
    net = Calling(lambda self, x: (self.note(x), x)[1], note=Calling(lambda self, x: noted.append(x)))
    with Model(net).trace(4) as run:
        assert run.note.output is None
        assert run.output == 4
    assert noted == [4]


def test_output_objects_keep_their_class(gpt2, ids):
    with Model(gpt2).trace(ids) as run:
        output = run.transformer.output
        assert type(output).__name__ == "BaseModelOutputWithPastAndCrossAttentions"
        output.last_hidden_state[:] = 0
    assert torch.equal(run.result.logits, gpt2.lm_head(torch.zeros(1, 3, 16)))


def test_edits_reach_hooks_that_were_there_before(net, x):
    with record(net.layers[0]) as calls, Model(net).trace(x) as run:
        run.layers[0].output = torch.ones(2, 4)
        run.layers[0].input = torch.zeros(2, 4)
    ((args, _, out),) = calls
    assert torch.equal(out, torch.ones(2, 4))
    assert torch.equal(args[0], torch.zeros(2, 4))


def test_edits_reach_the_hidden_states_that_transformers_collects(gpt2, ids):
    new = torch.full((1, 3, 16), 0.5)
    with Model(gpt2).trace(ids, output_hidden_states=True) as run:
        run.transformer.h[0].output = new
    assert torch.equal(run.result.hidden_states[1], new)
    assert torch.equal(run.result.hidden_states[2], gpt2.transformer.h[1](new))


def test_the_input_is_what_the_forward_pass_gets(net, x):
    handle = net.last.register_forward_pre_hook(lambda module, args: (args[0] * 10,))
    with record(net.last) as calls, Model(net).trace(x) as run:
        given = run.last.input
    assert given is calls[0][0][0]
    assert torch.equal(run.result, torch.nn.functional.linear(given, net.last.weight, net.last.bias))
    handle.remove()


def test_edits_by_blocks_of_gpt2(gpt2, ids):
    with Model(gpt2).trace(ids) as run:
        run.transformer.h[1].attn.output[0][:, -1] = 0
        run.transformer.h[2].mlp.c_fc.input = run.transformer.h[1].mlp.c_fc.input

    kept = {}

    def keep(module, args):
        kept["input"] = args[0]

    def silence(module, args, out):
        out[0][:, -1] = 0

    block_1, block_2 = gpt2.transformer.h[1:]
    handles = [
        block_1.attn.register_forward_hook(silence),
        block_1.mlp.c_fc.register_forward_pre_hook(keep),
        block_2.mlp.c_fc.register_forward_pre_hook(lambda module, args: kept["input"]),
    ]
    expected = gpt2(ids).logits
    for handle in handles:
        handle.remove()
    assert torch.equal(run.result.logits, expected)
    assert not torch.equal(expected, gpt2(ids).logits)


def test_children_that_are_called_like_values():
    """BERT has modules named `output`; they are reached by name in brackets."""
    from transformers import BertConfig, BertModel

    config = BertConfig(vocab_size=61, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16)
    bert = BertModel(config).eval()
    ids = torch.tensor([[1, 2, 3]])
    with Model(bert).trace(ids) as run:
        dense = run.encoder.layer[1]["output"].dense.output
        block = run.encoder.layer[1].output
    assert torch.equal(dense, outputs(bert.encoder.layer[1].output.dense, bert, ids)[0])
    assert torch.equal(block, outputs(bert.encoder.layer[1], bert, ids)[0])


def test_what_cannot_be_assigned(net, x):
    before = footprint(net)
    with Model(net).trace(x) as run:
        with pytest.raises(AssignmentError, match=r"first\.output"):
            run.first.output = None
        for wrong in (x, (x,), ([x], {}), ((x,), None)):
            with pytest.raises(AssignmentError, match=r"first\.inputs"):
                run.first.inputs = wrong
        with pytest.raises(PointNotFoundError, match=r"first\.outputs.*'output'"):
            run.first.outputs = x
        with pytest.raises(PointNotFoundError, match="weight"):
            run.first.weight = x
        with pytest.raises(PointNotFoundError):
            run.first = x
    assert torch.equal(run.result, net(x))
    assert footprint(net) == before


def test_a_call_without_arguments_has_no_input():
    net = Calling(lambda self, x: x + self.silent(), silent=Calling(lambda self: 1))
    with Model(net).trace(1) as run:
        assert run.silent.inputs == ((), {})
        with pytest.raises(DiffsightError, match=r"silent\.input"):
            run.silent.input
        assert run.silent.output == 1
    assert run.result == 2


def test_a_call_without_arguments_can_be_given_some():
    net = Calling(lambda self, x: x + self.silent(), silent=Calling(lambda self, y=1: y))
    with Model(net).trace(1) as run:
        run.silent.inputs = ((), {"y": 5})
    assert run.result == 6


def test_gradients_are_plain_pytorch(net, x):
    with Model(net).trace(x) as run:
        hidden = run.layers[1].output
        hidden.retain_grad()
        run.result.sum().backward()
    kept = []
    with replaced(net.layers[1], lambda out: (out.retain_grad(), kept.append(out))[0]):
        net(x).sum().backward()
    assert torch.equal(hidden.grad, kept[0].grad) and hidden.grad.any()


def test_gradients_while_the_model_waits(net, x):
    with Model(net).trace(x) as run:
        hidden = run.layers[1].output
        (early,) = torch.autograd.grad(hidden.sum(), net.first.weight, retain_graph=True)
        run.layers[1].output = hidden + early.mean()
    run.result.sum().backward()
    states = outputs(net.layers[1], net, x)
    assert torch.equal(early, torch.autograd.grad(states[0].sum(), net.first.weight)[0])
    assert net.first.weight.grad.any()


def test_a_module_reached_through_a_dictionary_of_modules():
    class Holding(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = nn.ModuleDict({"one": linear(1), "two": nn.ModuleList([linear(2)])})

        def forward(self, x):
            return self.parts["two"][0](self.parts["one"](x))

    net = Holding()
    with Model(net).trace(inputs()) as run:
        one, two = run.parts["one"].output, run.parts.two[0].output
    assert torch.equal(one, net.parts["one"](inputs())) and torch.equal(two, net(inputs()))
