"""A model that was built without weights takes over those of one that was loaded."""

import copy

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import nn

from diffsight import DiffsightError, Model
from diffsight.extending import FORWARD, Target, Tree
from diffsight.pipelines.weights import adopt
from helpers import replaced
from models.nets import WIDTH, Calling, Net, linear


class Later(Model):
    """Loads `loaded` when it is needed."""

    def __init__(self, module, load):
        self._wrap(Tree(Target(module, FORWARD, ""), lambda: adopt(module, load())))


@pytest.fixture
def loaded():
    return Net(seed=1)


@pytest.fixture
def empty():
    return Net().to("meta")


def test_the_first_run_loads(empty, loaded, x):
    asked = []
    model = Later(empty, lambda: asked.append(1) or loaded)
    layer, expected = model.layers[1], copy.deepcopy(loaded)(x)
    assert model.scan(x).result.shape == expected.shape
    run = model.trace(x)
    assert asked == []
    assert torch.equal(run.result, expected)
    with model.trace(x):
        given = layer.input
        assert torch.equal(layer.output, loaded.layers[1](given))
    assert asked == [1]


def test_in_a_scan_nothing_is_loaded(empty, x):
    def load():
        raise AssertionError("weights were asked for")

    model = Later(empty, load)
    with model.scan(x) as run:
        hidden = run.layers[0].output
        assert model.last(hidden).shape == (2, WIDTH)
        assert (hidden @ model.last.weight.T).shape == (2, WIDTH)
        assert model.first.weight.device == torch.device("cpu")
    with pytest.raises(AssertionError, match="asked for"):
        model.trace(x).result


def test_nothing_is_loaded_under_a_scan(empty, loaded, x):
    model = Later(empty, lambda: loaded)
    with model.scan(x) as scan:
        scan.layers[0].output
        with pytest.raises(DiffsightError, match="while a scan of it is open"), model.trace(x) as run:
            run.layers[0].output
        with pytest.raises(DiffsightError, match="while a scan of it is open"):
            model.trace(x).result
    assert torch.equal(model.trace(x).result, loaded(x))


def test_loading_that_fails_is_tried_again(empty, loaded, x):
    answers = [OSError("unplugged"), OSError("unplugged"), None]

    def load():
        error = answers.pop(0)
        if error is not None:
            raise error
        return loaded

    model = Later(empty, load)
    for _ in range(2):
        with pytest.raises(OSError, match="unplugged"), model.trace(x) as run:
            run.layers[0].output
    with model.trace(x) as run:
        run.layers[0].output
    assert torch.equal(run.result, loaded(x))


def test_modules_stay_the_objects_they_are(empty, loaded):
    before = dict(empty.named_modules())
    values = {name: value.clone() for name, value in loaded.state_dict().items()}
    adopt(empty, loaded)
    assert dict(empty.named_modules()) == before
    assert all(torch.equal(value, values[name]) for name, value in empty.state_dict().items())


def test_modules_of_another_class(empty, loaded, x):
    """A library that quantises puts modules of its own in the place of linear ones."""

    class Halved(nn.Linear):
        def forward(self, x):
            return super().forward(x) / 2

    loaded.first.__class__ = Halved
    expected = loaded(x)
    adopt(empty, loaded)
    assert type(empty.first) is Halved
    with Model(empty).trace(x) as run:
        first = run.first.output
    assert torch.equal(first, nn.functional.linear(x, loaded.first.weight, loaded.first.bias) / 2)
    assert torch.equal(run.result, expected)


def test_a_module_that_only_the_loaded_model_has(x):
    empty = Calling(lambda self, x: self.part(x), part=linear().to("meta"))
    loaded = Calling(lambda self, x: self.more(self.part(x)), part=linear(1), more=linear(2))
    expected = loaded(x)
    adopt(empty, loaded)
    with Model(empty).trace(x) as run:
        assert torch.equal(run.more.input, empty.part(x))
    assert torch.equal(run.result, expected)


def test_hooks_that_came_with_loading_work(empty, loaded, x):
    class Double(ModelHook):
        def post_forward(self, module, output):
            return output * 2

    add_hook_to_module(loaded.layers[1], Double())
    expected = loaded(x)
    adopt(empty, loaded)
    with Model(empty).trace(x) as run:
        inner = run.layers[1].leaf.output
        outer = run.layers[1].output
    assert torch.equal(run.result, expected)
    assert torch.equal(outer, 2 * (run.layers[1].out(inner) + empty.layers[0](empty.first(x))))


def test_an_edited_copy_and_the_model_load_once(empty, loaded, x):
    asked = []
    model = Later(empty, lambda: asked.append(1) or copy.deepcopy(loaded))
    with model.edit() as edited:
        edited.layers[1].output = edited.layers[1].extra(edited.layers[1].output)
    edited.layers[1].extra = linear(5)
    assert edited.scan(x).result.shape == x.shape and asked == []
    with replaced(loaded.layers[1], linear(5)):
        expected = loaded(x)
    assert torch.equal(edited.trace(x).result, expected)
    assert torch.equal(model.trace(x).result, loaded(x)) and asked == [1]


def test_a_module_attached_before_weights_come(empty, loaded, x):
    model = Later(empty, lambda: copy.deepcopy(loaded))
    model.layers[1].extra = linear(5)
    with model.edit(inplace=True):
        model.layers[1].output = model.layers[1].extra(model.layers[1].output)
    assert model.scan(x).result.shape == x.shape
    with replaced(loaded.layers[1], linear(5)):
        expected = loaded(x)
    assert torch.equal(model.trace(x).result, expected)
    assert torch.equal(model.module.layers[1].extra.weight, linear(5).weight)
