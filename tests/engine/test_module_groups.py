"""The children of a module are hooked together, whatever has become of them since the last run."""

import copy
import sys

import pytest
import torch
from torch import nn

from diffsight import Model


class Child(nn.Module):
    def forward(self, x):
        return x + 1


class OtherChild(Child):
    def forward(self, x):
        return x + 10


class Wide(nn.Module):
    """Calls the first three of many children."""

    def __init__(self, count=5):
        super().__init__()
        self.children_ = nn.ModuleList(Child() for _ in range(count))

    def forward(self, x):
        for child in self.children_[:3]:
            x = child(x)
        return x


X = torch.zeros(2)


def third(model):
    with model.trace(X) as run:
        return run.children_[2].output


def python_calls(function):
    """How many functions are called that are written in Python."""
    count = 0

    def look(frame, event, argument):
        nonlocal count
        count += event == "call"

    sys.setprofile(look)
    try:
        function()
    finally:
        sys.setprofile(None)
    return count


def clean(net):
    return all(not {"forward", "__reduce_ex__"} & set(vars(module)) for module in net.modules())


@pytest.fixture
def net():
    return Wide()


@pytest.fixture
def model(net):
    model = Model(net)
    assert torch.equal(third(model), X + 3)  # the children have been hooked together once
    return model


def test_a_run_calls_no_more_functions_for_children_that_stand_beside():
    few, many = Model(Wide(10)), Model(Wide(2000))
    for model in (few, many):
        third(model)
        third(model)
    assert python_calls(lambda: third(many)) == python_calls(lambda: third(few))


def test_a_child_with_a_forward_pass_of_its_own(net, model):
    net.children_[1].forward = own = lambda x: x + 100
    assert torch.equal(third(model), X + 102)
    assert vars(net.children_[1])["forward"] is own
    del net.children_[1].forward
    assert torch.equal(third(model), X + 3) and clean(net)


def test_a_child_whose_forward_pass_the_body_replaces(net, model):
    own = lambda x: x + 100  # noqa: E731
    with model.trace(X) as run:
        run.children_[0].output
        net.children_[1].forward = own
        assert torch.equal(run.children_[1].output, X + 101)
        assert torch.equal(run.children_[2].output, X + 102)
    assert vars(net.children_[1]).pop("forward") is own and clean(net)
    assert torch.equal(third(model), X + 3)


def test_a_child_of_another_class(net, model):
    net.children_[1].__class__ = OtherChild
    assert torch.equal(third(model), X + 12) and clean(net)


def test_a_child_whose_dictionary_is_another(net, model):
    net.children_[1].__dict__ = dict(vars(net.children_[1]))
    with model.trace(X) as run:
        assert torch.equal(run.children_[1].output, X + 2)
    assert clean(net)


def test_a_child_that_is_exchanged(net, model):
    net.children_[1] = OtherChild()
    with model.trace(X) as run:
        assert torch.equal(run.children_[1].output, X + 11)
    assert clean(net)


def test_a_class_that_is_patched(net, model, monkeypatch):
    monkeypatch.setattr(Child, "forward", lambda self, x: x + 5)
    assert torch.equal(third(model), X + 15) and clean(net)


@pytest.mark.parametrize("first_to_end", [0, 1])
def test_two_runs_at_once(net, model, first_to_end):
    runs = [model.trace(X), Model(net).trace(X)]
    for run in runs:
        run.children_[0].output
    runs[first_to_end].finish()
    assert not clean(net)
    assert torch.equal(runs[1 - first_to_end].children_[2].output, X + 3)
    runs[1 - first_to_end].finish()
    assert clean(net)
    assert torch.equal(third(model), X + 3) and clean(net)


def test_a_copy_is_made_without_hooks(net, model):
    with model.trace(X) as run:
        run.children_[0].output
        copied = copy.deepcopy(net)
    assert clean(copied) and clean(net)
    assert torch.equal(copied(X), X + 3)
