"""Modules that the model calls past the modules around them, or that stand in several places: no call is taken for
another, in the first run of a model and in later ones."""

from functools import partial

import pytest
import torch
from torch import nn

from diffsight import Model, OutOfOrderError


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.lin = nn.LayerNorm(4), nn.Linear(4, 4)

    def forward(self, x):
        return self.lin(self.norm(x))

    def encode(self, x):
        return self.lin(x)


class Past(nn.Module):
    """Uses the norm of its block itself, before the block does, and a method of another block."""

    def __init__(self):
        super().__init__()
        self.first, self.block, self.other = nn.Linear(4, 4), Block(), Block()

    def forward(self, x):
        h = self.block.norm(self.first(x))
        return self.other.encode(self.block(h + 1))


class Shared(nn.Module):
    """One activation in two blocks."""

    def __init__(self):
        super().__init__()
        act = nn.Tanh()
        self.a, self.b = nn.Sequential(nn.Linear(4, 4), act), nn.Sequential(nn.Linear(4, 4), act)

    def forward(self, x):
        return self.b(self.a(x))


def outputs(module, net, x):
    seen = []
    hook = module.register_forward_hook(lambda module, args, output: seen.append(output.clone()))
    net(x)
    hook.remove()
    return seen


@pytest.mark.parametrize("runs_before", [0, 1])
def test_a_module_that_is_called_past_the_one_around_it(runs_before):
    net, x = Past(), torch.randn(2, 4)
    model = Model(net)
    with torch.no_grad():
        for _ in range(runs_before):
            with model.trace(x) as run:
                run.output
        norms, (lin,) = outputs(net.block.norm, net, x), outputs(net.other.lin, net, x)
        with model.trace(x) as run:
            run.block.input
            with pytest.raises(OutOfOrderError, match=r"block.norm.output was asked for too late: .* past that point"):
                run.block.norm.output
            assert torch.equal(run.block.norm.calls[1].output, norms[1])
            assert torch.equal(run.other.lin.output, lin)
        with model.trace(x) as run:
            run.block.norm.output = torch.zeros(2, 4)
            run.first.output
        assert not torch.equal(run.result, net(x))


@pytest.mark.parametrize("runs_before", [0, 1])
@pytest.mark.parametrize("place", ["a[1]", "b[1]"])
def test_a_module_in_two_places(runs_before, place):
    net, x = Shared(), torch.randn(2, 4)
    model = Model(net)
    with torch.no_grad():
        for _ in range(runs_before):
            with model.trace(x) as run:
                run.output
        seen = outputs(net.a[1], net, x)
        with model.trace(x) as run:
            run.b.input
            with pytest.raises(OutOfOrderError, match=r"output was asked for too late: .* past that point"):
                run[place].output
            assert torch.equal(run[place].calls[1].output, seen[1])


def test_a_module_inside_one_that_is_called_again():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = nn.Sequential(nn.Linear(4, 4))

        def forward(self, x):
            return self.block(self.block(x))

    net, x = Twice(), torch.randn(2, 4)
    with torch.no_grad():
        seen = outputs(net.block[0], net, x)
        with Model(net).trace(x) as run:
            run.block.calls[1].input
            assert torch.equal(run.block[0].calls[1].output, seen[1])


class Sometimes(nn.Module):
    """Calls parts of its blocks itself, in the way that `way` names, if any."""

    def __init__(self, way):
        super().__init__()
        self.first, self.way = nn.Linear(4, 4), way
        self.outer = nn.ModuleList([nn.Sequential(Block(), nn.Tanh()) if way == "index" else Outer()])

    def forward(self, x, past=False):
        x = self.first(x)
        if past and self.way == "name":
            x = self.outer[0].block.norm(x) + 1
        elif past and self.way == "index":
            for sequence in self.outer:
                x = sequence[1](x) + 1
        elif past and self.way == "method":
            x = self.normalised(self.outer[0].block, x)
        elif past:
            x = normalised(self.outer[0].block, x)
        for block in self.outer:
            x = block(x)
        return x

    def normalised(self, block, x):
        return block.norm(x) + 1


class Inherited(Sometimes):
    def forward(self, x, **kwargs):
        return super().forward(x, **kwargs)


def normalised(block, x):
    return block.norm(x) + 1


class Outer(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = Block()

    def forward(self, x):
        return self.block(x)


@pytest.mark.parametrize(
    "kind, way, path",
    [
        (Sometimes, "name", "outer[0].block.norm"),
        (Sometimes, "method", "outer[0].block.norm"),
        (Sometimes, "index", "outer[0][1]"),
        (Sometimes, "function", "outer[0].block.norm"),
        (Inherited, "function", "outer[0].block.norm"),
    ],
)
def test_a_call_past_the_module_around_it_that_only_a_later_run_makes(kind, way, path):
    torch.manual_seed(0)
    net, x = kind(way), torch.randn(2, 4)
    model, module = Model(net), net.get_submodule(path.replace("[", ".").replace("]", ""))
    with torch.no_grad():
        with model.trace(x) as run:
            run.outer[0].output
        with model.trace(x, past=True) as run:
            run.outer[0].input
            with pytest.raises(OutOfOrderError, match="too late"):
                run[path].output
            second = run[path].calls[1].output
        seen = []
        hook = module.register_forward_hook(lambda module, args, output: seen.append(output))
        net(x, past=True)
        hook.remove()
        assert len(seen) == 2 and torch.equal(second, seen[1])


class Normalised(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, x):
        return self.norm(x) + 1


def test_a_module_that_gets_a_second_place_between_two_runs():
    torch.manual_seed(0)
    net, x = Sometimes("name"), torch.randn(2, 4)
    model = Model(net)
    with torch.no_grad():
        with model.trace(x) as run:
            run.outer[0].output
        net.first = nn.Sequential(net.first, Normalised(net.outer[0].block.norm))
        with model.trace(x) as run:
            run.outer[0].input
            with pytest.raises(OutOfOrderError, match="too late"):
                run.outer[0].block.norm.output
            second = run.outer[0].block.norm.calls[1].output
        assert torch.equal(second, outputs(net.outer[0].block.norm, net, x)[1])


def test_a_module_that_has_been_replaced_between_two_runs():
    torch.manual_seed(0)
    net, x = Sometimes("name"), torch.randn(2, 4)
    model = Model(net)
    with torch.no_grad():
        for past in (True, False):
            with model.trace(x, past=past) as run:
                run.outer[0].output
            net.outer[0].block.norm = nn.LayerNorm(4)
            with model.trace(x, past=past) as run:
                run.outer[0].input
                if past:
                    with pytest.raises(OutOfOrderError, match="too late"):
                        run.outer[0].block.norm.output
            with model.trace(x, past=past) as run:
                second = run.outer[0].block.norm.calls[int(past)].output
            assert torch.equal(second, outputs(net.outer[0].block.norm, partial(net, past=past), x)[-1])
