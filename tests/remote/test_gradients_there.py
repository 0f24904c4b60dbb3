"""Gradients in a run on a server: what is computed there, here, and back and forth."""

import pytest
import torch

from helpers import refusal

IDS = torch.tensor([[5, 17, 42, 8]])


def of_a_value(model):
    with model.trace(IDS, grad=True) as run:
        first, hidden = run.layers_output[0], run.layers_output[1]
        first.retain_grad(), hidden.retain_grad()
        run.backward(run.logits[0, -1, 5])
    return first.grad, hidden.grad


def of_a_loss_here(model):
    weight = torch.ones(16, requires_grad=True)
    with model.trace(IDS, grad=True) as run:
        hidden = run.layers_output[0]
        hidden.retain_grad()
        last = run.layers_output[2]
        run.backward((last * weight).sum() + hidden.square().sum())
    return hidden.grad, weight.grad


def through_an_assignment(model):
    direction = torch.ones(16, requires_grad=True)
    with model.trace(IDS, grad=True) as run:
        hidden = run.layers_output[0]
        hidden.retain_grad()
        run.layers_output[0] = hidden * 2 + direction
        middle = run.layers_output[1]
        middle.retain_grad()
        run.layers_output[1] = middle * direction
        run.backward(run.logits.square().mean())
    return hidden.grad, middle.grad, direction.grad


def twice(model):
    with model.trace(IDS, grad=True) as run:
        hidden = run.layers_output[1]
        hidden.retain_grad()
        logits = run.logits
        run.backward(logits[0, -1, 5])
        run.backward(logits[0, -1, 7])
    return (hidden.grad,)


@pytest.mark.parametrize(
    "body", [of_a_value, of_a_loss_here, through_an_assignment, twice], ids=lambda one: one.__name__
)
def test_the_same_gradients(body, language, remote_language):
    for expected, found in zip(body(language), body(remote_language)):
        assert found is not None and torch.allclose(expected, found, rtol=1e-5, atol=1e-6)


def test_backward_without_the_server_is_an_error(remote_language):
    with remote_language.trace(IDS, grad=True) as run:
        hidden, logits = run.layers_output[1], run.logits
        assert "run.backward(loss)" in refusal(logits.sum().backward)
        (gradient,) = torch.autograd.grad(hidden.square().sum(), hidden)  # all of this graph is here
        run.backward(logits.sum())
    assert torch.equal(gradient, 2 * hidden) and hidden.grad is not None


def test_what_has_no_gradients(remote_language):
    with remote_language.trace(IDS) as run:
        assert "grad=True" in refusal(run.backward, run.logits.sum())
    with remote_language.trace(IDS, grad=True) as run:
        assert "one element" in refusal(run.backward, run.logits)
