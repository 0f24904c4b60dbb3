"""A run leaves alone what a user does to the model's modules while it is open: copies, patches, unusual `forward`s."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from diffsight import Model


class Double(nn.Module):
    @staticmethod
    def forward(x):
        return 2 * x


def net_and_input():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh()), torch.randn(2, 4)


def pickled(net):
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


class CopiesItsDict(nn.Linear):
    """Makes its own deep copies, as a module with a parametrization does."""

    def __deepcopy__(self, memo):
        made = memo[id(self)] = self.__new__(type(self))
        made.__dict__ = copy.deepcopy(self.__dict__, memo)
        return made


class ReducesItsDict(nn.Linear):
    def __reduce__(self):
        return _rebuilt, (type(self), self.__dict__)


class NestsItsDict(nn.Linear):
    def __getstate__(self):
        self.copies = getattr(self, "copies", 0) + 1
        return {"held": self.__dict__}

    def __setstate__(self, state):
        self.__dict__.update(state["held"])


def _rebuilt(kind, held):
    made = kind.__new__(kind)
    made.__dict__.update(held)
    return made


def held_of_a_run(module):
    return {"forward", "__reduce_ex__", "__deepcopy__"} & set(vars(module))


@pytest.mark.parametrize("make", [copy.deepcopy, copy.copy, pickled])
@pytest.mark.parametrize("kind", [nn.Linear, CopiesItsDict, ReducesItsDict, NestsItsDict])
@pytest.mark.parametrize("count", [1, 10])
def test_a_copy_that_is_made_in_a_run_holds_nothing_of_it(make, kind, count):
    net, x = nn.Sequential(*(kind(4, 4) for _ in range(count))), torch.randn(2, 4)
    with torch.no_grad(), Model(net).trace(x) as run:
        run[0].output
        made = make(net)
        assert not held_of_a_run(made)
        assert make is copy.copy or not any(map(held_of_a_run, made.modules()))
        assert not held_of_a_run(make(net[0]))
    assert torch.equal(made(x), net(x)) and not any(map(held_of_a_run, net.modules()))


def test_what_a_class_changes_when_it_is_copied_stays_changed():
    net, x = nn.Sequential(NestsItsDict(4, 4)), torch.randn(2, 4)
    with torch.no_grad(), Model(net).trace(x) as run:
        run[0].output
        assert [copy.deepcopy(net)[0].copies, copy.deepcopy(net)[0].copies] == [1, 2]
        run[0].output = torch.ones(2, 4)
    assert torch.equal(run.result, torch.ones(2, 4)) and net[0].copies == 2


def test_a_copy_of_a_parametrized_module_and_of_a_graph():
    net = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(4, 4), nn.Tanh()))
    net = nn.Sequential(weight_norm(nn.Linear(4, 4)), net)
    x = torch.randn(2, 4)
    with torch.no_grad():
        with Model(net).trace(x) as run:
            run[0].output
            made = copy.deepcopy(net)
            assert torch.equal(pickled(net[1])(x), net[1](x))
            with pytest.raises(RuntimeError, match="parametrized modules"):  # PyTorch's own
                pickled(net)
        assert not any(map(held_of_a_run, made.modules()))
        with Model(nn.Sequential(made[0], made[0])).trace(x) as run:
            assert torch.equal(run[0].calls[1].output, net[0](net[0](x)))


def test_a_deep_copy_method_of_the_users_own_stays():
    net, x = nn.Sequential(CopiesItsDict(4, 4)), torch.randn(2, 4)
    net[0].__deepcopy__ = own = lambda memo: net[0]
    with torch.no_grad(), Model(net).trace(x) as run:
        run[0].output
        assert copy.deepcopy(net)[0] is net[0]
    assert vars(net[0])["__deepcopy__"] is own


@pytest.mark.parametrize("own", [None, torch.sigmoid])
def test_a_copy_of_a_modules_dictionary_is_a_module_of_its_own_in_a_run(own):
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(4, 4)), torch.randn(2, 4)
    if own is not None:
        net[0].forward = own
    with torch.no_grad(), Model(net).trace(x) as run:
        run[0].output
        shallow = _rebuilt(nn.Linear, vars(net[0]))
    shallow.bias = None
    with torch.no_grad(), Model(nn.Sequential(shallow)).trace(x) as run:
        assert torch.equal(run[0].output, x @ net[0].weight.T if own is None else own(x))
    assert vars(shallow).get("forward") is own and not {"__reduce_ex__", "__deepcopy__"} & set(vars(shallow))


def test_a_copy_keeps_a_forward_of_the_users_own():
    net, x = net_and_input()
    net[1].forward = torch.sigmoid
    with torch.no_grad(), Model(net).trace(x) as run:
        run[1].output
        made = copy.deepcopy(net)
    assert made[1].forward is torch.sigmoid and net[1].forward is torch.sigmoid
    assert torch.equal(made(x), net(x))


def test_a_static_forward():
    net, x = nn.Sequential(nn.Linear(4, 4), Double()), torch.randn(2, 4)
    with torch.no_grad(), Model(net).trace(x) as run:
        assert torch.equal(run[1].output, 2 * net[0](x))
    assert "forward" not in vars(net[1])


def test_a_forward_that_is_replaced_in_the_body():
    net, x = net_and_input()
    with torch.no_grad():
        hidden = net[0](x)
        with Model(net).trace(x) as run:
            run[0].output
            net[1].forward = torch.sigmoid
            assert torch.equal(run[1].output, torch.sigmoid(hidden))
        assert net[1].forward is torch.sigmoid and "__reduce_ex__" not in vars(net[1])
        del net[1].forward
        with Model(net).trace(x) as run:
            run[1].output = torch.ones(2, 4)
            run[0].output
            net[1].forward = torch.sigmoid
        assert torch.equal(run.result, torch.ones(2, 4))
        with Model(net).trace(x) as run:
            run[0].output
            del net[1].forward
            assert torch.equal(run[1].output, torch.tanh(hidden))
    assert "forward" not in vars(net[1])
