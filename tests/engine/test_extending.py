"""A wrapper of another kind of model, written with `diffsight.extending` alone: the example in its documentation."""

from types import SimpleNamespace

import pytest
import torch

from diffsight.errors import InputError, PointNotFoundError
from diffsight.extending import (
    FORWARD,
    ChangedMethod,
    Clock,
    Model,
    Run,
    Selection,
    Step,
    Target,
    Tree,
    fetch,
    flow_of,
    keeping_attribute_errors,
    model_of,
    narrowed,
    open_run,
    owner_of,
    run_meant_by,
    run_of,
    target_of,
    tree_of,
)
from helpers import footprint, outputs
from models.nets import Net, inputs


class Pipeline:
    """No module, and its parts are in a dictionary."""

    def __init__(self) -> None:
        self.components = {"encoder": Net(seed=1), "decoder": Net(seed=2)}

    def __call__(self, x, steps=2):
        hidden = self.components["encoder"](x)
        for _ in range(steps):
            hidden = self.components["decoder"](hidden)
        return SimpleNamespace(audio=self.polish(hidden))

    def polish(self, hidden):
        return hidden * 2


class AudioTree(Tree):
    opens_with = "generate"

    def children_of(self, target):
        if target.owner is not self.root.owner:
            return target.named_children()
        return {name: Target(part, FORWARD, name) for name, part in self.root.owner.components.items()}

    def methods_of(self, owner):
        return {"polish": "polish"} if owner is self.root.owner else {}

    def names_of(self, owner):
        return {"head": "last"} if isinstance(owner, Net) else {}

    def components(self):
        return [*self.children_of(self.root).values(), Target(self.root.owner, "polish", "polish")]

    def clock(self):
        return Clock([self.children_of(self.root)["decoder"]])


class AudioStep(Step):
    @property
    def loudness(self):
        (hidden,), _ = self._call
        return hidden.norm()


class AudioRun(Run):
    @property
    def audio(self):
        with keeping_attribute_errors(self):
            return self.result.audio

    def _make_step(self, index, path, call):
        return AudioStep(index, path, call)


class AudioModel(Model):
    _run_class = AudioRun

    def __init__(self, pipeline):
        self._wrap(AudioTree(Target(pipeline, "__call__", "")))

    def generate(self, x, **arguments):
        return self._new_run(lambda: self._owner(x, **arguments))


@pytest.fixture
def pipeline():
    return Pipeline()


def test_the_result(pipeline, x):
    before = [footprint(net) for net in pipeline.components.values()]
    with AudioModel(pipeline).generate(x) as run:
        hidden = run.encoder.layers[1].output
        polished = run.polish.output
    assert torch.equal(run.audio, pipeline(x).audio) and torch.equal(polished, run.audio)
    assert torch.equal(hidden, outputs(pipeline.components["encoder"].layers[1], pipeline, x)[0])
    assert [footprint(net) for net in pipeline.components.values()] == before


def test_steps_of_its_own(pipeline, x):
    loud = []
    for step in AudioModel(pipeline).generate(x, steps=3).steps:
        loud.append(step.loudness)
        assert step.component == "decoder"
    assert len(loud) == 3 and loud[0] == pipeline.components["encoder"](x).norm()


def test_names(pipeline, x):
    model = AudioModel(pipeline)
    with model.generate(x) as run:
        assert torch.equal(run.encoder.head.output, pipeline.components["encoder"](x))
    with pytest.raises(PointNotFoundError, match=r"encoder has no 'heat' \(did you mean 'head'"):
        model.encoder.heat


def test_checks_of_arguments(pipeline, x):
    model = AudioModel(pipeline)
    with model.generate(x) as run:
        layer = run.decoder.layers[0]
        assert run_of(layer) is run and run_meant_by(model.decoder, "output") is run and model_of(run) is model
        assert tree_of(layer) is tree_of(run) and target_of(layer).path == "decoder.layers[0]"
        assert owner_of(layer) is pipeline.components["decoder"].layers[0]
        assert torch.equal(fetch(layer, "output"), layer.output) and flow_of(run).outcome is None


def test_a_selection_of_its_own(pipeline, x):
    class Feature(Selection):
        name = "feature"

        def take(self, value, path):
            return value[:, 0]

        def put(self, whole, value, path, copies):
            if value.shape != whole[:, 0].shape:
                raise InputError(f"{path} takes one number per row")
            whole = whole.clone()
            whole[:, 0] = value
            return whole

    with AudioModel(pipeline).generate(x) as run:
        feature = narrowed(run.encoder.layers[1], Feature())
        assert torch.equal(feature.output, run.encoder.layers[1].output[:, 0])
        feature.output = torch.zeros(len(x))
        assert not run.encoder.layers[1].output[:, 0].any() and run.encoder.layers[1].output[:, 1].all()
        with pytest.raises(InputError, match=r"feature\.encoder\.layers\[1\]\.output .* takes one number per row"):
            feature.output = torch.zeros(1)


def test_a_run_of_any_function(pipeline, x):
    run = open_run(AudioModel(pipeline), lambda: pipeline.components["encoder"](x))
    assert torch.equal(run.encoder.first.output, pipeline.components["encoder"].first(x))
    assert torch.equal(run.result, pipeline.components["encoder"](x))


def test_a_method_that_is_changed(pipeline):
    first = ChangedMethod(pipeline, "polish", lambda own: lambda hidden: own(hidden) + 1)
    second = ChangedMethod(pipeline, "polish", lambda own: lambda hidden: own(hidden) + 10)
    hidden = inputs()
    assert torch.equal(pipeline.polish(hidden), hidden * 2 + 1)  # of two at once, the first is there
    first.remove()
    assert torch.equal(pipeline.polish(hidden), hidden * 2 + 1)
    second.remove()
    assert torch.equal(pipeline.polish(hidden), hidden * 2) and "polish" not in vars(pipeline)
