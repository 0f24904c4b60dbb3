"""Forward hooks that users have put on a module: the module's output is what the model continues with after them."""

import collections
import functools

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from diffsight import Model
from diffsight.errors import DiffsightError
from helpers import footprint
from models.nets import Direct

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
    for part in [output]:
        part.mul_(2)


def change_by_keyword(module, args, output):
    torch.nn.functional.relu(output, inplace=True)


def change_by_operator(module, args, output):
    hidden = output if args else None
    hidden[:, 0 if args else 1] += 1


class Changer:
    def __init__(self):
        self.calls = 0

    def __call__(self, module, args, output):
        self.calls += 1
        output.data[:, 1] = self.calls


def store_by_name(store, name, module, args, output):
    store[name] = output


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


def capturing_hooks(keeper):
    """Hooks of one line, or with a decorator, that add the output to `keeper.seen`."""
    by_name, name, add = collections.defaultdict(list, layer=keeper.seen), "layer", keeper.seen.append
    plain = dict(by_name)

    @torch.no_grad()
    def decorated(module, args, output):
        keeper.seen.append(output)

    return {
        "of an attribute": lambda module, args, output: keeper.seen.append(output),
        "of a copy": lambda module, args, output: keeper.seen.append(output.detach().cpu()),
        "by name": lambda module, args, output: by_name[name].append(output),
        "a default": lambda module, args, output, key="layer": by_name[key].append(output),
        "setdefault": lambda module, args, output: plain.setdefault("layer", []).append(output),
        "a method": lambda module, args, output: keeper.keep(module, args, output),
        "a bound method": lambda module, args, output: add(output),
        "setattr": lambda module, args, output: setattr(keeper, "seen", [output]),
        "a choice": lambda module, args, output: add(output[0] if isinstance(output, tuple) else output),
        "a condition": lambda module, args, output: keeper.seen.append(output) if args else None,
        "decorated": decorated,
    }


@pytest.mark.parametrize("kind", capturing_hooks(Keeper()))
def test_hooks_of_one_line_that_only_look_see_the_edit(net, x, layer, kind):
    keeper = Keeper()
    layer.register_forward_hook(capturing_hooks(keeper)[kind])
    value = torch.full_like(x, 3.0)
    with torch.no_grad(), Model(net).trace(x) as run:
        run.layers[0].output = value
    assert torch.equal(keeper.seen[0], value)


REPLACING = {
    "or": lambda module, args, output: SEEN.append(output) or output * 2,
    "a choice": lambda module, args, output: None if len(args) > 1 else output * 2,
    "a function": lambda module, args, output: torch.mul(output, 2),
    "a condition": lambda module, args, output: output * 2 if args else SEEN.append(output),
}


@pytest.mark.parametrize("hook", REPLACING.values(), ids=REPLACING)
def test_hooks_of_one_line_that_may_replace_the_output(net, x, layer, hook):
    layer.register_forward_hook(hook)
    with torch.no_grad(), Model(net).trace(x) as run:
        given = run.layers[0].input
        assert torch.equal(run.layers[0].output, 2 * layer.forward(given))


IN_PLACE = [assign_a_part, change_by_name, change_by_keyword, change_by_operator, Changer()]


@pytest.mark.parametrize("hook", IN_PLACE, ids=lambda hook: getattr(hook, "__name__", "object"))
def test_the_output_is_what_a_hook_has_made_of_it_in_place(net, x, layer, hook):
    bare = layer(net.first(x))
    handle = layer.register_forward_hook(hook)
    with torch.no_grad(), Model(net).trace(x) as run:
        kept = run.record("layers[0].output")
        output = run.layers[0].output.clone()
        assert torch.equal(output, run.layers[1].input) and not torch.equal(output, bare)
    assert torch.equal(kept["layers[0].output"], output)
    with torch.no_grad(), Model(net).trace(x) as run:
        run.layers[0].output = torch.full_like(x, -3.0)
        assert torch.equal(run.layers[1].input, torch.full_like(x, -3.0))
    handle.remove()


def test_the_output_of_the_model_and_of_modules_with_a_hook_for_all(net, x, layer):
    def hook(module, args, output):
        if module is layer or module is net:
            output.zero_()

    handles = [net.register_forward_hook(hook), register_module_forward_hook(hook)]
    try:
        with torch.no_grad(), Model(net).trace(x) as run:
            assert not run.layers[0].output.any()
            assert not run.output.any()
    finally:
        for handle in handles:
            handle.remove()


def test_hooks_that_store_what_they_see_see_the_edit(net, x, layer):
    stored, counts = {}, {"all": 0}

    def store(module, args, output):
        counts["all"] += 1
        changed = output.clone()
        changed[:, 0] = 0
        stored[0], stored[1] = output, changed

    layer.register_forward_hook(store)
    layer.register_forward_hook(functools.partial(store_by_name, stored, 2))
    layer.register_forward_hook(lambda module, args, output: stored.update({3: output}))
    value = torch.full_like(x, 3.0)
    with Model(net).trace(x) as run:
        run.layers[0].output = value
    assert counts == {"all": 1} and all(torch.equal(stored[name], value) for name in (0, 2, 3))


@pytest.mark.parametrize("before", [False, True])
def test_a_hook_that_calls_a_function_that_changes_the_output_is_refused(net, x, layer, before):
    if before:
        layer.register_forward_hook(lambda module, args, output: output + 1)
    layer.register_forward_hook(change_elsewhere)
    clean = footprint(net)
    with torch.no_grad():
        expected = net(x)
        with Model(net).trace(x) as run:  # a value inside the layer
            run.record("layers[0].input")
            run.layers[0].out.output
        assert torch.equal(run.result, expected)
        with pytest.raises(DiffsightError, match=r"layers\[0\].output is changed in place by a hook"):
            with Model(net).trace(x) as run:
                run.layers[0].output
                run.layers[1].output
    assert footprint(net) == clean


def test_a_hook_that_calls_a_function_that_looks(net, x, layer):
    layer.register_forward_hook(lambda module, args, output: SEEN.append(keep_named("layer", module, args, output)))
    SEEN.clear()
    with torch.no_grad(), Model(net).trace(x) as run:
        run.layers[0].output = x
        run.layers[1].output *= 2
    assert torch.equal(SEEN[0][1], x)


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


def keep_and_change(module, args, output):
    module.kept = output
    module.kept.mul_(2)


def add_to_list(module, args, output):
    output["all"].append(output["last"])


def update(module, args, output):
    output.update(last=output["last"] * 2)


def set_attribute(module, args, output):
    setattr(output, "last", output.last * 2)  # noqa: B010 - not an assignment


class Output:
    def __init__(self, held):
        self.__dict__.update(held)


class Returns(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    def forward(self, x):
        return x.sin() if self.kind is None else self.kind({"last": x.sin(), "all": [x]})


class Takes(nn.Module):
    def forward(self, x):
        held = vars(x) if isinstance(x, Output) else x
        return x if isinstance(x, torch.Tensor) else held["last"] + sum(held["all"])


@pytest.mark.parametrize(
    ("kind", "hook"), [(None, keep_and_change), (dict, add_to_list), (dict, update), (Output, set_attribute)]
)
def test_a_hook_that_changes_the_output_unforeseen(kind, hook):
    net, x = nn.Sequential(nn.Linear(4, 4), Returns(kind), Takes()), torch.randn(2, 4)
    with torch.no_grad():
        net[1].register_forward_hook(hook)
        expected = net(x)
        with Model(net).trace(x) as run:
            assert torch.equal(run[2].output, expected)
        with pytest.raises(DiffsightError, match=r"\[1\]\.output is changed in place by a hook on the module"):
            with Model(net).trace(x) as run:
                run[1].output
    assert len(net[1]._forward_hooks) == 1


def test_a_hook_that_calls_the_forward_pass():
    """As hooks do that run a module again without calling themselves."""
    layer, x, seen = nn.Linear(4, 4), torch.randn(2, 4), []
    net = nn.Sequential(nn.Linear(4, 4), layer, nn.Tanh(), layer)
    with torch.no_grad():
        layer.register_forward_pre_hook(lambda module, args: (module.forward(args[0]),))
        layer.register_forward_hook(lambda module, args, output: output - module.forward(args[0] * 0))
        last = layer.register_forward_hook(lambda module, args, output: seen.append(output))
        net(x)
        last.remove()
        with Model(net).trace(x) as run:
            assert torch.equal(run[1].output, seen[0])
            assert torch.equal(run[1].calls[1].output, seen[1])
        with Model(net).trace(x) as run:
            run[1].calls[1].output = torch.ones(2, 4)
        assert torch.equal(run.result, torch.ones(2, 4))
        with Model(net).trace(x) as run:
            kept = run.record("[1]")
    assert list(map(torch.equal, kept["[1].output"], seen)) == [True, True]


def test_a_direct_call_of_forward_has_no_hooks():
    net, x = Direct(), torch.randn(2, 4)
    net.inner.register_forward_hook(lambda module, args, output: output + 1)
    with torch.no_grad(), Model(net).trace(x) as run:
        assert torch.equal(run.inner.output, net(x))


def test_a_hook_that_only_fills_a_cache_of_the_output():
    class Lazy:
        looked = 0

        def __init__(self, x):
            self.x = x

        @functools.cached_property
        def norm(self):
            self.looked += 1
            return self.x.norm()

    class Wraps(nn.Module):
        def forward(self, x):
            return Lazy(x)

    net, x = nn.Sequential(nn.Linear(4, 4), Wraps()), torch.randn(2, 4)
    net[1].register_forward_hook(lambda module, args, output: SEEN.append(output.norm))
    with torch.no_grad(), Model(net).trace(x) as run:
        assert torch.equal(run[1].output.x, net[0](x))
    SEEN.clear()


def test_a_hook_for_all_modules_that_calls_the_forward_pass(net, x, layer):
    seen = []
    look = layer.register_forward_hook(lambda module, args, output: seen.append(output))
    net(x)
    look.remove()
    hook = register_module_forward_hook(
        lambda module, args, output: SEEN.append(module.forward(args[0] * 0)) if module is layer else None
    )
    try:
        with Model(net).trace(x) as run:
            assert torch.equal(run.layers[0].output, seen[0])
    finally:
        hook.remove()
        SEEN.clear()


def test_a_change_in_place_in_inference_mode(net, x, layer):
    layer.register_forward_hook(keep_and_change)
    with pytest.raises(DiffsightError, match=r"layers\[0\]\.output is changed in place by a hook"):
        with torch.inference_mode(), Model(net).trace(x) as run:
            run.layers[0].output = torch.ones_like(x)


def test_a_direct_call_whose_output_is_returned_again():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.same = nn.Identity()

        def forward(self, x):
            return self.same(self.same.forward(x).add_(1))

    net, x = Twice(), torch.randn(2, 4)
    net.same.register_forward_hook(lambda module, args, output: SEEN.append(output))
    with torch.no_grad(), Model(net).trace(x.clone()) as run:
        first = run.same.output.clone()
    assert torch.equal(first, x) and torch.equal(run.result, x + 1)
    SEEN.clear()


def test_a_hook_that_the_model_registers_calls_the_forward_pass():
    class Registers(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.inner = nn.Linear(4, 4), nn.Tanh()

        def forward(self, x):
            x = self.first(x)
            hook = self.inner.register_forward_hook(lambda module, args, output: output + module.forward(args[0] * 2))
            try:
                return self.inner(self.inner(x))
            finally:
                hook.remove()

    net, x = Registers(), torch.randn(2, 4)
    with torch.no_grad(), Model(net).trace(x) as run:
        hidden = run.first.output
        once = hidden.tanh() + (hidden * 2).tanh()
        assert torch.equal(run.inner.output, once)
        assert torch.equal(run.inner.calls[1].output, once.tanh() + (once * 2).tanh())
