"""Errors surface at the user's line, in whichever body it is, with nothing of the engine below it."""

import re
import traceback

import pytest
import torch

from diffsight import Model, OutOfOrderError
from diffsight.errors import AssignmentError, NeverReachedError, NoRunError, RunClosedError


def last_lines(error):
    """Return the source lines that a traceback ends with, the last one first."""
    return [frame.line for frame in reversed(traceback.extract_tb(error.__traceback__))]


def read_backwards(row):
    row.last.output
    row.first.output  # behind


def read_backwards_in_a_step(row):
    for _ in row.steps:
        row.last.output
        row.first.output  # behind


@pytest.mark.parametrize("opens, body", [("trace", read_backwards), ("generate", read_backwards_in_a_step)])
def test_in_the_function_of_a_row(net, x, opens, body):
    with pytest.raises(OutOfOrderError) as caught:
        with getattr(Model(net), opens)(x) as run:
            run.each(body)
    assert last_lines(caught.value)[0] == "row.first.output  # behind"


@pytest.mark.parametrize("value", ["text", 0, torch.zeros(4), torch.zeros(2, 5)])
def test_an_assignment_made_ahead(net, x, value):
    """The traceback ends at the line that assigned the value, wherever the model gets there."""
    with pytest.raises(AssignmentError, match=rf"first\.output \({__file__}") as caught:
        with Model(net).trace(x) as run:
            run.first.output = value  # wrong
    assert last_lines(caught.value)[0] == "run.first.output = value  # wrong"
    assert "with Model(net).trace(x) as run:" in last_lines(caught.value)
    with pytest.raises(AssignmentError) as caught:
        with Model(net).trace(x) as run:
            run.first.output = value
            run.last.output  # comes there
    assert last_lines(caught.value)[:2] == ["run.first.output = value", "run.last.output  # comes there"]
    with pytest.raises(AssignmentError) as caught:
        run = Model(net).trace(x)
        run.first.output = value
        run.finish()
    assert last_lines(caught.value)[0] == "run.first.output = value"


def test_an_assignment_made_in_a_function_that_has_returned(net, x):
    def assign(run):
        run.first.output = torch.zeros(4)

    with pytest.raises(AssignmentError, match=__file__) as caught:
        with Model(net).trace(x) as run:
            assign(run)
    assert last_lines(caught.value)[1] == "with Model(net).trace(x) as run:"  # the last is of the block's own end


def test_a_number_in_place_of_a_tensor(net, x):
    for name in ("first", "rows[0].first"):
        with pytest.raises(AssignmentError, match=re.escape(f"To fill it, write {name}.output[:] = 0.5")):
            with Model(net).trace(x) as run:
                (run.rows[0] if "rows" in name else run).first.output = 0.5
    with Model(net).trace(x) as run:
        run.first.output[:] = 0.5  # as the message says
        assert torch.equal(run.first.output, torch.full_like(x, 0.5))


def test_a_point_that_is_never_reached(net, x):
    with pytest.raises(NeverReachedError) as caught:
        with Model(net).trace(x) as run:
            run.unused.output = x
    assert last_lines(caught.value)[0] == "run.unused.output = x"


@pytest.mark.parametrize("end", [lambda run: run.stop(), lambda run: run.finish()])
def test_the_models_handles_in_the_block_of_a_run_that_has_ended(net, x, end):
    model = Model(net)
    with model.trace(x) as run:
        run.first.output
        end(run)
        with pytest.raises(
            RunClosedError, match=r"last\.output was asked for too late: the run (was stopped|has ended)"
        ):
            model.last.output
    with pytest.raises(NoRunError):
        model.last.output
