"""`run.at`: a part of the tensor at a point. `run.backward`: gradients of a loss."""

import pytest
import torch

from diffsight import Model, OutOfOrderError
from diffsight.errors import InputError, PointNotFoundError
from helpers import outputs, refusal, replaced

LAST = (slice(None), -1)


@pytest.fixture
def model(net) -> Model:
    return Model(net)


def test_a_part_is_what_the_index_takes(model, net, x):
    (expected,) = outputs(net.layers[1], net, x)
    with model.trace(x) as run:
        found = [run.at("layers[1].output", index) for index in (LAST, 0, ..., expected[:, 0] > 0)]
    assert all(map(torch.equal, found, [expected[LAST], expected[0], expected, expected[expected[:, 0] > 0]]))


def test_a_change_in_place_reaches_the_model(model, net, x):
    with model.trace(x) as run:
        run.at("layers[1]", LAST)[:] = 3

    def edit(output):
        output = output.clone()
        output[LAST] = 3
        return output

    with replaced(net.layers[1], edit):
        assert torch.equal(run.result, net(x))


def test_bad_parts(model, x):
    with model.trace(x) as run:
        assert "not a pattern" in refusal(run.at, "layers[*]", 0)
        with pytest.raises(PointNotFoundError):
            run.at("layers[9]", 0)
        assert "does not fit" in refusal(run.at, "layers[0].output", (0, 0, 0, 0, 0))
        with pytest.raises(InputError, match="takes a part of a tensor"):
            run.at("layers[0].inputs", 0)
        run.layers[1].output
        with pytest.raises(OutOfOrderError):
            run.at("layers[0].leaf.output", 0)


def test_backward_is_that_of_the_loss(model, x):
    with model.trace(x, grad=True) as run:
        hidden = run.layers[0].output
        loss = run.layers[1].output.sum()
        (expected,) = torch.autograd.grad(loss, hidden, retain_graph=True)
        hidden.retain_grad()
        run.backward(loss)
    assert torch.equal(hidden.grad, expected)
