"""Modules whose names are also those of attributes of handles and runs."""

import warnings

import pytest
import torch
from torch import nn

from diffsight import Model
from diffsight.errors import InputError, NoRunError, PointNotFoundError

PRIVATE = [
    "_model",
    "_target",
    "_flow",
    "_run",
    "_part",
    "_tree",
    "_call",
    "_pass",
    "_child",
    "_fetch",
    "_root",
    "_sizes",
]


class Inner(nn.Module):
    def __init__(self, name):
        super().__init__()
        self.add_module(name, nn.Linear(4, 4))
        self.name = name

    def forward(self, x):
        return getattr(self, self.name)(x)


class Outer(nn.Module):
    def __init__(self, name):
        super().__init__()
        self.add_module(name, Inner(name))
        self.proj = nn.Linear(4, 4)
        self.name = name

    def forward(self, x):
        return self.proj(getattr(self, self.name)(x))


@pytest.fixture
def x():
    torch.manual_seed(0)
    with torch.no_grad():
        yield torch.randn(2, 4)


@pytest.mark.parametrize("name", PRIVATE)
def test_private_names_mean_the_module(name, x):
    net = Outer(name)
    model, inner = Model(net), getattr(net, name)
    with model.trace(x) as run:
        value = getattr(getattr(run, name), name).output
        getattr(run, name).output = value * 2
        run.proj.output
    assert torch.equal(value, inner(x)) and torch.equal(run.result, net.proj(inner(x) * 2))
    with model.trace(x):
        assert torch.equal(getattr(getattr(model, name), name).output, inner(x))
    with model.trace(x) as run:
        assert torch.equal(getattr(run.rows[1], name).output, inner(x)[1:])
        assert torch.equal(getattr(run, name).calls[0].output, inner(x))


def test_private_names_in_edits_steps_and_copies(x):
    net = Outer("_model")

    def edit(run):
        run._model.output = run._model.output * 2

    edited = Model(net).edit(edit)
    assert torch.equal(edited.trace(x).result, net.proj(net._model(x) * 2))
    with edited.trace(x) as run:
        for _ in run.steps:
            assert torch.equal(run._model._model.output, net._model(x))


@pytest.mark.parametrize("name", ["output", "input", "skip", "steps", "rows", "result"])
def test_public_names_are_reached_by_index(name, x):
    net = Outer(name)
    model, inner = Model(net), getattr(net, name)
    assert f'modules whose names mean something else here: ["{name}"]' in repr(model)
    with model.trace(x) as run:
        value = run[name][name].output
        model[name].output = value * 2
    assert torch.equal(value, inner(x)) and torch.equal(run.result, net.proj(inner(x) * 2))


@pytest.mark.parametrize("name", ["output", "input", "rows", "result"])
def test_a_value_with_the_name_of_a_module_is_told_once(name, x):
    model = Model(Outer(name))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(2):
            with model.trace(x) as run:
                getattr(run if name in ("rows", "result") else run[name], name)
    expected = f'run["{name}"]' if name in ("rows", "result") else f'run.{name}["{name}"]'
    assert [str(one.message).rpartition("is ")[2] for one in told] == [expected]
    assert told[0].filename == __file__


def test_the_error_outside_a_run_names_the_module():
    with pytest.raises(NoRunError, match=r'module of that name is output\["output"\]'):
        Model(Outer("output"))["output"].output.weight


def test_names_that_do_not_exist(gpt2, ids):
    model = Model(gpt2)
    with model.trace(ids) as run:
        for handle in (run, model):
            with pytest.raises(PointNotFoundError, match=r"has no 'n_embd'; its configuration has one: .config.n_embd"):
                handle.n_embd
            with pytest.raises(PointNotFoundError, match=r"has no 'nothing'.*; its parts are transformer, lm_head"):
                handle.nothing


def test_a_run_without_input(net, x):
    model = Model(net)
    with pytest.raises(InputError, match=r"run.invoke\(x\)"), model.trace() as run:
        run.layers[0].output
    with model.trace() as run, run.invoke(x):
        hidden = model.layers[0].output
    assert torch.equal(hidden, net.layers[0](net.first(x)))


@pytest.mark.parametrize("name, hint", [("calls", r"calls\[0\]\.output"), ("steps", "for step in run.steps")])
def test_what_stands_for_several_values_takes_none(name, hint, x):
    model = Model(Outer(name))
    uses = (lambda found: found.output, lambda found: setattr(found, "output", x))
    for use in uses:
        match = rf"{name} has no 'output'.*{hint}.*run\[\"{name}\"\]"
        with pytest.raises(PointNotFoundError, match=match), model.trace(x) as run:
            use(getattr(run, name))


def test_a_misspelt_name_of_a_step(x):
    with (
        pytest.raises(PointNotFoundError, match=r"a step has no 'indx' to assign .*'index'"),
        Model(Outer("a")).trace(x) as run,
    ):
        for step in run.steps:
            step.indx = 3
