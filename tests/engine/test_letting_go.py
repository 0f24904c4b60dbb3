"""A run keeps nothing alive that the body has let go."""

import gc
import weakref

import pytest
import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutput

from diffsight import Model, OutOfOrderError
from models.nets import Calling, inputs, linear


@pytest.fixture
def stack() -> nn.Sequential:
    return nn.Sequential(*(linear(seed) for seed in range(6)))


def then_last(inner: nn.Module, take=lambda value: value) -> nn.Module:
    """Return a net that calls `inner`, and `last` with what `take` takes of its output."""
    return Calling(lambda net, x: net.last(take(net.inner(x))), inner=inner, last=linear())


@torch.no_grad()
def test_what_was_read_is_let_go_when_the_model_moves_on(stack, x):
    gc.disable()  # nothing waits for the garbage collector
    try:
        with Model(stack).trace(x) as run:
            read = [weakref.ref(layer.output) for layer in run]
            alive = [value() is not None for value in read]
    finally:
        gc.enable()
    assert alive == [False] * 4 + [True] * 2, "only what the model itself holds where it stands"


@torch.no_grad()
def test_what_was_read_as_inputs_is_let_go(stack, x):
    with Model(stack).trace(x) as run:
        read = weakref.ref(run[2].inputs[0][0])
        run[5].output
        assert read() is None


@torch.no_grad()
def test_a_value_that_is_held_is_there_again(stack, x):
    with Model(stack).trace(x) as run:
        hidden, given = run[2].output, run[3].input
        run[5].output
        assert run[2].output is hidden and run[3].input is given is hidden


@torch.no_grad()
def test_a_value_that_was_let_go_is_an_error_at_that_line(stack, x):
    with Model(stack).trace(x) as run:
        run[2].output
        run[5].output
        with pytest.raises(
            OutOfOrderError,
            match=r"\[2\]\.output was read before, but its value was not kept.*Bind the value to a name",
        ):
            run[2].output


def test_what_the_graph_holds_is_there_again(stack, x):
    with Model(stack).trace(x) as run:
        squared = run[2].output.square()  # its gradient needs the value
        run[5].output
        assert torch.equal(run[2].output.square(), squared)


@torch.no_grad()
def test_all_of_a_tuple_has_to_be_held(x):
    inner = Calling(lambda net, x: (x + 1, {"more": [x + 2, 3]}))
    model = Model(then_last(inner, lambda output: output[0]))
    with model.trace(x) as run:
        first, rest = run.inner.output
        run.last.output
        again = run.inner.output
        assert again[0] is first and again[1]["more"][0] is rest["more"][0] and again[1]["more"][1] == 3
    with model.trace(x) as run:
        first, _ = run.inner.output
        del _
        run.last.output
        with pytest.raises(OutOfOrderError, match="its value was not kept"):
            run.inner.output
    assert torch.equal(first, x + 1)


@torch.no_grad()
def test_the_first_input_is_there_again_without_the_others(x):
    inner = Calling(lambda net, x, scale: x * scale)
    outer = Calling(lambda net, x: net.inner(x + 1, scale=x + 2), inner=inner)
    with Model(then_last(outer)).trace(x) as run:
        given = run.inner.inner.input
        run.last.output
        assert run.inner.inner.input is given
        with pytest.raises(OutOfOrderError, match="its value was not kept"):
            run.inner.inner.inputs


@torch.no_grad()
def test_an_output_object_is_there_again(x):
    inner = Calling(lambda net, x: BaseModelOutput(last_hidden_state=x + 1))
    with Model(then_last(inner, lambda output: output.last_hidden_state)).trace(x) as run:
        hidden = run.inner.output.last_hidden_state
        run.last.output
        again = run.inner.output
    assert type(again) is BaseModelOutput and again.last_hidden_state is hidden


@torch.no_grad()
def test_the_value_stays_while_the_body_calls_a_module(stack, x):
    with Model(stack).trace(x) as run:
        run[3].output
        run[1](inputs(1), hook=True)
        assert torch.equal(run[3].output, stack[:4](x)), "the model still stands there"


@torch.no_grad()
def test_the_error_names_the_value_as_it_is_written(stack, x):
    with Model(stack).trace(x) as run:
        run[0].output
        run[2].output
        with pytest.raises(OutOfOrderError, match=r"value = run\[0\]\.output$"):
            run[0].output
