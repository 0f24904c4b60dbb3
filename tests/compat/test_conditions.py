"""`cond`: Conditional Interventions in nnsight's walkthrough and in the guide to 0.3; conditionals.ipynb."""

import pytest
import torch

import diffsight.compat as nnsight
from compat.constants import HIDDEN_DIMS


@pytest.mark.parametrize("number", [-3, 4, 5])
def test_conditions(tiny_model, net, input, number, capsys):
    with tiny_model.trace(input) as tracer:
        rand_int = torch.tensor([number])
        with tracer.cond(rand_int % 2 == 0):
            tracer.log("Even")
        with nnsight.cond(rand_int % 2 == 1):
            tracer.log("Odd")
        with tracer.cond(number > 0):
            with tracer.cond(number % 2 == 0):
                tracer.apply(print, "Positive and even")
        if rand_int % 2 == 0:
            tracer.log("if even")
        elif rand_int % 2 == 1:
            tracer.log("if odd")
        with tracer.cond(torch.all(tiny_model.layer1.output != 1)):
            tiny_model.layer1.output[:] = number
    told = ["Even", "Positive and even", "if even"] if number == 4 else ["Odd", "if odd"]
    assert capsys.readouterr().out.splitlines() == told
    assert torch.equal(tracer.result, net.layer2(torch.full((1, HIDDEN_DIMS), float(number))))


def test_cond_needs_a_single_truth_value(tiny_model, input):
    with pytest.raises(RuntimeError, match="more than one value is ambiguous"):
        with tiny_model.trace(input) as tracer:
            with tracer.cond(tiny_model.layer1.output != 1):
                pass
