"""A value that is changed in place after the model has passed it is an error, as `=` is there."""

import sys
from dataclasses import dataclass
from weakref import ref

import numpy
import pytest
import torch
from torch import nn

from diffsight import Model, OutOfOrderError

LATE = r"\[0\].output, read at .*test_late_edits.py:\d+, was changed in place too late: the model is at \[1\].output"


def net_and_input():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)), torch.randn(2, 4)


@pytest.mark.parametrize("goes_on", [True, False])
@pytest.mark.parametrize("again", [True, False])
def test_an_edit_in_place_behind_the_point(goes_on, again):
    net, x = net_and_input()
    with pytest.raises(OutOfOrderError, match=LATE), torch.no_grad(), Model(net).trace(x) as run:
        hidden = run[0].output
        run[1].output
        if again:
            hidden = run[0].output
        hidden[:] = 0
        if goes_on:
            run[2].output
    assert torch.equal(net(x), net[2](net[1](net[0](x))))  # nothing is left behind


def test_the_error_names_the_line_that_has_read_the_value():
    net, x = net_and_input()
    line = (sys._getframe().f_lineno + 3,)
    with pytest.raises(OutOfOrderError) as caught:
        with torch.no_grad(), Model(net).trace(x) as run:
            hidden = run[0].output
            run[1].output
            hidden += 1
    assert f"[0].output, read at {__file__}:{line[0]}," in str(caught.value)


def test_an_early_value_among_several():
    net = nn.Sequential(*(nn.Linear(4, 4) for _ in range(5)))
    with pytest.raises(OutOfOrderError, match=r"\[0\].output, read"), torch.no_grad():
        with Model(net).trace(torch.randn(2, 4)) as run:
            values = [run[layer].output for layer in range(4)]
            values[0].zero_()


class Pair(nn.Module):
    def forward(self, x):
        return x + 1, {"twice": [2 * x]}


def test_a_part_of_a_tuple():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.pair, self.last = Pair(), nn.Identity()

        def forward(self, x):
            one, more = self.pair(x)
            return self.last(one + more["twice"][0])

    with pytest.raises(OutOfOrderError, match=r"pair\.output, read at"), Model(Net()).trace(torch.ones(2)) as run:
        pair = run.pair.output
        run.last.output
        pair[1]["twice"][0][0] = 5


def test_in_a_function_of_each_and_in_an_edit():
    net, x = net_and_input()

    def body(row):
        hidden = row[0].output
        row[1].output
        hidden += 1

    with torch.no_grad():
        with pytest.raises(OutOfOrderError, match=LATE), Model(net).trace(x) as run:
            run.each(body)
        with pytest.raises(OutOfOrderError, match=LATE):
            Model(net).edit(body).trace(x).result


def test_what_is_no_late_edit():
    net, x = net_and_input()
    with torch.no_grad(), Model(net).trace(x) as run:
        run[0].output
        run[0].output[:] = 1  # the model stands there
        run[1].input
        run[0].output[0] = 2  # the same tensor as the one that the model stands at
        run[1].output
        run[0].output.clone().zero_()
    expected = torch.ones(2, 4)
    expected[0] = 2
    assert torch.equal(run.result, net[1:](expected))


def test_the_model_may_change_its_values_in_place():
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 4), nn.ReLU(inplace=True))
    with torch.no_grad(), Model(net).trace(torch.randn(2, 4)) as run:
        values = [run[0].output]
        values.append(run[1].input)
        values.append(run[1].output)
        values.append(run[2].output)
        values.append(run[3].output)
    assert values[0] is values[2] and values[0]._version == 1


def test_the_model_of_another_run_may_change_a_value_that_was_assigned_to_it():
    net, x = net_and_input()
    other = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 4))
    with torch.no_grad(), Model(net).trace(x) as run, Model(other).trace(x) as beside:
        hidden = run[0].output
        run[1].output
        beside[0].output = hidden
        beside[2].output
        run[2].output
    assert hidden._version == 1


def test_values_of_inference_mode_are_not_watched():
    net, x = net_and_input()
    with torch.inference_mode(), Model(net).trace(x) as run:
        hidden = run[0].output
        run[1].output
        hidden[:] = 0
    assert torch.equal(run.result, net(x))


def test_function_modes_of_the_user_do_not_see_it():
    seen = []

    class Mode(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            seen.append(function)
            return function(*args, **(kwargs or {}))

    net, x = net_and_input()
    with torch.no_grad(), Model(net).trace(x) as run:
        first = run[0].output
        with Mode():
            second = run[1].output
            third = run[2].output
    assert not [function for function in seen if "_version" in str(function)] and first is not second is not third


def test_the_model_may_stand_at_a_sparse_value():
    class Sparse(nn.Module):
        def forward(self, x):
            return x.to_sparse()

    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), Sparse())
    with pytest.raises(OutOfOrderError, match=r"\[0\].output, read at"), torch.no_grad():
        with Model(net).trace(torch.randn(2, 4)) as run:
            hidden = run[0].output
            run[2].output
            hidden += 1


class Twice(nn.Module):
    """Calls its layer twice with the same embedding."""

    def __init__(self):
        super().__init__()
        self.embed, self.layer = nn.Linear(4, 4), nn.Bilinear(4, 4, 4)
        self.same, self.last = nn.Dropout(), nn.Linear(4, 4)

    def forward(self, x):
        embedded = self.embed(x)
        for _ in range(2):
            x = self.same(self.layer(x, embedded))
        return self.last(x)


def twice():
    torch.manual_seed(0)
    net = Twice().eval()
    return net, torch.randn(2, 4)


def test_inputs_may_be_used_again():
    net, x = twice()
    with torch.no_grad():
        embedded = net.embed(x)
        expected = net.last(net.layer(net.layer(x, embedded), 2 * embedded))
        with Model(net).trace(x) as run:
            embedded = run.layer.inputs[0][1]
            run.same.output
            embedded.mul_(2)
            run.layer.calls[1].output
    assert torch.equal(run.result, expected)


def test_another_name_of_the_value_where_the_model_stands():
    net = nn.Sequential(nn.Linear(4, 4), nn.Dropout(), nn.Linear(4, 4)).eval()
    x = torch.randn(2, 4)
    with torch.no_grad():
        with Model(net).trace(x) as run:
            first, same = run[0].output, run[1].output
            same += 1
            run[1].output = 2 * same
            run[2].output
        assert first is not None and torch.equal(run.result, net[2](2 * (net[0](x) + 1)))


def test_a_value_that_is_assigned_ahead():
    net, x = net_and_input()
    with torch.no_grad(), Model(net).trace(x) as run:
        hidden = run[0].output
        run[1].input
        run[1].output
        hidden += 5
        run[2].output = hidden
    assert run.result is hidden


def test_what_the_body_has_computed_with_a_module():
    net, x = net_and_input()
    with torch.no_grad(), Model(net).trace(x) as run:
        hidden = run[0].output
        run[2](hidden, hook=True)
        own = run[2].output
        own.mul_(2)
        run[1].output
    with torch.no_grad(), pytest.raises(OutOfOrderError, match=LATE), Model(net).trace(x) as run:
        hidden = run[0].output
        run[2](hidden, hook=True)
        run[1].output
        hidden.zero_()


def test_a_bare_run_of_another_model():
    net, x = net_and_input()
    with torch.no_grad(), Model(net).trace(x) as run:
        hidden = run[0].output
        run[1].output
        Model(nn.Sequential(nn.ReLU(inplace=True))).trace(hidden).result
        run[2].output
    assert hidden._version == 1


def test_the_error_comes_once():
    net, x = net_and_input()
    with torch.no_grad(), Model(net).trace(x) as run:
        hidden = run[0].output
        run[1].output
        hidden.zero_()
        with pytest.raises(OutOfOrderError, match=LATE):
            run[2].output
        last = run[2].output
    assert torch.equal(last, net(x))


def test_a_value_in_which_another_row_was_assigned():
    net, x = net_and_input()
    with pytest.raises(OutOfOrderError, match=r"\[0\].output, read at .* after a part of it had been assigned"):
        with torch.no_grad(), Model(net).trace([x[:1], x[1:]]) as run:
            first, second = run.rows
            hidden = first[0].output
            second[0].output = torch.ones(1, 4)
            hidden.zero_()
    with torch.no_grad(), Model(net).trace([x[:1], x[1:]]) as run:
        first, second = run.rows
        first[0].output
        second[0].output = torch.ones(1, 4)
        first[0].output.zero_()
    assert torch.equal(run.result, net[1:](torch.tensor([[0.0] * 4, [1.0] * 4])))


def test_a_value_is_assigned_after_one_of_its_rows_while_others_are_watched():
    net, x = net_and_input()
    with torch.no_grad(), Model(net).trace([x[:1], x[1:]]) as run:
        first, second = run[0].output, run[1].output
        run.rows[0][1].output = torch.ones(1, 4)
        run[1].output = torch.zeros(2, 4)
    assert torch.equal(run.result, net[2](torch.zeros(2, 4)).detach()) and len(first) == len(second)


def test_a_value_of_the_users_own_may_be_trained_after_it_was_assigned():
    net, x = net_and_input()
    with Model(net).trace(x) as run:
        soft = run[0].output.detach().clone().requires_grad_()
        run[0].output = soft
        run[2].output.sum().backward()
        torch.optim.SGD([soft], 0.1).step()
    assert torch.allclose(soft, net[0](x) - 0.1 * soft.grad)


class Places(nn.Module):
    def __init__(self):
        super().__init__()
        self.places = nn.Parameter(torch.randn(8, 4))

    def forward(self, x):
        return self.places[: len(x)]


def test_a_part_of_a_parameter_may_be_trained():
    net, x = nn.Sequential(Places(), nn.Linear(4, 4)), torch.randn(3, 4)
    before = net[0].places.detach().clone()
    with Model(net).trace(x) as run:
        places = run[0].output
        run[1].output.sum().backward()
        torch.optim.SGD(net.parameters(), 0.1).step()
    assert places.shape == (3, 4) and not torch.equal(net[0].places, before)


def test_a_value_that_a_call_ahead_will_return():
    net, x = net_and_input()
    with torch.no_grad(), Model(net).trace(x) as run:
        hidden = run[0].output
        run[1].output
        run[2].skip(hidden.add_(1))
    assert run.result is hidden and torch.equal(hidden, net[0](x) + 1)


def test_values_of_rows_that_are_changed_in_place_and_assigned():
    net, x = net_and_input()
    with torch.no_grad():
        hidden = net[0](x)
        with Model(net).trace([x[:1], x[1:]]) as run:
            first, second = run.rows
            one, two = first[0].output, second[0].output
            for _ in range(2):
                one += 1
                first[0].output = one
            first[0].output = two + 1
            two *= 2
            second[0].output = two
            one.zero_()  # no longer of use to anybody
            run[2].output
            one.zero_()
        assert torch.allclose(run.result, net[1:](torch.stack([hidden[1] + 1, 2 * hidden[1]])))
        with Model(net).trace([x[:1], x[1:]]) as run:
            first, _ = run.rows
            whole = run[0].output
            first[0].output
            first[0].output = torch.ones(1, 4)
            run[0].output = whole
            whole += 1
        assert torch.allclose(run.result, net[1:](hidden + 1))


def test_a_whole_value_that_is_changed_in_place_after_a_row_was_assigned():
    net, x = net_and_input()
    with torch.no_grad(), Model(net).trace([x[:1], x[1:]]) as run:
        whole = run[0].output
        run.rows[1][0].output = torch.zeros(1, 4)
        run.rows[0][0].output = torch.ones(1, 4)
        whole[0] = 5
        with pytest.raises(OutOfOrderError, match="changed in place after a part of it had been assigned"):
            run[1].output


def test_rows_that_are_changed_in_place_beside_rows_that_are_assigned():
    def in_place(row):
        row[0].output.mul_(2)

    def twice(row):
        hidden = row[0].output
        for _ in range(2):
            hidden += 1
            row[0].output = hidden

    net, x = net_and_input()
    with torch.no_grad():
        with Model(net).trace([x[:1], x[1:]]) as run:
            run.each([in_place, twice])
        hidden = net[0](x)
        assert torch.allclose(run.result, net[1:](torch.stack([2 * hidden[0], hidden[1] + 2])))


def test_a_value_of_the_models_that_is_made_a_leaf():
    net, x = net_and_input()
    net.requires_grad_(False)
    with pytest.raises(OutOfOrderError, match=LATE.replace(r"\[1\]", r"\[2\]")), Model(net).trace(x) as run:
        hidden = run[0].output.requires_grad_()
        run[2].output.sum().backward()
        with torch.no_grad():
            hidden -= hidden.grad


class Kind(torch.Tensor):
    """A subclass that sees what is looked up on it."""

    seen: list = []

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        cls.seen.append(function)
        return super().__torch_function__(function, types, args, kwargs or {})


@dataclass
class Held:
    hidden: torch.Tensor
    more: object = None


class Gives(nn.Module):
    def __init__(self, make):
        super().__init__()
        self.make = make

    def forward(self, x):
        return self.make(x)


KINDS = {
    "a subclass": (lambda x: x.as_subclass(Kind) * 1, lambda value: value),
    "a dataclass": (lambda x: Held(x * 1), lambda value: value.hidden),
    "within others": (lambda x: {"held": Held(x * 1, [Held(x * 2)])}, lambda value: value["held"].more[0].hidden),
    "a subclass in a dataclass": (lambda x: Held(x.as_subclass(Kind) * 1), lambda value: value.hidden),
}


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("make, of", KINDS.values(), ids=KINDS)
def test_other_kinds_of_values(make, of, again):
    net, x = nn.Sequential(Gives(make), Gives(lambda value: of(value) * 1), nn.Tanh()), torch.ones(2, 4)
    with torch.no_grad(), Model(net).trace(x) as run:
        of(run[0].output).mul_(3)
    assert torch.equal(run.result, net[2](3 * net[:2](x)))
    with pytest.raises(OutOfOrderError, match=LATE), torch.no_grad(), Model(net).trace(x) as run:
        value = run[0].output
        run[1].output
        value = run[0].output if again else value
        of(value).zero_()
    with torch.no_grad(), Model(net).trace(x) as run:
        value = run[0].output
        Kind.seen.clear()
        run[1].input
        run[2].output
    assert not [function for function in Kind.seen if "_version" in str(function)] and value is not None


def test_a_dataclass_that_holds_the_value_where_the_model_stands():
    net, x = nn.Sequential(nn.Linear(4, 4), Gives(Held), Gives(lambda held: held.hidden * 2)), torch.ones(2, 4)
    with torch.no_grad(), Model(net).trace(x) as run:
        hidden = run[0].output
        run[1].output
        hidden.zero_()
    assert torch.equal(run.result, torch.zeros(2, 4))


def edits_late(run):
    hidden = run[0].output
    run[1].output
    hidden[:] = 0


def test_a_value_that_a_function_lets_go():
    net, x = net_and_input()
    with torch.no_grad():
        for goes_on in (False, True):
            with pytest.raises(OutOfOrderError, match=LATE), Model(net).trace(x) as run:
                edits_late(run)
                if goes_on:
                    run[2].output
        with pytest.raises(OutOfOrderError, match=LATE):
            Model(net).edit(edits_late).trace(x).result
        with pytest.raises(OutOfOrderError, match=LATE), Model(net).trace(x) as run:
            run.each(edits_late)


@pytest.mark.parametrize(
    "read",
    [
        lambda run: [layer.output for layer in run],
        lambda run: {number: layer.output for number, layer in enumerate(run)},
        lambda run: list(map(lambda layer: layer.output, run)),  # noqa: C417
    ],
    ids=["a list", "a dictionary", "map"],
)
def test_values_that_a_function_reads_in_an_expression(read):
    def ablate(run):
        read(run)[0].zero_()

    net, x = net_and_input()
    with torch.no_grad(), pytest.raises(OutOfOrderError, match="in place too late"), Model(net).trace(x) as run:
        ablate(run)
    with torch.no_grad(), Model(net).trace(x) as run:  # here they last
        hidden = [layer.output for layer in run]
    assert len(hidden) == 3


def test_what_a_function_may_change():
    def at_the_point(run):
        run[0].output.zero_()

    def shared(run):
        hidden = run[0].output
        run[1].input
        hidden.add_(1)

    def ahead(run):
        hidden = run[1].output
        run[2].input
        run[2].input = hidden.add_(1)

    def own(run):
        hidden = run[1].output.clone()
        run[2].input
        hidden.zero_()

    net, x = net_and_input()
    with torch.no_grad(), Model(net).trace(x) as run:
        for change in (at_the_point, shared, ahead, own):
            change(run)
    assert torch.equal(run.result, net[2](net[1](torch.ones(2, 4)) + 1))


def test_the_model_may_change_what_a_function_has_let_go():
    class Buffer(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("kept", torch.zeros(2, 4))

        def forward(self, x):
            return self.kept[:]

    class Writes(nn.Module):
        def __init__(self, buffer):
            super().__init__()
            self.__dict__["buffer"] = buffer

        def forward(self, x):
            self.buffer.kept.add_(1)
            return x + self.buffer.kept

    def read(run):
        return run[0].output.sum()

    buffer, x = Buffer(), torch.zeros(2, 4)
    with torch.no_grad(), Model(nn.Sequential(buffer, nn.Dropout(0), Writes(buffer))).trace(x) as run:
        read(run)
        run[1].input
        run[2].output
    assert torch.equal(run.result, torch.full((2, 4), 2.0))


def test_a_part_of_a_parameter_that_a_function_lets_go_may_be_trained():
    net, x = nn.Sequential(Places(), nn.Linear(4, 4)), torch.randn(3, 4)

    def train(run):
        places = run[0].output
        run[1].output.sum().backward()
        assert places.requires_grad
        torch.optim.SGD(net.parameters(), 0.1).step()

    before = net[0].places.detach().clone()
    with Model(net).trace(x) as run:
        train(run)
    assert not torch.equal(net[0].places, before)


def test_a_value_that_a_function_lets_go_takes_no_memory():
    arrays = []

    def make(x):
        array = numpy.ones((2, 4), numpy.float32)
        arrays.append(ref(array))
        return torch.from_numpy(array)

    def read(run):
        value = run[0].output
        run[2].output
        assert arrays[0]() is not None
        return value.shape

    net = nn.Sequential(Gives(make), Gives(lambda x: x * 2), nn.Tanh())
    with torch.no_grad(), Model(net).trace(torch.ones(2, 4)) as run:
        read(run)
        assert arrays[0]() is None
