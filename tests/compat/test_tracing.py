"""`trace`: reading and setting values, functions, gradients, stopping early.

The sections are those of nnsight's walkthrough.
"""

import pytest
import torch

import diffsight.compat as nnsight
from compat.constants import HIDDEN_DIMS, OUTPUT_SIZE
from diffsight.compat import Envoy, NNsight
from diffsight.errors import NoRunError, OutOfOrderError
from helpers import footprint, outputs

# ---- Tracing Context, Getting


def test_tracing_context(tiny_model, net, input):
    with tiny_model.trace(input) as tracer:
        pass
    assert torch.equal(tracer.result, net(input)) and torch.equal(tracer.output, net(input))


def test_getting(tiny_model, net, input):
    with tiny_model.trace(input) as tracer:
        l1_output = tiny_model.layer1.output.save()
        l2_input = tiny_model.layer2.input.save()
        output = tiny_model.output.save()
        tracer.log("Layer 1 - out: ", tiny_model.layer1.output)
    hidden = net.layer1(input)
    assert torch.equal(l1_output, hidden) and torch.equal(l2_input, hidden) and torch.equal(output, net(input))
    assert repr(tiny_model) == repr(net) and isinstance(tiny_model.layer1, Envoy)


def test_outside_a_run(tiny_model):
    for ask in (
        lambda: tiny_model.output,
        lambda: tiny_model.layer1.next(),
        lambda: tiny_model.layer1.all(),
        lambda: tiny_model.generator,
    ):
        with pytest.raises(NoRunError):
            ask()


def test_log(tiny_model, net, input, capsys):
    with tiny_model.trace(input) as tracer:
        tracer.log("Layer 1 - out: ", tiny_model.layer1.output.shape)
        nnsight.log("out", 5)
    assert capsys.readouterr().out == "Layer 1 - out:  torch.Size([1, 10])\nout 5\n"


def test_without_a_trace(tiny_model, net, input):
    """Walkthrough: Getting, `trace=False`."""
    assert torch.equal(tiny_model.trace(input, trace=False), net(input))


# ---- Functions, Methods, and Operations; Custom Functions


def test_operations(tiny_model, net, input):
    with tiny_model.trace(input):
        l1_output = tiny_model.layer1.output
        l1_amax = torch.argmax(l1_output, dim=1).save()
        value = (tiny_model.layer1.output.sum() + tiny_model.layer2.output.sum()).save()
    assert torch.equal(l1_amax, net.layer1(input).argmax(1)) and value == net.layer1(input).sum() + net(input).sum()


def test_custom_functions(tiny_model, net, input):
    def tensor_sum(tensor):
        total = 0
        for element in tensor.flatten():
            total += element.item()
        return torch.tensor(total)

    with tiny_model.trace(input) as tracer:
        custom_sum = nnsight.apply(tensor_sum, tiny_model.layer1.output).save()
        again = tracer.apply(tensor_sum, tiny_model.layer1.output)
        sum = tiny_model.layer1.output.sum()
        sum.save()
    assert torch.equal(custom_sum, tensor_sum(net.layer1(input))) and torch.equal(again, custom_sum)
    assert torch.equal(sum, net.layer1(input).sum())


# ---- Setting; Scan and Validate


def test_setting(tiny_model, net, input):
    with tiny_model.trace(input) as tracer:
        l1_output_before = tiny_model.layer1.output.clone().save()
        tiny_model.layer1.output[:, HIDDEN_DIMS - 1] = 0
        l1_output_after = tiny_model.layer1.output.save()
    expected = net.layer1(input)
    assert torch.equal(l1_output_before, expected)
    expected[:, -1] = 0
    assert torch.equal(l1_output_after, expected) and torch.equal(tracer.result, net.layer2(expected))


@pytest.mark.parametrize("checks", [{}, {"scan": True, "validate": True}])
def test_setting_an_index_out_of_range(tiny_model, net, input, checks):
    before = footprint(net)
    with pytest.raises(IndexError, match="out of bounds"), tiny_model.trace(input, **checks):
        tiny_model.layer1.output[:, HIDDEN_DIMS] = 0
    assert footprint(net) == before


def test_scanning(tiny_model, input):
    """Walkthrough: Scan and Validate; scan_validate.ipynb; guide to 0.3: Scanning."""
    with tiny_model.scan(input):
        dim = tiny_model.layer1.output.shape[-1]
    assert dim == HIDDEN_DIMS


# ---- Gradients; gradients.ipynb


def test_gradients(tiny_model, net, input):
    """As in the guide, with `.grad` after `backward()`."""
    with tiny_model.trace(input):
        layer1 = tiny_model.layer1.output
        layer1.requires_grad = True
        layer2 = tiny_model.layer2.output
        layer2.retain_grad()
        loss = tiny_model.output.sum()
        loss.backward()
        layer1_output_grad = layer1.grad.save()
        layer2_output_grad = layer2.grad.save()
    assert torch.equal(layer1_output_grad, net.layer2.weight.sum(0, keepdim=True))
    assert torch.equal(layer2_output_grad, torch.ones(1, OUTPUT_SIZE))


def test_gradients_before_backward(tiny_model, net, input):
    """Walkthrough: Gradients, both cells."""
    with tiny_model.trace(input):
        tiny_model.layer1.output.requires_grad = True
        layer1_output_grad = tiny_model.layer1.output.grad.save()
        layer2_output_grad = tiny_model.layer2.output.grad.save()
        loss = tiny_model.output.sum()
        loss.backward()
    assert torch.equal(layer1_output_grad.value, net.layer2.weight.sum(0, keepdim=True))
    assert torch.equal(layer2_output_grad, torch.ones(1, OUTPUT_SIZE))
    with tiny_model.trace(input):
        tiny_model.layer1.output.requires_grad = True
        tiny_model.layer1.output.grad[:] = 0
        tiny_model.layer2.output.grad = tiny_model.layer2.output.grad * 2
        layer1_output_grad = tiny_model.layer1.output.grad.save()
        layer2_output_grad = tiny_model.layer2.output.grad.save()
        loss = tiny_model.output.sum()
        loss.backward()
    assert torch.equal(layer1_output_grad, torch.zeros(1, HIDDEN_DIMS))
    assert torch.equal(layer2_output_grad, torch.full((1, OUTPUT_SIZE), 2.0))


@pytest.mark.parametrize("line", ["hidden.grad.save()", "hidden.grad.clone()", "hidden.grad[:] = 0"])
def test_values_without_gradients(tiny_model, input, line):
    with pytest.raises((AttributeError, TypeError)) as caught, tiny_model.trace(input):
        hidden = tiny_model.layer1.output
        if line == "hidden.grad.save()":
            hidden.grad.save()
        elif line == "hidden.grad.clone()":
            hidden.grad.clone()
        else:
            hidden.grad[:] = 0
    assert "This value has no gradient" in caught.value.__notes__[0]


def test_setting_gradients(llm, gpt2, ids):
    """gradients.ipynb, the third cell, with `register_hook`."""
    with llm.trace(ids):
        hidden_states = llm.transformer.h[1].output.save()
        hidden_states.retain_grad()
        early = llm.transformer.h[-1].output
        early.register_hook(lambda gradient: gradient * 0)
        llm.output.logits.sum().backward()
    assert torch.equal(hidden_states.grad, torch.zeros_like(hidden_states))
    gpt2.zero_grad()


# ---- Early Stopping; early_stopping.ipynb


def test_early_stopping(tiny_model, net, input):
    reached = []
    with tiny_model.trace(input):
        l1_out = tiny_model.layer1.output.save()
        tiny_model.layer1.output.stop()
        reached.append("behind")
    assert torch.equal(l1_out, net.layer1(input)) and reached == []
    with tiny_model.trace(input) as tracer:
        l1_out = tiny_model.layer1.output
        tracer.stop()
        reached.append("behind")
    with pytest.raises(OutOfOrderError), tiny_model.trace(input):
        tiny_model.layer2.output.save()
        tiny_model.layer1.output.stop()
    assert torch.equal(l1_out, net.layer1(input)) and reached == []


def test_stop_ends_the_invoke_around_it(llm, gpt2, ids):
    with llm.trace() as tracer:
        with tracer.invoke(ids):
            hidden_states = llm.transformer.h[0].output.save()
            hidden_states.stop()
            raise AssertionError("stopped")
        with tracer.invoke(ids):
            logits = llm.lm_head.output.save()
    assert torch.equal(hidden_states, outputs(gpt2.transformer.h[0], gpt2, ids)[0])
    assert torch.equal(logits, gpt2(ids).logits)
    open_run = llm.trace(ids)
    open_run.transformer.h[0].output
    open_run.stop()
    assert "stopped" in repr(open_run)


def test_stopping_a_scan_ends_its_mode(tiny_model, net, input):
    """In the block of a scan, calculations yield shapes; after it they do not."""
    with tiny_model.scan(input):
        assert tiny_model.layer1.output.shape == (1, HIDDEN_DIMS)
        nnsight.stop()
    assert torch.overrides._get_current_function_mode_stack() == []


def test_a_subclass_of_a_model(net, input):
    class Study(NNsight):
        def hidden(self, x):
            with self.trace(x) as tracer:
                return tracer.layer1.output.save()

    assert torch.equal(Study(net).hidden(input), net.layer1(input))
