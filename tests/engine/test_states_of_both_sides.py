"""Dispatch modes and saved-tensor hooks, of the model and of the body, are each side's own."""

import torch
from torch import nn
from torch.autograd.graph import disable_saved_tensors_hooks, save_on_cpu
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from diffsight import Model


class Halved(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        return result / 2 if function is torch.ops.aten.tanh.default else result


class Net(nn.Module):
    def __init__(self, halved=False, checkpointed=False):
        super().__init__()
        self.a, self.b, self.halved, self.checkpointed = nn.Linear(4, 4), nn.Linear(4, 4), halved, checkpointed

    def inner(self, x):
        return self.b(torch.tanh(self.a(x)))

    def forward(self, x):
        if self.checkpointed:
            return checkpoint(self.inner, x, use_reentrant=False)
        if not self.halved:
            return self.inner(x)
        with Halved():
            return self.inner(x)


def test_dispatch_modes():
    moody, plain, x = Net(halved=True), Net(), torch.randn(3, 4)
    one, right_tanh = torch.ones(1), torch.ones(1).tanh()
    with torch.no_grad():
        right = moody(x), plain(x)
        with Model(moody).trace(x) as run:
            run.a.output
            assert torch.equal(torch.tanh(one), right_tanh) and not torch._C._len_torch_dispatch_stack()
        assert torch.equal(run.result, right[0])
        with Model(moody).trace(x) as p, Model(plain).trace(x) as q:
            p.a.output, q.a.output, p.b.output, q.b.output
        assert torch.equal(p.result, right[0]) and torch.equal(q.result, right[1])
        with Model(plain).trace(x) as run:
            run.a.output
            with Halved():
                run.b.input
                assert torch._C._len_torch_dispatch_stack() == 1
        assert torch.equal(run.result, right[1])
    assert not torch._C._len_torch_dispatch_stack()


def test_saved_tensor_hooks_of_a_checkpoint():
    torch.manual_seed(0)
    net, probe, x = Net(checkpointed=True), nn.Linear(4, 1), torch.randn(3, 4)
    expected = torch.autograd.grad(probe(net.a(x)).tanh().sum(), [*probe.parameters(), *net.a.parameters()])
    with Model(net).trace(x, grad=True) as run:
        loss = probe(run.a.output).tanh().sum()
    got = torch.autograd.grad(loss, [*probe.parameters(), *net.a.parameters()], retain_graph=True)
    assert all(map(torch.allclose, got, expected))
    clean = torch.autograd.grad(net(x).sum(), [*net.parameters()])
    assert all(map(torch.allclose, torch.autograd.grad(run.result.sum(), [*net.parameters()]), clean))


def test_one_side_has_saved_tensor_hooks_and_the_other_disables_them():
    torch.manual_seed(0)
    net, x = Net(checkpointed=True), torch.randn(3, 4)
    clean = net(x)
    with Model(net).trace(x) as run:
        run.a.output
        with disable_saved_tensors_hooks("not in the body"):
            run.b.input
    assert torch.equal(run.result, clean)

    net.checkpointed = False
    net.forward = disable_saved_tensors_hooks("not in the model")(net.forward)
    with Model(net).trace(x) as run:
        with save_on_cpu():
            run.a.output
            run.b.input
            assert torch._C._autograd._top_saved_tensors_default_hooks(True)
    assert torch.equal(run.result, clean) and torch._C._autograd._saved_tensors_hooks_is_enabled()
    assert not torch._C._autograd._top_saved_tensors_default_hooks(True)
