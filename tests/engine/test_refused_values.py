"""A value that cannot stand at a point is an error at the user's line, and rows leave alone what was read."""

import re
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from transformers.utils import ModelOutput

from diffsight import Model
from diffsight.errors import AssignmentError, InputError


class Fallback(nn.Module):
    """Goes another way if the first one fails, whatever the reason."""

    def __init__(self):
        super().__init__()
        self.fast, self.slow = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        try:
            return self.fast(x)
        except Exception:
            return self.slow(x)


class Pair(nn.Module):
    def forward(self, x):
        return {"key": x, "more": ({"value": 2 * x},)}


class Sum(nn.Module):
    def __init__(self):
        super().__init__()
        self.pair = Pair()

    def forward(self, x):
        pair = self.pair(x)
        return pair["key"] + 10 * pair["more"][0]["value"]


@pytest.mark.parametrize("value", [[1.0], 0.5, torch.zeros(4), torch.zeros(1, 4), torch.zeros(2, 4).numpy()], ids=repr)
def test_a_refusal_that_the_model_swallows_is_raised_at_the_end(value):
    net, x = Fallback(), torch.randn(2, 4)
    with (
        pytest.raises(AssignmentError, match=r"fast.output \(.*test_refused_values.py:\d+\)"),
        Model(net).trace(x) as run,
    ):
        run.fast.output = value
    run = Model(net).trace([x[:1], x[1:]])
    run.rows[0].fast.output = torch.zeros(3, 4)
    with pytest.raises(AssignmentError, match=r"rows\[0\].fast.output .* has the shape \(1, 4\), not \(3, 4\)"):
        run.result


class Answering(Fallback):
    """Answers every error of its first layer with one of its own, at once or later."""

    def __init__(self, at_once):
        super().__init__()
        self.at_once = at_once

    def forward(self, x):
        try:
            x = self.fast(x)
        except Exception:
            if self.at_once:
                raise RuntimeError("the fast layer failed") from None
            x = torch.full_like(x, torch.nan)
        if self.slow(x).isnan().any():
            raise FloatingPointError("not a number")
        return x


@pytest.mark.parametrize("at_once", [True, False])
def test_a_refusal_that_the_model_answers_with_an_error_of_its_own(at_once):
    with pytest.raises(AssignmentError, match=r"fast.output .* is a Tensor; it cannot take a list") as caught:
        with Model(Answering(at_once)).trace(torch.randn(2, 4)) as run:
            run.fast.output = [1.0]
    assert isinstance(caught.value.__cause__, RuntimeError if at_once else FloatingPointError)


def test_an_unrelated_error_after_an_assignment_of_another_shape():
    """It stays what it is: the model, a hook or a function of the user's has raised it for a reason of its own."""

    def fail(*_):
        raise ValueError("my own check")

    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with pytest.raises(ValueError, match="my own check") as caught, Model(net).trace(torch.randn(3, 4)) as run:
        run.follow("1", fail)
        run[0].output = torch.zeros(2, 4)
    assert r"[0].output" in caught.value.__notes__[0]
    assert "has the shape (3, 4), but (2, 4) was assigned" in caught.value.__notes__[0]


def test_what_would_only_fit_by_broadcasting():
    net, x = nn.Sequential(nn.Linear(4, 4), nn.Tanh()), torch.randn(2, 4)
    with pytest.raises(AssignmentError, match=r"\(1, 4\) was assigned. To repeat the value, write .*expand"):
        with Model(net).trace(x) as run:
            run[0].output = torch.ones(1, 4)
    with Model(net).trace(x) as run:
        run[0].output = torch.ones(1, 4).expand(2, 4)
    assert torch.equal(run.result, torch.ones(2, 4).tanh())
    with Model(net).trace(x) as run:
        run[0].output = torch.ones(3, 4)  # another batch is the model's own affair
    assert torch.equal(run.result, torch.ones(3, 4).tanh())


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        (torch.zeros(1, 4), torch.zeros(2, 4), r"\(1, 4\) was assigned. To repeat the value"),
        (torch.zeros(2, 4), torch.zeros(4), "Assign a value of 2 dimensions"),
        (0.0, torch.zeros(2, 4), "cannot take the number 0.0"),
    ],
)
def test_a_container_with_a_value_that_would_only_fit_by_broadcasting(key, value, told):
    with pytest.raises(AssignmentError, match=told):
        with torch.no_grad(), Model(Sum()).trace(torch.zeros(2, 4)) as run:
            run.pair.output = {"key": key, "more": ({"value": value},)}


class Kinds(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    def forward(self, x, *, mask):
        if self.kind == "tuple":
            return x, (x.sum(), x.sum(1))
        values = {"hidden_states": x, "total": (x.sum(), x.sum(1))}
        return values if self.kind == "dict" else Hidden(**values)


@dataclass
class Hidden(ModelOutput):
    hidden_states: torch.Tensor | None = None
    total: tuple | None = None


class AroundKinds(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.part = Kinds(kind)

    def forward(self, x):
        return self.part(x, mask=x > 0)


@pytest.mark.parametrize("kind", ["tuple", "dict", "output"])
def test_refusals_name_the_part(kind):
    x, first, second = torch.randn(3, 4), *((0, 1) if kind == "tuple" else ("hidden_states", "total"))
    shown = [f"[{key}]" if kind == "tuple" else f'["{key}"]' for key in (first, second)]

    def made(hidden, total):
        one = (hidden, total) if kind == "tuple" else {first: hidden, second: total}
        return Hidden(**one) if kind == "output" else one

    cases = [
        (made(0.5, (x.sum(), x.sum(1))), f"part.output{shown[0]}", f"write part.output{shown[0]}[:] = 0.5"),
        (made(x, (1, x.sum(1))), f"part.output{shown[1]}[0]", f"write part.output{shown[1]}[0][()] = 1"),
        (made(x, (x.sum(), x[:1, 0])), f"part.output{shown[1]}[1]", "has the shape (3,), but (1,) was assigned"),
    ]
    for value, name, advice in cases:
        with pytest.raises(AssignmentError, match=re.escape(advice)) as caught, torch.no_grad():
            with Model(AroundKinds(kind)).trace(x) as run:
                run.part.output = value
        assert str(caught.value).startswith(f"{name} (")
        if "write part" in advice:  # it is right
            with torch.no_grad(), Model(AroundKinds(kind)).trace(x) as run:
                exec(advice.replace("write part", "run.part"), {"run": run})
    with (
        pytest.raises(AssignmentError, match=r'^part.inputs\[1\]\["mask"\] .* has the shape \(3, 4\)'),
        torch.no_grad(),
    ):
        with Model(AroundKinds(kind)).trace(x) as run:
            run.part.inputs = (x,), {"mask": torch.ones(1, 4, dtype=torch.bool)}
    with pytest.raises(
        AssignmentError, match=rf"^rows\[1\].part.output{re.escape(shown[0])} .* has the shape \(1, 4\)"
    ):
        with torch.no_grad(), Model(AroundKinds(kind)).trace([x, x[:1]]) as run:
            run.rows[1].part.output = made(x[:1, :2], (x.sum(), x.sum(1)))


def test_a_tuple_is_no_row_of_a_dictionary():
    with pytest.raises(AssignmentError, match=r"rows\[1\].pair.output .* is a dict; it cannot take a tuple"):
        with torch.no_grad(), Model(Sum()).trace([torch.zeros(1, 4), torch.zeros(1, 4)]) as run:
            run.rows[1].pair.output = torch.zeros(1, 4), ({"value": torch.ones(1, 4)},)


def test_a_dictionary_assigned_to_a_row_is_matched_by_its_keys():
    inputs = [torch.zeros(1, 4), torch.zeros(1, 4)]
    with torch.no_grad(), Model(Sum()).trace(inputs) as run:
        one, two = torch.full((1, 4), 1.0), torch.full((1, 4), 2.0)
        run.rows[1].pair.output = {"more": ({"value": two},), "key": one}
    assert torch.equal(run.result, torch.tensor([[0.0], [21.0]]).expand(2, 4))
    with pytest.raises(
        AssignmentError, match=r"rows\[1\].pair.output .* holds \['key', 'more'\]; .* \['key', 'value'\]"
    ):
        with torch.no_grad(), Model(Sum()).trace(inputs) as run:
            run.rows[1].pair.output = {"value": two, "key": one}


def test_a_value_that_was_read_stays_when_another_row_is_assigned():
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    with torch.no_grad(), Model(net).trace([torch.randn(1, 4), torch.randn(1, 4)]) as run:
        x, y = run.rows
        x[0].output = torch.zeros(1, 4)
        before, row = run[0].output, x[0].output
        kept = before.clone()
        y[0].output = torch.ones(1, 4)
        x[0].output = torch.ones(1, 4)
        assert torch.equal(before, kept) and torch.equal(row, torch.zeros(1, 4))
        assert torch.equal(run[0].output, torch.ones(2, 4))


@pytest.mark.parametrize(
    "own, value, told",
    [
        (torch.int64, torch.tensor([[2.7]]), "a tensor of torch.int64; it cannot take one of torch.float32"),
        (torch.bool, torch.tensor([[2]]), "a tensor of torch.bool; it cannot take one of torch.int64"),
        (torch.uint8, torch.tensor([[300]]), "a tensor of torch.uint8; it cannot take one of torch.int64"),
        (torch.float32, torch.tensor([[1j]]), "a tensor of torch.float32; it cannot take one of torch.complex64"),
    ],
)
def test_a_row_takes_no_value_that_it_cannot_hold(own, value, told):
    net, x = nn.Sequential(nn.Identity(), nn.Identity()), torch.ones(2, 1, dtype=own)
    with pytest.raises(AssignmentError, match=rf"rows\[1\].*output .*{told}"), Model(net).trace(x) as run:
        run.rows[1][0].output = value


def test_a_row_takes_no_value_on_another_device():
    refused = pytest.raises((AssignmentError, InputError), match="meta")  # a server is not even sent it
    with refused, Model(nn.Sequential(nn.Identity())).trace(torch.ones(2, 1)) as run:
        run.rows[1][0].output = torch.ones(1, 1, device="meta")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.int64, torch.bool])
def test_a_row_of_floats_takes_other_numbers(dtype):
    value = torch.tensor([[1, 0]], dtype=dtype)
    with Model(nn.Sequential(nn.Identity())).trace(torch.full((2, 2), 3.0)) as run:
        run.rows[1][0].output = value
    assert torch.equal(run.result, torch.tensor([[3.0, 3], [1, 0]]))
