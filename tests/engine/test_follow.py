"""`run.follow`: a function that gets every value that passes a point. `model.check`: arguments without a run."""

import pytest
import torch

from diffsight import LanguageModel, Model, OutOfOrderError
from diffsight.errors import InputError, NoRunError, PointNotFoundError
from helpers import footprint, outputs
from models.nets import Calling, inputs, linear


@pytest.fixture
def model(net) -> Model:
    return Model(net)


def test_every_call_of_a_run(model, net, x):
    expected, seen = outputs(net.layers[1], net.generate, x), []
    run = model.generate(x)
    run.follow("layers[1].output", seen.append)
    run.finish()
    assert len(seen) == 3 and all(map(torch.equal, seen, expected))


def test_a_path_means_the_output(model, net, x):
    seen = []
    with model.trace(x) as run:
        run.follow("layers[0].leaf", seen.append)
    assert torch.equal(seen[0], outputs(net.layers[0].leaf, net, x)[0])


def test_inputs(model, net, x):
    first, both = [], []
    with model.trace(x) as run:
        run.follow("layers[1].input", first.append)
        run.follow("layers[1].inputs", both.append)
        hidden = run.layers[0].output
    assert torch.equal(first[0], hidden) and both == [((first[0],), {})]


def test_edits_are_seen(model, x):
    seen = []
    with model.trace(x) as run:
        run.follow("layers[1]", seen.append)
        run.layers[1].output = torch.ones_like(x)
    assert torch.equal(seen[0], torch.ones_like(x))


def test_the_return_value_is_ignored(model, net, x):
    before = footprint(net)
    with model.trace(x) as run:
        run.follow("layers[1]", lambda hidden: hidden * 0)
    assert torch.equal(run.result, net(x)) and footprint(net) == before


def test_too_late(model, x):
    with model.trace(x) as run:
        run.layers[2].output
        with pytest.raises(OutOfOrderError, match=r"layers\[0\].output was asked for too late"):
            run.follow("layers[0].output", print)


def test_a_path_that_is_wrong(model, x):
    run = model.trace(x)
    with pytest.raises(PointNotFoundError, match="has no 'layer'"):
        run.follow("layer[0].output", print)
    with pytest.raises(InputError, match=r"one point, not a pattern: 'layers\[\*\]'"):
        run.follow("layers[*]", print)


def test_arguments_are_checked_without_a_run(model):
    model.check([inputs(0), inputs(1)])
    with pytest.raises(InputError, match="do not form a batch"):
        model.check([inputs(0), torch.zeros(2, 5)])
    with pytest.raises(NoRunError):
        model.output


def test_arguments_of_a_language_model(gpt2):
    model = LanguageModel(gpt2)
    model.check(torch.tensor([[1, 2]]), seed=0)
    with pytest.raises(InputError):
        model.check("a text")
    with pytest.raises(InputError, match="seed"):
        model.check(torch.tensor([[1, 2]]), seed=-1)


def test_arguments_of_a_pipeline():
    from diffsight import DiffusionModel
    from models import diffusion

    model = DiffusionModel(diffusion.stable_diffusion())
    model.check("a red circle", seed=3)
    with pytest.raises(InputError, match="has no argument 'promt'"):
        model.check(promt="a red circle")
    with pytest.raises(InputError, match="seed"):
        model.check("a red circle", seed=[1, 2])


def test_an_error_of_the_function_that_the_model_catches():
    def forward(self, x):
        try:
            return self.fast(x)
        except Exception:
            return self.slow(x)

    net = Calling(forward, fast=linear(), slow=linear())
    with pytest.raises(KeyError, match="norms"), Model(net).trace(inputs()) as run:
        run.follow("fast", lambda value: {}["norms"])
