"""Errors surface where the user made them, with nothing of the engine below, and say what to do."""

import copy
import pickle
import traceback

import pytest
import torch
from torch import nn

from diffsight import DiffsightError, Model, OutOfOrderError
from diffsight.errors import (
    AssignmentError,
    InputError,
    NeverReachedError,
    NoRunError,
    PointNotFoundError,
    RunClosedError,
)
from helpers import footprint
from models.nets import Calling, Net, inputs, linear


def last_line(error):
    """Return the source line at which the traceback ends, if it is in this file."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return frame.line if frame.filename == __file__ else f"{frame.filename}:{frame.lineno}"


def assert_ends(error, comment):
    assert last_line(error).endswith(f"# {comment}"), last_line(error)
    assert error.__cause__ is None
    assert error.__context__ is None or error.__suppress_context__


def test_an_error_of_the_body(net, x):
    with pytest.raises(ZeroDivisionError) as caught, Model(net).trace(x) as run:
        run.layers[1].output
        1 / 0  # here
    assert_ends(caught.value, "here")


def test_an_error_in_a_helper(net, x):
    def helper(value):
        raise ValueError("mine")  # in the helper

    with pytest.raises(ValueError, match="mine") as caught, Model(net).trace(x) as run:
        helper(run.layers[1].output)
    assert_ends(caught.value, "in the helper")


def test_an_error_in_a_step(net, x):
    with pytest.raises(ValueError, match="mine") as caught, Model(net).generate(x) as run:
        for step in run.steps:
            if step.index == 1:
                raise ValueError("mine")  # here
    assert_ends(caught.value, "here")


def test_an_error_while_the_model_handles_one(net, x):
    """An exception that the model is handling is not the context of an error in the body."""

    def forward(self, x):
        try:
            raise RuntimeError("the model's")
        except RuntimeError:
            return self.lin(x)

    for use in ("trace", "stop"):
        with pytest.raises(ValueError, match="mine") as caught, Model(Calling(forward, lin=linear())).trace(x) as run:
            run.lin.output
            if use == "stop":
                run.stop()
            raise ValueError("mine")  # here
        assert_ends(caught.value, "here")


def test_out_of_order(net, x):
    with pytest.raises(OutOfOrderError) as caught, Model(net).trace(x) as run:
        run.layers[1].output
        run.first.output  # here
    assert_ends(caught.value, "here")


def assign(envoy, value):
    envoy.output = value  # here


USES = {
    "too late, deep below": (OutOfOrderError, lambda run: run.layers[0].leaf.lin.output),  # here
    "assigned too late": (OutOfOrderError, lambda run: assign(run.first, inputs())),
    "not found": (PointNotFoundError, lambda run: run.layers[1].laef.output),  # here
    "not found on the run": (PointNotFoundError, lambda run: run.lsat.output),  # here
    "without values": (PointNotFoundError, lambda run: run.layers.output),  # here
    "assigned nothing": (AssignmentError, lambda run: assign(run.last, None)),
    "stopped": (RunClosedError, lambda run: (run.stop(), run.first.output)),  # here
}


@pytest.mark.parametrize(("error", "use"), USES.values(), ids=USES)
def test_an_invalid_assignment_in_a_helper(net, x, error, use):
    with pytest.raises(error) as caught, Model(net).trace(x) as run:
        run.last.output
        use(run)
    assert_ends(caught.value, "here")


def test_never_reached(net, x):
    with pytest.raises(NeverReachedError) as caught, Model(net).trace(x) as run:
        run.unused.output  # here
    assert_ends(caught.value, "here")


def test_never_reached_in_a_step(net, x):
    with pytest.raises(OutOfOrderError, match="step 0") as caught, Model(net).generate(x) as run:
        for _ in run.steps:
            run.unused.output  # here
    assert_ends(caught.value, "here")


def test_an_assignment_that_turns_out_impossible(x):
    """Only the model's call shows that there is no input. The message names the line that assigned it."""
    net = Calling(lambda self, x: self.last(x + self.silent()), silent=Calling(lambda self: 1), last=linear())
    with pytest.raises(AssignmentError, match=r"silent\.input") as caught, Model(net).trace(x) as run:
        run.silent.input = x  # here
        run.last.output
    assert f"{__file__}:" in str(caught.value)
    assert_ends(caught.value, "here")


def test_a_run_of_one_pass_has_no_steps(net, x):
    net = nn.Sequential(net, nn.Tanh())
    with pytest.raises(OutOfOrderError, match=r"the model is at \[1\]\.output, past"), Model(net).trace(x) as run:
        run[1].output
        run[0].output
    with pytest.raises(OutOfOrderError, match=r"output in step 0, past"), Model(net).trace(x) as run:
        for _ in run.steps:
            run[1].output
            run[0].output
    with pytest.raises(OutOfOrderError, match=r"output in step 1, past"), Model(net[0]).generate(x) as run:
        run.last.calls[1].output
        run.first.output


def test_the_whole_net_has_a_name_in_errors(net, x):
    model = Model(nn.Sequential(net, nn.Tanh()))
    with model.trace([x, x]) as run:
        (root,) = [module for path, module in run.rows[0].named_modules() if path == ""]
        with pytest.raises(PointNotFoundError, match=r"^\[7\] does not exist: Sequential has 2 children"):
            run[7].output
        with pytest.raises(InputError, match=r"^skip leaves the call out"):
            root.skip(x)
        with pytest.raises(InputError, match=r"^Sequential cannot be copied or pickled"):
            copy.copy(root)
        with pytest.raises(AttributeError, match=r"^Sequential has no 'nothing'"):
            root.calls[1].nothing
        assert repr(root.calls) == "<calls of Sequential>" and "<call 1 of Sequential:" in repr(root.calls[1])


def test_a_step_that_has_ended(net, x):
    with pytest.raises(InputError) as caught, Model(net).generate(x) as run:
        for _ in run.steps[-1:]:  # here
            pass
    assert_ends(caught.value, "here")


# ---- errors of the model


def net_raising(error):
    def fail(self, x):
        raise error  # in the model

    return Calling(
        lambda self, x: self.last(self.bad(self.first(x))), first=linear(1), bad=Calling(fail), last=linear(2)
    )


WAYS = {
    "a value of a module": lambda run: run.last.output,
    "a value of the module that fails": lambda run: run.bad.output,
    "an input": lambda run: run.last.input,
    "all inputs": lambda run: run.last.inputs,
    "a value of the model": lambda run: run.output,
    "a call": lambda run: run.last.calls[0].output,
    "the result": lambda run: run.result,
    "finish": lambda run: run.finish(),
    "a step": lambda run: [run.last.output for _ in run.steps],
    "the steps": lambda run: list(run.steps),
    "an augmented assignment": lambda run: exec("run.last.output += 1", {"run": run}),
    "the end of the block": lambda run: None,
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
@pytest.mark.parametrize("kind", [AttributeError, ValueError, KeyboardInterrupt], ids=lambda kind: kind.__name__)
def test_the_models_own_error_surfaces_as_itself(kind, way, x):
    error = kind("the model's")
    net = net_raising(error)
    clean = footprint(net)
    with pytest.raises(kind) as caught, Model(net).trace(x) as run:
        run.first.output
        way(run)
    assert caught.value is error
    assert last_line(error).endswith("# in the model")
    assert error.__context__ is None and error.__cause__ is None
    assert footprint(net) == clean


def test_an_attribute_error_of_an_unread_run(x):
    error = AttributeError("the model's")
    with pytest.raises(AttributeError) as caught:
        Model(net_raising(error)).trace(x).result
    assert caught.value is error


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
def test_a_stop_iteration_of_the_model_ends_no_loop_silently(way, x):
    """`next(self.parameters())` in a module without any is how it comes about; a generator turns it to RuntimeError."""
    with (
        pytest.raises((StopIteration, RuntimeError)) as caught,
        Model(net_raising(StopIteration("the model's"))).trace(x) as run,
    ):
        run.first.output
        way(run)
    assert isinstance(caught.value, StopIteration) or isinstance(caught.value.__cause__, StopIteration)


def test_after_an_error_of_the_model(x):
    with Model(net_raising(ValueError("the model's"))).trace(x) as run:
        value = run.first.output
        with pytest.raises(ValueError, match="the model's"):
            run.last.output
        for late in (lambda: run.first.output, lambda: run.result):
            with pytest.raises(RunClosedError, match="ValueError"):
                late()
    assert value.shape == (2, 4)


def test_a_value_asked_for_from_within_the_model(net, x):
    """A user's callback or hook runs inside the model, where it cannot wait for the run."""
    clean = footprint(net)
    model = Model(net)
    handle = net.layers[0].register_forward_hook(lambda *_: model.last.output and None)
    with pytest.raises(DiffsightError, match=r"last\.output"), model.trace(x) as run:
        run.layers[1].output
    handle.remove()
    assert footprint(net) == clean


# ---- what the messages say


def test_the_position_is_named(net, x):
    with Model(net).trace(x) as run:
        run.layers[1].leaf.input
        with pytest.raises(OutOfOrderError, match=r"^layers\[0\]\.output .*the model is at layers\[1\]\.leaf\.input"):
            run.layers[0].output
        assert "layers[1].leaf.input" in repr(run)


def test_calls_are_named(x):
    net = Calling(lambda self, x: self.step(self.step(self.step(x))), step=linear())
    with Model(net).trace(x) as run:
        run.step.calls[2].output
        with pytest.raises(OutOfOrderError, match=r"step\.calls\[1\]\.output"):
            run.step.calls[1].output


def test_the_position_at_the_model_itself_is_named(net, x):
    with Model(net).generate(x) as run:
        for _ in run.steps:
            assert "  " not in repr(run), repr(run)
            run.output
            assert "at .output" not in repr(run), repr(run)
            with pytest.raises(OutOfOrderError) as caught:
                run.first.output
            assert "at .output" not in str(caught.value)


def test_the_run_says_how_it_ended(net, x):
    run = Model(net).trace(x)
    assert "Net" in repr(run) and "open" in repr(run) and net.log == []
    run.result
    assert "ended" in repr(run)
    stopped = Model(net).trace(x)
    stopped.stop()
    assert "stopped" in repr(stopped)


def test_suggestions(net, x):
    model = Model(net)
    for path, meant in (("lsat", "last"), ("layer", "layers"), ("frist", "first")):
        with pytest.raises(PointNotFoundError, match=f"{path}.*'{meant}'"):
            getattr(model, path)
        with pytest.raises(PointNotFoundError, match=f"{path}.*'{meant}'") as caught, model.trace(x) as run:
            getattr(run, path)
        assert str(caught.value).count("did you mean") == 1
    with pytest.raises(PointNotFoundError, match=r"layers\[1\].*'leef'.*'leaf'"):
        model.layers[1].leef
    with pytest.raises(PointNotFoundError, match=r"layers\[1\]\.leaf.*'ouput'.*'output'"):
        model.layers[1].leaf.ouput
    with pytest.raises(PointNotFoundError, match=r"'resutl'.*'result'"), model.trace(x) as run:
        run.resutl
    with pytest.raises(PointNotFoundError, match=r"layers\[3\].*3"):
        model.layers[3]
    with pytest.raises(PointNotFoundError, match=r"layers\.1\.leef.*'leaf'"):
        model["layers.1.leef"]
    with pytest.raises(AttributeError):
        model.nothing_like_it


def test_outside_any_run(net, x):
    model = Model(net)
    for use in (lambda: model.first.output, lambda: model.output, lambda: setattr(model.first, "output", x)):
        with pytest.raises(NoRunError, match=r"output.*with model\.trace\(\.\.\.\)"):
            use()
    with pytest.raises(NoRunError, match=r"first\.skip"):
        model.first.skip(x)
    with model.trace(x) as run:
        pass
    with pytest.raises(NoRunError):
        model.first.output
    with pytest.raises(RunClosedError, match=r"first\.output.*ended"):
        run.first.output


def test_a_model_must_be_a_module():
    with pytest.raises(InputError, match="int"):
        Model(5)
    with pytest.raises(PointNotFoundError, match="encode"):
        Model(Net(), methods=["encode"])


def test_every_error_is_one_of_diffsights():
    for error in (OutOfOrderError, NeverReachedError, PointNotFoundError, NoRunError, RunClosedError, AssignmentError):
        assert issubclass(error, DiffsightError)
    assert issubclass(PointNotFoundError, AttributeError)


@pytest.mark.parametrize("copying", [copy.deepcopy, copy.copy, pickle.dumps])
def test_a_model_is_not_copied(net, x, copying):
    model = Model(net)
    for thing in (model, model.layers[0], {"model": model}):
        if copying is copy.copy and thing is not model:
            continue
        with pytest.raises(InputError, match=r"wrap the copy, Model\(copy\.deepcopy\(module\)\)"):
            copying(thing)
    assert Model(copy.deepcopy(net)).trace(x).result.equal(net(x))


def test_a_run_is_asked_by_a_model_that_its_own_model_runs(net, x):
    def ask(self, x):
        with pytest.raises(DiffsightError, match="cannot wait for itself"):
            run.last.output
        return self.part(x)

    def within(*_):
        with Model(Calling(ask, part=linear())).trace(x) as inner:
            inner.part.output

    handle = net.layers[1].register_forward_hook(within)
    with Model(net).trace(x) as run:
        last = run.last.output
    handle.remove()
    assert torch.equal(last, net(x))
