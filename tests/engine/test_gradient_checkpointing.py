"""Gradients of a run of a model with gradient checkpointing are those of the same run without it, or an error."""

import copy
import functools

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)
from transformers import LlamaConfig, LlamaForCausalLM

from diffsight import DiffusionModel, LanguageModel, Model
from diffsight.errors import DiffsightError
from models import diffusion


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.dropout = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Dropout(0.5)

    def forward(self, x):
        return self.c(self.dropout(torch.sin(self.b(torch.sin(self.a(torch.sin(x)))))))


class Net(nn.Module):
    """Two blocks; `wrap` is called with each, and `wrap_all` with the two in one."""

    wrap = wrap_all = staticmethod(lambda function, x: function(x))

    def __init__(self):
        super().__init__()
        self.first, self.second = Block(), Block()

    def forward(self, x):
        return self.wrap_all(self.both, x)

    def both(self, x):
        return self.wrap(self.second, self.wrap(self.first, x)).exp()


def _policy(_, op, *args, **kwargs):
    saves = op is torch.ops.aten.addmm.default
    return CheckpointPolicy.MUST_SAVE if saves else CheckpointPolicy.PREFER_RECOMPUTE


PLAIN = functools.partial(checkpoint, use_reentrant=False)
SELECTIVE = functools.partial(PLAIN, context_fn=functools.partial(create_selective_checkpoint_contexts, _policy))
WHOLE = functools.partial(PLAIN, early_stop=False)


def assigned_ahead(model, run):
    run.second.b.output = run.first.b.output * 3


def assigned_input(model, run):
    run.first.b.input = run.first.b.input * 3


def in_place(model, run):
    run.second.b.output[:, 0] = 0
    run.second.c.input[:, 1] *= 2


def rows(model, run):
    x, y, _ = run.rows
    y.first.b.output = x.first.b.output


def skipped(model, run):
    run.first.dropout.skip(run.first.b.output)


def each(model, run):
    def body(row):
        row.first.b.output = row.first.b.output * (row.index + 1)
        row.second.a.output[:, 0] = 0

    run.each(body)


def followed(model, run):
    run.follow("first.b.output", lambda value: value.mul_(2))


def only_read(model, run):
    run.first.b.output, run.second.c.input


def random_numbers_of_the_body(model, run):
    run.first.b.output = run.first.b.output + torch.randn(3, 4)
    run.second.a.output, torch.randn(7)


def gradients_edited(model, run):
    run.first.b.output.register_hook(lambda gradient: gradient * 3)
    run.second.c.output.register_hook(lambda gradient: gradient * 2)


def a_loss_on_the_way(model, run):
    run.first.b.output.square().sum().backward(retain_graph=True)
    run.second.a.output = run.second.a.output * 2


def called_in_the_body(model, run):
    run.first.b.output = run.first.c(run.first.b.output)


BODIES = [
    assigned_ahead,
    assigned_input,
    in_place,
    rows,
    skipped,
    each,
    followed,
    only_read,
    random_numbers_of_the_body,
    gradients_edited,
    a_loss_on_the_way,
    called_in_the_body,
]


def gradients(net, x, body, outside=False):
    """The gradients of a run, computed in its body or after it."""
    torch.manual_seed(1)
    net.zero_grad()
    x = x.clone().requires_grad_()
    with Model(net).trace(x, grad=True) as run:
        body(Model(net), run)
        if not outside:
            run.output.square().sum().backward()
    if outside:
        run.result.square().sum().backward()
    return [x.grad, *(parameter.grad for parameter in net.parameters())]


def alike(got, expected):
    return all(
        (a is b is None) or torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(got, expected, strict=True)
    )


@pytest.fixture
def plain():
    torch.manual_seed(0)
    return Net(), torch.randn(3, 4)


@pytest.mark.parametrize("outside", [False, True], ids=["in the body", "after it"])
@pytest.mark.parametrize("kind", ["blocks", "whole", "nested", "selective", "not stopped early"])
@pytest.mark.parametrize("body", BODIES, ids=lambda body: body.__name__)
def test_gradients_are_those_without_checkpointing(plain, body, kind, outside):
    if body is a_loss_on_the_way and kind == "selective":
        pytest.skip("PyTorch computes such a region again only once")
    net, x = plain
    expected = gradients(copy.deepcopy(net), x, body, outside)
    if kind in ("blocks", "nested"):
        net.wrap = PLAIN
    if kind != "blocks":
        net.wrap_all = {"selective": SELECTIVE, "not stopped early": WHOLE}.get(kind, PLAIN)
    assert alike(gradients(net, x, body, outside), expected)


def test_edits_that_stay_on_the_model(plain):
    net, x = plain

    def edit(run):
        run.first.b.output = run.first.b.output * 3

    def gradient(net):
        net.zero_grad()
        Model(net).edit(edit).trace(x, grad=True).result.sum().backward()
        return [parameter.grad.clone() for parameter in net.parameters()]

    net.eval()
    expected = gradient(net)
    net.wrap = PLAIN
    assert alike(gradient(net), expected)


def test_gradients_of_gradients(plain):
    net, x = plain
    net.eval()

    def second(net):
        start = x.clone().requires_grad_()
        with Model(net).trace(start) as run:
            run.first.b.output = run.first.b.output * 3
        (slope,) = torch.autograd.grad(run.result.sum(), start, create_graph=True)
        return torch.autograd.grad(slope.square().sum(), [*net.first.parameters()], allow_unused=True)

    expected = second(net)
    net.wrap = PLAIN
    got = second(net)
    assert alike(got, expected)


def test_what_a_run_leaves_alone_is_still_checkpointed(plain):
    net, x = plain
    net.wrap, calls = PLAIN, []
    net.second.a.register_forward_hook(lambda *_: calls.append(1))
    with Model(net).trace(x, grad=True) as run:
        run.first.output = run.first.output * 2
    run.result.sum().backward()
    assert len(calls) == 2  # in the forward pass, and when it is computed again


def test_a_saved_value_that_is_changed_in_place_is_an_error_as_without_checkpointing(plain):
    net, x = plain
    net.wrap = PLAIN
    with Model(net).trace(x, grad=True) as run:
        run.first.b.output
        kept = run.first.c.input  # saved for the gradient of the weights
    with torch.no_grad():
        kept.zero_()
    with pytest.raises(RuntimeError, match="modified"):
        run.result.sum().backward()


REENTRANT = functools.partial(checkpoint, use_reentrant=True)


def read(run):
    run.first.b.output


def assign(run):
    run.first.b.output = torch.zeros(3, 4)


def skip(run):
    run.first.b.skip(torch.zeros(3, 4))


@pytest.mark.parametrize("body", [read, assign, skip], ids=["read", "assigned", "skipped"])
def test_reentrant_checkpointing_is_refused(plain, body):
    net, x = plain
    net.wrap = REENTRANT
    with pytest.raises(DiffsightError, match=r"first.b.* lies in a region that backward.* use_reentrant=False"):
        with Model(net).trace(x.requires_grad_()) as run:
            body(run)


def test_reentrant_checkpointing_around_the_point_of_a_region_or_without_gradients(plain):
    net, x = plain
    net.eval()
    start = x.clone().requires_grad_()
    with torch.no_grad():
        hidden = net.first.b(torch.sin(net.first.a(torch.sin(x))))
    net.wrap = REENTRANT
    with torch.no_grad(), Model(net).trace(start) as run:
        assert torch.equal(run.first.b.output, hidden)
    with Model(net).trace(x) as run:  # nothing asks for a gradient
        assert torch.equal(run.first.b.output, hidden)


class WithAnotherName(torch.autograd.Function):
    """Reentrant checkpointing as users write it."""

    @staticmethod
    def forward(context, function, x):
        context.function = function
        context.save_for_backward(x)
        return function(x)

    @staticmethod
    def backward(context, given):
        x = context.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            torch.autograd.backward(context.function(x), given)
        return None, x.grad


class WithSetUp(torch.autograd.Function):
    """The same, with the context set up apart."""

    @staticmethod
    def forward(function, x):
        return function(x)

    @staticmethod
    def setup_context(context, inputs, output):
        context.function = inputs[0]
        context.save_for_backward(inputs[1])

    backward = WithAnotherName.backward


@pytest.mark.parametrize("function", [WithAnotherName, WithSetUp])
def test_checkpointing_functions_of_users_are_refused(plain, function):
    net, x = plain
    net.wrap = function.apply
    with pytest.raises(DiffsightError, match=r"second.b.output.* lies in a region that backward"):
        with Model(net).trace(x.requires_grad_()) as run:
            run.second.b.output = torch.zeros(3, 4)
    with Model(net).trace(x.detach()) as run:  # nothing asks for a gradient
        run.first.b.output = torch.zeros(3, 4)


@pytest.mark.parametrize("wrap", [REENTRANT, WithAnotherName.apply])
def test_a_region_in_which_the_model_enables_gradients_is_refused(plain, wrap):
    net, x = plain
    net.wrap_all = torch.enable_grad()(lambda both, x: both(x.detach().requires_grad_()))
    net.wrap = wrap
    with pytest.raises(DiffsightError, match=r"first.b.output.* lies in a region that backward"):
        with torch.no_grad(), Model(net).trace(x) as run:
            run.first.b.output = torch.zeros(3, 4)


def test_checkpointing_of_transformers():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2
    )
    net, ids = LlamaForCausalLM(config).train(), torch.arange(2, 12)[None]

    def gradient():
        net.zero_grad()
        with LanguageModel(net).trace(ids, use_cache=False, grad=True) as run:
            run.attentions_output[1] = run.attentions_output[1] * 3
            run.output.logits.pow(2).mean().backward()
        return [parameter.grad.clone() for parameter in net.parameters()]

    expected = gradient()
    net.gradient_checkpointing_enable({"use_reentrant": False})
    assert alike(gradient(), expected)


def test_checkpointing_of_diffusers():
    chosen = diffusion.PIPELINES["stable_diffusion"]
    pipe = chosen.build()
    given = chosen.inputs() | {"output_type": "latent", "num_inference_steps": 1}
    pipe.unet.train()

    def gradient():
        pipe.unet.zero_grad()
        with DiffusionModel(pipe).generate(**given, seed=0, grad=True) as run:
            for resnet in (0, 1):
                run.unet.mid_block.resnets[resnet].conv1.output *= 2
            run.scheduler.step.input.square().mean().backward()
        return [parameter.grad.clone() for parameter in pipe.unet.parameters()]

    expected = gradient()
    pipe.unet.enable_gradient_checkpointing()
    got = gradient()
    assert max((a - b).abs().max() for a, b in zip(got, expected)) < 1e-4 * max(b.abs().max() for b in expected)
