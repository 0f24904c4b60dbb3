"""Forward hooks that users have put on a module: the module's output is what the model continues with after them."""

import functools

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from diffsight import Model
from diffsight.errors import DiffsightError
from helpers import footprint

SEEN: list = []


class Keeper:
    def __init__(self):
        self.seen = []

    def __call__(self, module, args, output):
        self.seen.append(output)

    def keep(self, module, args, output):
        if args:
            self.seen.append(output)
            return
        self.seen = []


def keep_in(seen):
    def keep(module, args, output):
        for one in [output]:
            seen.append(one)

    return keep


def keep_named(name, module, args, output):
    SEEN.append((name, output))


def assign_a_part(module, args, output):
    output[:, 0] = 0


def change_by_name(module, args, output):
    output.mul_(2)


def change_by_keyword(module, args, output):
    torch.nn.functional.relu(output, inplace=True)


def change_elsewhere(module, args, output):
    assign_a_part(module, args, output)


@pytest.fixture
def layer(net):
    return net.layers[0]


@pytest.fixture
def plus_one(layer):
    return layer.register_forward_hook(lambda module, args, output: output + 1)


def test_the_output_is_what_the_model_continues_with(net, x, layer, plus_one):
    expected, before = net(x), footprint(net)
    with Model(net).trace(x) as run:
        kept = run.record("layers[0].output")
        output = run.layers[0].output
        following = run.layers[1].input
    assert output is following
    assert torch.equal(kept["layers[0].output"], output)
    assert torch.equal(run.result, expected)
    assert footprint(net) == before


def test_an_assigned_output_stays(net, x, layer, plus_one):
    value = torch.zeros_like(x)
    with Model(net).trace(x) as run:
        run.layers[0].output = value
        assert torch.equal(run.layers[1].input, value)


@pytest.mark.parametrize("changes_before", [False, True])
@pytest.mark.parametrize("kind", ["append", "function", "object", "method", "partial"])
def test_hooks_that_only_look_see_the_edit(net, x, layer, kind, changes_before):
    seen, keeper = [], Keeper()
    SEEN.clear()
    if changes_before:
        layer.register_forward_hook(lambda module, args, output: output * 2)
    hook = {
        "append": lambda module, args, output: seen.append(output.clone()),
        "function": keep_in(seen),
        "object": keeper,
        "method": keeper.keep,
        "partial": functools.partial(keep_named, "layer"),
    }[kind]
    layer.register_forward_hook(hook)
    value = torch.full_like(x, 3.0)
    with Model(net).trace(x) as run:
        run.layers[0].output = value
    looked_at = [*seen, *keeper.seen, *(output for _, output in SEEN)]
    assert len(looked_at) == 1
    assert torch.equal(looked_at[0], value)


IN_PLACE = [assign_a_part, change_by_name, change_by_keyword, change_elsewhere]


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("hook", IN_PLACE)
def test_a_hook_that_changes_the_output_in_place_is_refused(net, x, layer, hook, before):
    if before:
        layer.register_forward_hook(lambda module, args, output: output + 1)
    layer.register_forward_hook(hook)
    clean = footprint(net)
    with torch.no_grad():
        want = net(x)
        assert torch.equal(Model(net).trace(x).result, want)  # nothing is read
        with pytest.raises(DiffsightError, match=r"layers\[0\].output is changed in place by a hook"):
            with Model(net).trace(x) as run:
                run.layers[0].output
                run.layers[1].output
        with pytest.raises(DiffsightError, match=r"layers\[0\].output is changed in place by a hook"):
            with Model(net).trace(x) as run:
                run.layers[0].output = torch.ones_like(x)
    assert footprint(net) == clean


def test_a_hook_for_all_modules_that_changes_an_output_in_place_is_refused(net, x, layer):
    def hook(module, args, output):
        if module is layer:
            output.zero_()

    handle = register_module_forward_hook(hook)
    try:
        with pytest.raises(DiffsightError, match="changed in place by a hook"), torch.no_grad():
            with Model(net).trace(x) as run:
                run.record("layers[0].output")
    finally:
        handle.remove()


def test_hooks_run_in_their_own_order(net, x, layer):
    seen = []
    layer.register_forward_hook(lambda module, args, output: seen.append(output))
    layer.register_forward_hook(lambda module, args, output: output + 1)
    layer.register_forward_hook(lambda module, args, output: seen.append(output))
    net(x)
    bare, order = list(seen), list(layer._forward_hooks)
    seen.clear()
    with Model(net).trace(x) as run:
        output = run.layers[0].output
    assert list(map(torch.equal, seen, bare)) == [True, True]
    assert output is seen[1]
    assert list(layer._forward_hooks) == order


def test_a_hook_that_may_change_something_or_not(net, x, layer):
    layer.register_forward_hook(lambda module, args, output: output + 1 if output.sum() > 0 else None)
    with Model(net).trace(x) as run:
        assert run.layers[0].output is run.layers[1].input


def test_hooks_of_all_modules(net, x, layer):
    hook = register_module_forward_hook(lambda module, args, output: output + 1 if module is layer else None)
    try:
        with Model(net).trace(x) as run:
            assert run.layers[0].output is run.layers[1].input
    finally:
        hook.remove()


def test_steps_and_rows(net, x, layer, plus_one):
    batch = torch.cat([x, x * 2])
    with Model(net).trace([x, x * 2]) as run:
        run.rows[0].layers[0].output = torch.zeros_like(x)
        other = run.rows[1].layers[0].output
        got = run.layers[1].input
    assert torch.equal(got[: len(x)], torch.zeros_like(x))
    assert torch.equal(got[len(x) :], other)
    assert batch.shape == got.shape


def test_nothing_stays_after_an_error_in_the_body(net, x, layer, plus_one):
    before = footprint(net)
    with pytest.raises(ZeroDivisionError):
        with Model(net).trace(x) as run:
            run.layers[0].output
            raise ZeroDivisionError
    assert footprint(net) == before


def test_skipped_modules(net, x, layer, plus_one):
    with Model(net).trace(x) as run:
        run.layers[0].skip(torch.zeros_like(x))
        assert torch.equal(run.layers[0].output, torch.ones_like(x))
        assert torch.equal(run.layers[1].input, torch.ones_like(x))


class RegistersAHook(nn.Module):
    """Calls its last layer with a hook before it that it registers itself, and removes again."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        handle = self.last.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
        try:
            return self.last(self.first(x))
        finally:
            handle.remove()


def test_the_input_is_what_the_module_gets_after_hooks_that_the_model_registers():
    torch.manual_seed(0)
    net, x = RegistersAHook(), torch.randn(2, 4)
    with torch.no_grad():
        with Model(net).trace(x) as run:
            assert torch.equal(run.last.input, net.first(x) * 2)
        with Model(net).trace(x) as run:
            run.last.input = torch.ones(2, 4)
        assert torch.equal(run.result, net.last(torch.ones(2, 4)))
    assert not net.last._forward_pre_hooks


def test_the_input_is_what_the_module_gets_after_hooks_that_the_body_registers(net, x):
    value = torch.zeros_like(x)
    with Model(net).trace(x) as run, Model(net).trace(x) as other:
        run.last.input = value
        other.last.input = value + 1
        handle = net.last.register_forward_pre_hook(lambda module, args: (args[0] + 5,))
        given, others = run.last.output, other.last.output
    handle.remove()
    assert torch.equal(given, net.last(value)) and torch.equal(others, net.last(value + 1))
    assert not net.last._forward_pre_hooks
