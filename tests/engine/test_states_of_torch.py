"""What a `with` statement of PyTorch changes, in the model or in the body, does not reach the other side."""

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from diffsight import Model
from diffsight.engine import torch_state
from diffsight.errors import DiffsightError


class Net(nn.Module):
    """Calls its middle within a block of `with`, if it is given one."""

    def __init__(self, block=None):
        super().__init__()
        self.first, self.middle, self.last, self.block = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4), block

    def forward(self, x):
        x = self.first(x)
        if self.block is None:
            return self.last(self.middle(x))
        with self.block():
            x = self.middle(x)
        return self.last(x.to(torch.float32, copy=True))


class DefaultDtype:
    def __enter__(self):
        self.before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)

    def __exit__(self, *_):
        torch.set_default_dtype(self.before)


class NoTorchFunction:
    def __enter__(self):
        self.guard = torch._C.DisableTorchFunctionSubclass()
        self.guard.__enter__()

    def __exit__(self, *error):
        self.guard.__exit__(*error)


def nesting():
    torch.autocast_increment_nesting()
    return torch.autocast_decrement_nesting()


BLOCKS = {
    "the default dtype": (DefaultDtype, torch.get_default_dtype),
    "kernels of attention": (lambda: sdpa_kernel(SDPBackend.MATH), torch.backends.cuda.flash_sdp_enabled),
    "the mathematical kernel": (
        lambda: sdpa_kernel(SDPBackend.FLASH_ATTENTION),
        torch.backends.cuda.math_sdp_enabled,
    ),
    "torch functions of subclasses": (NoTorchFunction, torch._C._is_torch_function_enabled),
    "autocast": (lambda: torch.autocast("cpu", torch.bfloat16), lambda: torch.is_autocast_enabled("cpu")),
    "blocks of autocast": (lambda: torch.autocast("cpu", torch.bfloat16), nesting),
    "no_grad": (torch.no_grad, torch.is_grad_enabled),
    "inference mode": (torch.inference_mode, torch.is_inference_mode_enabled),
    "a device": (lambda: torch.device("meta"), lambda: str(torch.get_default_device())),
    "saved tensors": (
        torch.autograd.graph.save_on_cpu,
        lambda: torch._C._autograd._top_saved_tensors_default_hooks(True) is None,
    ),
}


@pytest.mark.parametrize("block, look", BLOCKS.values(), ids=BLOCKS)
def test_the_models_own_block_is_not_around_the_body(block, look):
    net, x, before = Net(block), torch.randn(2, 4), look()
    seen = []
    net.middle.register_forward_pre_hook(lambda *_: seen.append(look()))
    net.last.register_forward_pre_hook(lambda *_: seen.append(look()))
    with Model(net).trace(x) as run:
        run.middle.input
        at_input = look()
        run.middle.output
        at_output = look()
        run.last.input
        assert look() == at_input == at_output == before
    assert seen[0] != before and seen[1] == before and look() == before


@pytest.mark.parametrize("block, look", BLOCKS.values(), ids=BLOCKS)
def test_the_bodys_block_is_not_around_the_model(block, look):
    net, x, before, seen = Net(), torch.randn(2, 4), look(), []
    net.middle.register_forward_pre_hook(lambda *_: seen.append(look()))
    with Model(net).trace(x) as run:
        run.first.output
        with block():
            inside = look()
            run.middle.output
            assert look() == inside != before
        run.last.input
    assert seen == [before] and look() == before


@pytest.mark.parametrize("block, look", BLOCKS.values(), ids=BLOCKS)
def test_an_error_in_the_body_ends_the_models_block(block, look):
    before = look()
    with pytest.raises(ZeroDivisionError), Model(Net(block)).trace(torch.randn(2, 4)) as run:
        run.middle.input
        1 / 0
    assert look() == before


@pytest.mark.parametrize("look", [torch.backends.cuda.mem_efficient_sdp_enabled, torch.backends.cuda.cudnn_sdp_enabled])
def test_kernels_of_attention_that_only_cuda_has(look, monkeypatch):
    monkeypatch.setattr(torch_state, "_HAS_CUDA", True)  # the flags are there without a GPU, and no stream is
    net, seen = Net(lambda: sdpa_kernel(SDPBackend.MATH)), []
    for module in (net.middle, net.last):
        module.register_forward_pre_hook(lambda *_: seen.append(look()))
    with Model(net).trace(torch.randn(2, 4)) as run:
        run.middle.input
        assert look()  # the body is outside the model's block
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            run.last.input
            assert not look()
    assert seen == [False, True] and look()


def test_casts_of_autocast_are_those_of_each_side():
    """The body changes a weight between two blocks of its own, while the model stands within one."""
    net, probe, x = Net(lambda: torch.autocast("cpu", torch.bfloat16)), nn.Linear(4, 4), torch.randn(2, 4)
    with Model(net).trace(x) as run:
        run.middle.output
        with torch.autocast("cpu", torch.bfloat16):
            before = probe(x)
        with torch.no_grad():
            probe.weight.zero_(), probe.bias.zero_()
        with torch.autocast("cpu", torch.bfloat16):
            assert before.count_nonzero() and not probe(x).count_nonzero()


# ---- levels of torch.func


class Mapped(Net):
    def forward(self, x):
        x = torch.func.vmap(self.middle)(self.first(x))
        return self.last(x)


class Differentiated(Net):
    def forward(self, x):
        slope = torch.func.grad(lambda x: self.middle(x).sin().sum())(self.first(x))
        return self.last(slope)


@pytest.mark.parametrize("kind", [Mapped, Differentiated])
@pytest.mark.parametrize(
    "ask",
    [
        lambda run: run.middle.output,
        lambda run: setattr(run.middle, "input", torch.zeros(4)),
        lambda run: run.middle.skip(torch.zeros(4)),
        lambda run: run.record("middle"),
    ],
    ids=["read", "assigned", "skipped", "recorded"],
)
def test_points_inside_torch_func_are_refused(kind, ask):
    net, x = kind(), torch.randn(2, 4)
    with pytest.raises(DiffsightError, match=r"middle\.\w+.* is inside torch.func"), Model(net).trace(x) as run:
        ask(run)
        run.last.output
    assert torch._C._functorch.maybe_current_level() is None
    with Model(net).trace(x) as run:  # those around it are not
        value = run.first.output
        run.last.output
    assert torch.equal(value, net.first(x)) and torch.equal(run.result, net(x))


def test_a_run_inside_torch_func():
    net, x = Net(), torch.randn(4)

    def loss(x):
        with Model(net).trace(x) as run:
            run.middle.output = run.first.output * 3
        return run.result.sum()

    expected = torch.func.grad(lambda x: net.last(net.first(x) * 3).sum())(x)
    assert torch.allclose(torch.func.grad(loss)(x), expected)
    batch = torch.randn(3, 4)
    assert torch.allclose(torch.vmap(loss)(batch), net.last(net.first(batch) * 3).sum(-1), atol=1e-6)
    assert torch._C._functorch.maybe_current_level() is None


def test_torch_func_in_the_body():
    """The model moves while the body is inside a level, which does not see what the model computes."""
    net, x, batch = Net(), torch.randn(2, 4), torch.randn(3, 4)
    with torch.no_grad(), Model(net).trace(x) as run:
        run.first.output
        got = torch.vmap(lambda row: row + run.middle.output.sum())(batch)
        slope = torch.func.grad(lambda x: (x * run.last.output.sum()).sum())(torch.ones(2))
    with torch.no_grad():
        middle = net.middle(net.first(x))
        assert torch.equal(got, batch + middle.sum()) and torch.equal(run.result, net.last(middle))
        assert torch.equal(slope, net.last(middle).sum().expand(2))
