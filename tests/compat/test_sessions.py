"""Sessions: runs that are grouped, and blocks that are repeated."""

import pytest
import torch

from diffsight import Model
from diffsight.compat import NNsight
from diffsight.errors import AssignmentError, RunClosedError, SourceError
from diffsight.extending import flow_of
from helpers import footprint, outputs, replaced
from models.nets import Net, inputs


@pytest.fixture
def net():
    return Net()


@pytest.fixture
def x():
    return inputs()


@pytest.fixture
def model(net):
    return NNsight(net)


def test_values_flow_between_runs(model, net, x):
    other = inputs(1)
    with model.session():
        with model.trace(x):
            hidden = model.layers[2].output
        with model.trace(other) as run:
            model.layers[0].output = hidden
    late = outputs(net.layers[2], net, x)[0]
    with replaced(net.layers[0], lambda out: late):
        assert torch.equal(run.result, net(other))


def test_open_runs_are_finished_in_order(model, net, x):
    second = NNsight(Net(seed=1))
    with model.session() as session:
        first_run = model.trace(x)
        first_run.layers[0].output[:] = 0
        second_run = second.trace(x)
        assert session.runs == [first_run, second_run] and repr(session) == "<session with 2 open runs>"
        done = model.trace(x).result
    with replaced(net.layers[0], torch.zeros_like):
        expected = net(x)
    assert session.runs == [] and torch.equal(first_run.result, expected) and torch.equal(done, net(x))
    assert torch.equal(second_run.result, Net(seed=1)(x))


def test_an_error_closes_the_runs(model, net, x):
    before = footprint(net)
    with pytest.raises(KeyError), model.session():
        run = model.trace(x)
        run.layers[0].output
        raise KeyError("mine")
    assert footprint(net) == before and net.log[-1] == "layers[0]"
    with pytest.raises(RunClosedError, match="an error ended its session"):
        run.layers[1].output


def test_an_error_of_one_run_at_the_end_closes_the_others(model, net, x):
    before = footprint(net)
    with pytest.raises(AssignmentError), model.session():
        broken = model.trace(x)
        broken.layers[0].output = torch.zeros(2, 9)
        other = model.trace(x)
        other.layers[0].output
    assert footprint(net) == before
    with pytest.raises(RunClosedError):
        other.result


def test_sessions_in_sessions(model, x):
    with model.session() as outer:
        with model.session() as inner:
            run = model.trace(x)
            assert outer.runs == inner.runs == [run]
        assert flow_of(run).has_result and outer.runs == []
    apart = model.trace(x)
    assert outer.runs == [] and apart.layers[0].output.shape == x.shape


def test_a_dropped_run_is_not_kept(model, net, x):
    with model.session() as session:
        model.trace(x).layers[0].output
        assert session.runs == [] and net.log == ["first", "layers[0]"]


# ---- iter


@pytest.fixture
def prompts():
    return [inputs(seed) for seed in range(3)]


def test_iter_in_a_loop(model, net, prompts):
    with model.session() as session:
        seen = []
        for prompt in session.iter(prompts):
            seen.append(model.trace(prompt).layers[1].output)
    assert all(torch.equal(a, outputs(net.layers[1], net, x)[0]) for a, x in zip(seen, prompts)) and len(seen) == 3


def test_iter_of_a_block(model, net, prompts):
    total, states = 0, []
    with model.session() as session:
        with session.iter(prompts) as prompt:
            with model.trace(prompt) as run:
                states.append(model.layers[1].output)
            total = total + run.result.sum()
    assert len(states) == 3 and all(torch.equal(a, outputs(net.layers[1], net, x)[0]) for a, x in zip(states, prompts))
    expected = 0
    for one in prompts:
        expected = expected + net(one).sum()
    assert torch.equal(total, expected) and prompt is prompts[-1] and torch.equal(run.result, net(prompts[-1]))


def test_iter_with_a_function(model, net, prompts):
    with model.session() as session:
        results = session.iter(prompts)(lambda prompt: model.trace(prompt).result)
    assert all(torch.equal(a, net(x)) for a, x in zip(results, prompts)) and len(results) == 3


def test_iter_in_iter(model):
    pairs = []
    with model.session() as session:
        with session.iter([[0, 1], [2]]) as outer:
            with session.iter(outer) as inner:
                pairs.append((outer, inner))
            last = inner
    assert pairs == [([0, 1], 0), ([0, 1], 1), ([2], 2)] and (outer, inner, last) == ([2], 2, 2)


def test_break_leaves_a_for_loop_over_iter(model):
    with model.session() as session:
        for item in session.iter(range(10)):
            if item == 4:
                break
    assert item == 4
    with pytest.raises(SourceError, match="it cannot contain `break`"):
        for _ in range(2):
            with session.iter(range(10)) as item:
                break


def test_iter_over_pairs_and_nothing(model):
    seen, item = [], "as it was"
    with model.session() as session:
        with session.iter({"a": 1, "b": 2}.items()) as (name, number):
            seen.append(name * number)
        with session.iter([]) as item:
            seen.append(item)
        with session.iter("ab"):
            seen.append("again")
    assert seen == ["a", "bb", "again", "again"] and (name, number, item) == ("b", 2, "as it was")


def test_names_that_closures_use_are_bound(model):
    """Names that an inner function refers to are bound as well."""
    count = 0

    def tell():
        return count

    with model.session() as session:
        with session.iter([1, 2, 3]) as item:
            count += item
    assert tell() == 6


SCRIPT = """
total = 0
with session.iter([1, 2, 3]) as item:
    total += item
def tell():
    return total, item
"""


def test_iter_at_the_top_of_a_script(tmp_path, model):
    file = tmp_path / "script.py"
    file.write_text(SCRIPT)
    names = {"session": model.session()}
    exec(compile(SCRIPT, str(file), "exec"), names)
    assert names["tell"]() == (6, 3)


def test_an_error_in_a_repeated_block(model, net, x):
    before = footprint(net)
    with pytest.raises(KeyError, match="1") as caught, model.session() as session:
        with session.iter(range(3)) as item:
            run = model.trace(x)
            run.layers[item].output
            if item:
                raise KeyError(item)
    assert str(caught.traceback[-1].path) == __file__ and footprint(net) == before


def test_names_assigned_before_an_error_are_bound(model):
    """As after a loop."""
    count = 0
    with pytest.raises(ZeroDivisionError), model.session() as session:
        with session.iter([2, 1, 0, 5]) as item:
            count += 1
            quotient = 4 // item
    assert (count, item, quotient) == (3, 0, 4)


def test_a_block_may_use_the_name_locals(model):
    locals = {"count": 0}
    with model.session() as session:
        with session.iter([1, 2]) as item:
            locals["count"] += item
            total = locals["count"]
    assert locals == {"count": 3} and total == 3


def test_runs_of_native_models_are_not_grouped(net, x):
    with NNsight(net).session() as session:
        run = Model(net).trace(x)
        run.layers[0].output
        assert session.runs == []
    assert not flow_of(run).has_result


def test_iter_without_source(model):
    with pytest.raises(SourceError, match="cannot be read"):
        exec("with session.iter([1]) as item: print(item)", {"session": model.session()})
