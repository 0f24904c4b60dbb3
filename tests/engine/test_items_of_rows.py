"""Items that are set in a container that a row has read: they reach the row, as they do on the whole value."""

import pytest
import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutput

from diffsight import Model, OutOfOrderError
from diffsight.errors import AssignmentError


class Making(nn.Module):
    """Returns a container of `x` and twice `x`."""

    def __init__(self, make):
        super().__init__()
        self.make = make

    def forward(self, x):
        return self.make(x, 2 * x)


class Adding(nn.Module):
    """Adds the tensors in a container to others."""

    def __init__(self, items):
        super().__init__()
        self.items = items

    def forward(self, made, *, more=None):
        self.got = made
        return 3 * sum(self.items(made)) + (0 if more is None else more["y"])


class Net(nn.Module):
    def __init__(self, make=lambda a, b: {"a": a, "b": b}, items=dict.values):
        super().__init__()
        self.making, self.adding = Making(make), Adding(items)

    def forward(self, x):
        return self.adding(self.making(x), more={"y": 7 * x})

    def generate(self, x, steps=2):
        for _ in range(steps):
            x = self.forward(x)
        return x


KINDS = {
    "a dictionary": (lambda a, b: {"a": a, "b": b}, dict.values, lambda made, new: made.update(b=new)),
    "a list": (lambda a, b: [a, b], iter, lambda made, new: made.__setitem__(1, new)),
    "a dictionary in a tuple": (
        lambda a, b: (a, {"b": [b]}),
        lambda made: (made[0], made[1]["b"][0]),
        lambda made, new: made[1].update(b=[new]),
    ),
    "an output object": (
        lambda a, b: BaseModelOutput(last_hidden_state=a, hidden_states=(b,)),
        lambda made: (made.last_hidden_state, *made.hidden_states),
        lambda made, new: setattr(made, "hidden_states", (new,)),
    ),
    "its first value": (
        lambda a, b: BaseModelOutput(last_hidden_state=b, hidden_states=(a,)),
        lambda made: (made["last_hidden_state"], *made.hidden_states),
        lambda made, new: setattr(made, "last_hidden_state", new),
    ),
}
NEW = torch.full((1, 4), 5.0)


def expected(x, rows=(1,)):
    """Return the result if the second part of these rows is `NEW`."""
    b = 2 * x
    b[list(rows)] = NEW
    return 3 * (x + b) + 7 * x


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_an_item_that_is_set_reaches_the_row(kind, rows):
    make, items, change = KINDS[kind]
    x, row = torch.randn(rows, 4), rows // 2
    with Model(Net(make, items)).trace(x) as run:
        change(run.rows[row].making.output, NEW)
    assert torch.allclose(run.result, expected(x, [row]))
    with Model(Net(make, items)).trace(x) as run:
        change(run.rows[row].adding.input, NEW)
    assert torch.allclose(run.result, expected(x, [row]))


def test_arguments_by_keyword():
    x = torch.randn(3, 4)
    with Model(Net()).trace(x) as run:
        run.rows[1].adding.inputs[1]["more"]["y"] = NEW
    wanted = 9 * x
    wanted[1] += NEW[0]
    wanted[[0, 2]] += 7 * x[[0, 2]]
    assert torch.allclose(run.result, wanted)


def test_in_functions_of_each_and_in_edits():
    x, model = torch.randn(2, 4), Model(Net())

    def change(row):
        row.making.output["b"] = NEW

    with model.trace(x) as run:
        run.each([lambda row: row.making.output, change])
    assert torch.allclose(run.result, expected(x))
    edited = model.edit(lambda run: change(run.rows[1])).edit(lambda run: run.making.output["b"].mul_(2))
    with edited.trace(x) as run:
        seen = run.making.output
        change(run.rows[0])
        assert torch.equal(run.making.output["b"][0], NEW[0]) and torch.equal(seen["b"][1], 2 * NEW[0])
    wanted = expected(x, [0, 1])
    wanted[1] += 3 * NEW[0]
    assert torch.allclose(run.result, wanted)


def test_in_a_loop_over_steps():
    x = torch.randn(2, 4)
    with Model(Net()).generate(x) as run:
        for _ in run.steps:
            run.rows[1].making.output["b"] = NEW
    assert torch.allclose(run.result, expected(expected(x)))


def test_what_was_set_is_seen_by_later_reads():
    x = torch.ones(2, 4)
    with Model(Net()).trace(x) as run:
        run.rows[1].making.output["b"] = NEW
        assert torch.equal(run.rows[1].making.output["b"], NEW)
        run.rows[1].making.output["a"] = NEW
        assert torch.equal(run.making.output["a"][1], NEW[0]) and torch.equal(run.making.output["b"][1], NEW[0])
    assert torch.equal(run.result[1] - 7 * x[1], 6 * NEW[0])


@pytest.mark.parametrize("times", [1, 2])
def test_a_tensor_that_was_set_is_changed_after_another_read(times):
    x, new = torch.ones(2, 4), NEW.clone()
    with Model(Net()).trace(x) as run:
        own = run.rows[1].making.output
        own["b"] = new
        for _ in range(times):
            run.rows[0].making.output
            own["b"].mul_(2)
    assert torch.equal(run.result[1], (3 * (x + new) + 7 * x)[1])


class Options(dict):
    """A dictionary with an attribute that is not one of its items."""

    __dataclass_fields__ = {"depth": None}
    depth = 2


def test_an_attribute_that_is_no_item_from_the_start():
    x = torch.ones(2, 4)
    torch.utils._pytree.register_pytree_node(
        Options, lambda value: (list(value.values()), list(value)), lambda items, names: Options(zip(names, items))
    )
    with Model(Net(lambda a, b: Options(a=a, b=b))).trace(x) as run:
        run.rows[1].making.output["b"] = NEW
    assert torch.equal(run.result, expected(x))


def test_what_is_left_as_it_was_stays_the_models_own():
    net = Net()
    with Model(net).trace(torch.randn(2, 4)) as run:
        whole, own = run.making.output, run.rows[1].making.output
    assert net.adding.got is whole and own is not whole
    with Model(net).trace(torch.randn(2, 4)) as run:
        a = run.making.output["a"]
        own = run.rows[1].making.output
        own["b"] = NEW
        assert run.rows[0].making.output["a"].data_ptr() == a.data_ptr()
        own["a"][:] = 9
    assert net.adding.got["a"] is a and torch.equal(a[1], torch.full((4,), 9.0))


def test_a_row_that_is_assigned_as_well():
    x = torch.randn(2, 4)
    with Model(Net()).trace(x) as run:
        own = run.rows[1].making.output
        own["b"] = NEW * 2
        run.rows[1].making.output = {"a": x[1:], "b": NEW}
        own["b"] = NEW * 3  # no longer a part of the value
    assert torch.allclose(run.result, expected(x))
    with Model(Net()).trace(x) as run:
        own = run.rows[1].making.output
        run.rows[1].making.output = own
        own["b"] = NEW
    assert torch.allclose(run.result, expected(x))


def test_the_whole_value_is_changed_as_well():
    x = torch.randn(2, 4)
    with Model(Net()).trace(x) as run:
        whole, own = run.making.output, run.rows[1].making.output
        own["a"] = NEW
        whole["b"] = x
    wanted = 3 * (x + x) + 7 * x
    wanted[1] += 3 * (NEW[0] - x[1])
    assert torch.allclose(run.result, wanted)


@pytest.mark.parametrize("kind", ["a dictionary", "a list", "an output object"])
def test_an_item_of_the_whole_value_after_a_row_was_assigned(kind):
    make, items, change = KINDS[kind]
    x, net = torch.randn(2, 4), Net(make, items)
    for of in (lambda run: run.making, lambda run: run.adding):
        part = "output" if of(Model(net)).path == "making" else "input"
        with pytest.raises(OutOfOrderError, match="changed in place after a part of it had been assigned"):
            with Model(net).trace(x) as run:
                whole = getattr(of(run), part)
                setattr(of(run.rows[1]), part, make(x[1:], NEW))
                change(whole, torch.zeros(2, 4))
    with Model(net).trace(x) as run:
        run.making.output
        run.rows[1].making.output = make(x[1:], NEW)
        change(run.making.output, torch.cat([2 * x[:1], NEW]))
    assert torch.allclose(run.result, expected(x))
    with Model(net).trace(x) as run:
        (_, named) = run.adding.inputs
        run.rows[1].adding.input = make(x[1:], NEW)
        named["more"] = {"y": 7 * x}  # the model still has this dictionary
    assert torch.allclose(run.result, expected(x))


def test_a_call_of_the_body_in_between():
    net, x = Net(), torch.randn(2, 4)
    net.other = nn.Linear(4, 4)
    with Model(net).trace(x) as run:
        own = run.rows[1].making.output
        run.other(x, hook=True)
        own["b"] = NEW
    assert torch.allclose(run.result, expected(x))


@pytest.mark.parametrize(
    "change, told",
    [
        (lambda made: made.update(b=torch.zeros(2, 4)), r"has the shape \(1, 4\), not \(2, 4\)"),
        (lambda made: made.update(b=None), "is a Tensor; it cannot take a NoneType"),
        (lambda made: made.update(c=NEW), r"holds \['a', 'b'\]; it cannot take \['a', 'b', 'c'\]"),
        (lambda made: made.pop("b"), r"holds \['a', 'b'\]; it cannot take \['a'\]"),
    ],
)
def test_what_a_row_cannot_take(change, told):
    net = Net()
    with pytest.raises(AssignmentError, match=rf"rows\[1\].making.output\S* \(.*test_items_of_rows.*\) {told}"):
        with Model(net).trace(torch.randn(2, 4)) as run:
            change(run.rows[1].making.output)
    assert "forward" not in vars(net.making) and not net.making._forward_pre_hooks


def test_an_attribute_that_is_no_item():
    make, items, _ = KINDS["an output object"]
    with pytest.raises(AssignmentError, match="the attribute 'last_hidden_state' was set"):
        with Model(Net(make, items)).trace(torch.randn(2, 4)) as run:
            run.rows[1].making.output.last_hidden_state = None
