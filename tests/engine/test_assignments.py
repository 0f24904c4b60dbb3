"""Assignments wait at points that lie ahead, in any order; one that is never reached is an error with its line."""

import inspect

import pytest
import torch

from diffsight import Model, OutOfOrderError
from diffsight.errors import AssignmentError, NeverReachedError
from helpers import footprint, outputs, replaced, with_input
from models.nets import Calling, inputs, linear


def test_assignments_in_any_order(net, x):
    with Model(net).trace(x) as run:
        run.last.output = torch.ones(2, 4)
        run.layers[1].leaf.lin.input = inputs(1)
        kept = run.layers[2].output
    lin = net.layers[1].leaf.lin
    assert torch.equal(kept, with_input(lin, inputs(1), lambda: outputs(net.layers[2], net, x)[0]))
    assert torch.equal(run.result, torch.ones(2, 4))


def test_last_to_first_equals_first_to_last(net, x):
    values = {"first": inputs(1), "layers.0.leaf": inputs(2), "layers.2.out": inputs(3)}

    def run_with(paths):
        with Model(net).trace(x) as run:
            for path in paths:
                run[path].output = values[path]
        return run.result

    handles = [
        net.get_submodule(path).register_forward_hook(lambda module, args, out, value=value: value)
        for path, value in values.items()
    ]
    expected = net(x)
    for handle in handles:
        handle.remove()
    assert torch.equal(run_with(values), expected)
    assert torch.equal(run_with(reversed(values)), expected)


def test_nothing_runs_for_an_assignment(net, x):
    with Model(net).trace(x) as run:
        run.last.output = x
        run.first.input = inputs(1)
        assert net.log == []
    assert torch.equal(run.result, x)


def test_the_last_of_several_counts(net, x):
    with Model(net).trace(x) as run:
        run.layers[0].output = inputs(1)
        run.layers[0].output = inputs(2)
    with replaced(net.layers[0], lambda out: inputs(2)):
        assert torch.equal(run.result, net(x))


def test_a_waiting_value_is_read_at_its_point(net, x):
    with Model(net).trace(x) as run:
        run.layers[1].output = new = inputs(1)
        run.layers[1].input = given = inputs(2)
        assert run.layers[1].input is given
        assert run.layers[1].output is new
        new[:] = 0
    assert torch.equal(run.result, net.last(net.layers[2](torch.zeros(2, 4))))


def test_input_and_inputs_together():
    scale = Calling(lambda self, x, factor: x * factor)
    net = Calling(lambda self, x: self.scale(x, 2.0), scale=scale)
    with Model(net).trace(inputs()) as run:
        run.scale.inputs = ((inputs(1),), {"factor": 7.0})
        run.scale.input = inputs(2)
    assert torch.equal(run.result, inputs(2) * 7.0)


def test_an_assignment_to_a_later_call():
    net = Calling(lambda self, x: self.step(self.step(self.step(x))), step=linear())
    x = inputs()
    with Model(net).trace(x) as run:
        run.step.calls[2].input = inputs(1)
        first = run.step.output
    assert torch.equal(first, net.step(x)) and torch.equal(run.result, net.step(inputs(1)))


def test_a_value_of_one_layer_assigned_to_another(net, x):
    with Model(net).trace(x) as run:
        run.last.input = run.layers[0].output
    assert torch.equal(run.result, net.last(net.layers[0](net.first(x))))


def line_of(text):
    """Return `file:line` of the only line of the calling test that ends with `# text`."""
    frame = inspect.currentframe().f_back
    lines, start = inspect.getsourcelines(frame.f_code)
    (offset,) = (i for i, line in enumerate(lines) if line.rstrip().endswith(f"# {text}"))
    return f"{__file__}:{start + offset}"


def test_an_unreached_assignment_names_its_line(net, x):
    before = footprint(net)
    with pytest.raises(NeverReachedError) as caught, Model(net).trace(x) as run:
        run.unused.output = x  # here
        run.last.output = x
    assert "unused.output" in str(caught.value) and line_of("here") in str(caught.value)
    assert "last.output" not in str(caught.value)
    assert net.log[-1] == "last" and footprint(net) == before


def test_all_unreached_assignments_are_named(net, x):
    run = Model(net).trace(x)
    run.unused.input = x  # one
    run.first.calls[1].output = x  # two
    run.unused.skip(x)  # three
    with pytest.raises(NeverReachedError) as caught:
        run.result
    for line in ("one", "two", "three"):
        assert line_of(line) in str(caught.value)


def test_the_line_is_the_users_in_a_helper(net, x):
    def helper(run):
        run.unused.output = x  # in the helper

    with pytest.raises(NeverReachedError) as caught, Model(net).trace(x) as run:
        helper(run)
    _, start = inspect.getsourcelines(helper)
    assert f"{__file__}:{start + 1}" in str(caught.value)


def test_an_assignment_that_a_step_never_reaches(net, x):
    with pytest.raises(NeverReachedError) as caught, Model(net).generate(x) as run:
        for step in run.steps:
            if step.index == 1:
                run.unused.output = x  # here
    assert line_of("here") in str(caught.value)


def test_an_assignment_in_a_step_is_for_that_step(net, x):
    with Model(net).generate(x, steps=4) as run:
        for step in run.steps:
            if step.index == 2:
                run.layers[1].output = inputs(1)
    with replaced(net.layers[1], lambda out: inputs(1), only=2):
        assert torch.equal(run.result, net.generate(x, steps=4))


def test_too_late_after_a_read_is_an_error_and_changes_nothing(net, x):
    with Model(net).trace(x) as run:
        run.first.output, run.layers[0].output
        with pytest.raises(OutOfOrderError, match=r"first\.output"):
            run.first.output = inputs(1)
        with pytest.raises(OutOfOrderError, match=r"layers\[0\]\.input"):
            run.layers[0].input = inputs(1)
    assert torch.equal(run.result, net(x))


def test_an_error_in_the_body_takes_precedence_over_unreached_assignments(net, x):
    with pytest.raises(KeyError), Model(net).trace(x) as run:
        run.unused.output = x
        raise KeyError("mine")


def test_a_value_with_other_dimensions_is_an_error(net, x):
    before = footprint(net)
    with pytest.raises(AssignmentError, match=r"layers\[1\].output .*\(2, 4\), but \(4,\) was assigned"):
        with Model(net).trace(x) as run:
            run.layers[1].output = torch.zeros(4)
    assert footprint(net) == before


def test_a_value_of_a_shape_that_breaks_the_model_is_named(net, x):
    before = footprint(net)
    with pytest.raises(AssignmentError, match=r"layers\[1\].output .*\(2, 4\), but \(2, 3\) was assigned") as caught:
        with Model(net).trace(x) as run:
            run.layers[1].output = torch.zeros(2, 3)
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert footprint(net) == before
    with Model(net).trace(x) as run:
        run.layers[1].output = torch.zeros(2, 5)
        with pytest.raises(AssignmentError, match="assigned"):
            run.last.output
    assert footprint(net) == before
    assert torch.equal(Model(net).trace(x).result, net(x))


@pytest.mark.parametrize(
    "told, value",
    [
        ("has the type torch.float32, but a tensor of torch.float64", torch.zeros(2, 4, dtype=torch.float64)),
        ("is on cpu, but a tensor on meta", torch.zeros(2, 4, device="meta")),
    ],
)
def test_a_value_of_a_type_that_breaks_the_model_is_named(net, x, told, value):
    with pytest.raises(AssignmentError, match=rf"layers\[1\].output .*test_assignments.py:\d+\) {told} was assigned"):
        with Model(net).trace(x) as run:
            run.layers[1].output = value


def test_a_value_of_another_shape_that_fits_is_accepted(net, x):
    with Model(net).trace(x) as run:
        run.layers[0].input = inputs(3, rows=5)
    assert torch.equal(run.result, with_input(net.layers[0], inputs(3, rows=5), lambda: net(x)))


@pytest.mark.parametrize("wrong", [torch.zeros(1, 4), torch.zeros(4), 1.0])
def test_inputs_take_no_number_and_nothing_to_broadcast(net, x, wrong):
    with pytest.raises(AssignmentError, match=r"last\.inputs"), Model(net).trace(x) as run:
        run.last.inputs = ((wrong,), {})
