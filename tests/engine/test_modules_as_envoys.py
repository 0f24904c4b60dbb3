"""Lists, dictionaries, attributes and methods of a model return envoys in a run, never modules that take no values."""

import collections
import dataclasses
import types
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from diffsight import Model
from diffsight.errors import AssignmentError, InputError, NeverReachedError, OutOfOrderError


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.named = nn.ModuleDict({"one": nn.Linear(4, 4), "two": nn.Linear(4, 4)})
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.scales, self.shifts = nn.ParameterList([torch.ones(4)]), nn.ParameterDict({"a": torch.zeros(4)})
        self.last = nn.Tanh()
        self.space, self.find = SimpleNamespace(last=self.last, size=4), lambda: self.last
        self.nested, self.number = {"last": [("tanh", self.last)]}, lambda: 4
        self.__dict__["hidden"] = nn.Linear(4, 4)
        self.kept = [nn.Linear(4, 4)]  # in a plain list, so not registered

    def blocks(self):
        yield from self.named.values()
        yield self.last

    def new(self):
        return nn.Linear(4, 4)

    def forward(self, x):
        for layer in (*self.named.values(), *self.layers, self.hidden, self.kept[0]):
            x = layer(x)
        return self.last(x * self.scales[0] + self.shifts["a"])


@pytest.fixture
def net():
    torch.manual_seed(0)
    with torch.no_grad():
        yield Net()


X, ZERO = torch.ones(2, 4), torch.zeros(2, 4)

WAYS = {
    "values": lambda run: next(iter(run.named.values())),
    "items": lambda run: dict(run.named.items())["one"],
    "iteration": lambda run: run.named[next(iter(run.named))],
    "a slice": lambda run: run.layers[1:][0],
    "reversed": lambda run: next(reversed(run.layers)),
    "a namespace": lambda run: run.space.last,
    "a function": lambda run: run.find(),
    "nested containers": lambda run: run.nested["last"][0][1],
    "a generator": lambda run: [*run.blocks()][-1],
    "itself": lambda run: run.named.one.eval(),
    "out of another": lambda run: run.layers[0].train(False),
    "unregistered": lambda run: run.hidden,
    "unregistered in a list": lambda run: run.kept[0],
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_a_value_is_assigned_to_the_envoy(net, way):
    plain = way(net)
    handle = plain.register_forward_hook(lambda *_: ZERO)
    expected = net(X)
    handle.remove()
    with Model(net).trace(X) as run:
        way(run).output = ZERO
    assert torch.equal(run.result, expected) and not any("output" in vars(module) for module in net.modules())


def test_a_dictionary_of_modules(net):
    model = Model(net)
    with model.trace(X) as run:
        for named in (run.named, model.named):
            assert [*named] == [*named.keys()] == ["one", "two"] and [*reversed(named)] == ["two", "one"]
            assert len(named) == 2 and "one" in named and "three" not in named
            assert [module.path for module in named.values()] == ["named.one", "named.two"]
            assert {name: module.path for name, module in named.items()} == {"one": "named.one", "two": "named.two"}
            assert [*named.values()] == [named.one, named["two"]] == named[:]
    assert "named" in run and "one" not in run
    model = Model(nn.Sequential(net.named["one"], nn.Tanh()))
    with model.trace(X) as run:
        assert run[0] in run and net.named["one"] in run and [*reversed(run)] == [run[1], run[0]]


def test_a_list_of_modules(net):
    with Model(net).trace(X) as run:
        layers = run.layers
        assert layers[1] in layers and net.layers[1] in layers and run.last not in layers
        assert [*layers].index(layers[2]) == 2 and [*reversed(layers)] == [layers[2], layers[1], layers[0]]
        assert layers[0] != layers[1] and len({layers[0], layers[0], layers[1]}) == 2
        assert layers[0].calls[1] != layers[0].calls[0] == layers[0].calls[0] and layers[0] != 3


def test_lists_and_dictionaries_of_parameters(net):
    with Model(net).trace(X) as run:
        assert next(iter(run.scales)) is run.scales[0] is run.scales[-1] is net.scales[0] and len(run.scales) == 1
        assert [*run.shifts] == ["a"] and "a" in run.shifts and run.shifts["a"] is net.shifts["a"]


class Stages(nn.Module):
    """Counts from one, and iterates from the last to the first."""

    def __init__(self):
        super().__init__()
        self.layer1, self.layer2, self.layer3 = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.__dict__["apart"] = nn.Linear(4, 4)

    def __getitem__(self, i):
        return [self[1], self.layer2] if isinstance(i, slice) else getattr(self, "apart" if i == "end" else f"layer{i}")

    def __iter__(self):
        return iter([self.layer3, self.layer2, self.layer1])

    def __reversed__(self):
        return iter([self.layer2])

    def __len__(self):
        return 7

    def __contains__(self, item):
        return item is self.apart or item == "any"

    def forward(self, x):
        return self.apart(self[3](self[2](self[1](x))))


OWN_WAYS = {
    "an index": lambda net: net[2],
    "a slice": lambda net: net[:][0],
    "a name": lambda net: net["end"],
    "a path": lambda net: net["layer2"],
    "iteration": lambda net: next(iter(net)),
    "reversed": lambda net: next(reversed(net)),
}


@pytest.mark.parametrize("way", [*OWN_WAYS.values()], ids=OWN_WAYS)
@pytest.mark.parametrize("within", [lambda net: net[0], lambda net: net[1].inner], ids=["child", "deeper"])
def test_special_methods_of_a_class_are_its_own(way, within):
    torch.manual_seed(0)
    holder = nn.Module()
    holder.inner = Stages()
    holder.forward = holder.inner.forward
    net = nn.Sequential(Stages(), holder)
    plain = within(net).layer2 if way is OWN_WAYS["a path"] else way(within(net))
    model = Model(net)
    with torch.no_grad():
        hook = plain.register_forward_hook(lambda *_: ZERO)
        expected = net(X)
        hook.remove()
        with model.trace(X) as run:
            way(within(run)).output = ZERO
        assert torch.equal(run.result, expected)
        outside = way(within(model))
        with model.trace(X) as run:
            outside.output = ZERO
            stages = within(run)
            assert len(stages) == 7 and stages and stages["end"] in stages and "any" in stages
            assert stages[1] not in stages and "layer1" not in stages
        assert torch.equal(run.result, expected)


class OwnList(nn.ModuleList):
    def __getitem__(self, i):
        return collections.UserList(self[:]) if i == "held" else super().__getitem__(i)

    def tail(self):
        return self[1:]


class OwnSequential(nn.Sequential):
    def __getitem__(self, i):
        return super().__getitem__(i)


OF_OWN_CONTAINERS = {
    "a slice of a list": (OwnList, lambda blocks: blocks[1:]),
    "a slice by a method": (OwnList, lambda blocks: blocks.tail()),
    "a slice of a Sequential": (OwnSequential, lambda blocks: blocks[1:]),
}


@pytest.mark.parametrize(("kind", "tail"), OF_OWN_CONTAINERS.values(), ids=OF_OWN_CONTAINERS)
def test_slices_of_containers_with_special_methods_hold_envoys(kind, tail):
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    blocks = kind().extend(net)
    plain = nn.Module()
    plain.blocks, plain.forward = blocks, net.forward
    with torch.no_grad(), Model(plain).trace(X) as run:
        assert [block.path for block in tail(run.blocks)] == ["blocks[1]", "blocks[2]"]
        value, _ = [block.output for block in tail(run.blocks)]
    assert torch.equal(value, net[:2](X)) and torch.equal(run.result, net(X))
    with torch.no_grad(), Model(plain).trace(X) as run:
        for block in tail(run.blocks):
            block.output = ZERO
    assert run.result is ZERO


def test_an_assignment_to_a_module_in_an_object_that_an_index_returns_is_an_error():
    net = nn.Module()
    net.blocks = OwnList([nn.Linear(4, 4)])
    net.forward = lambda x: net.blocks[0](x)
    with pytest.raises(AssignmentError, match=r"which is the module itself .* write run\.blocks\[0\]\.output"):
        with Model(net).trace(X) as run:
            run.blocks["held"][0].output = ZERO


def test_special_methods_are_inherited_or_left_to_pytorch():
    class FromTheEnd(nn.Sequential):
        def __getitem__(self, i):
            return super().__getitem__(len(self) - 1 - i)

    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleDict({"a": nn.Linear(4, 4)})

        def __getitem__(self, name):
            return self.blocks[name]

        def forward(self, x):
            return self["a"](x)

    net = type("Deeper", (FromTheEnd,), {})(nn.Linear(4, 4), nn.Tanh(), Named())
    with torch.no_grad(), Model(net).trace(X) as run:
        assert run[2].path == "[0]" and run[0].path == "[2]" and len(run) == 3
        assert [*run] == [run[2], run[1], run[0]] == [*reversed(run)][::-1] and run[0] in run and net[2] in run
        value = run[0]["a"].output
        with pytest.raises(KeyError, match="b"):
            run[0]["b"]
    assert torch.equal(value, net(X))


def test_a_row_can_be_iterated_over():
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    with torch.no_grad(), Model(net).trace([X[:1], X[1:]]) as run:
        row = run.rows[1]
        assert [*row] == [row[0], row[1]] == [*reversed(row)][::-1] and len(row) == 2
        assert row[0] in row and run[1] in row and row[0] != run[0]
        for module in row:
            module.output = ZERO[:1]
    assert torch.equal(run.result, torch.cat([net(X[:1]), ZERO[:1]]))


CHOICES = {
    "list": lambda chosen: lambda module: module in chosen,
    "set": lambda chosen: lambda module: module in set(chosen),
    "dict": lambda chosen: dict.fromkeys(chosen, True).get,
    "ModuleList": lambda chosen: lambda module: module in nn.ModuleList(chosen),
    "equality": lambda chosen: lambda module: any(module == one for one in chosen),
}


@pytest.mark.parametrize("choose", CHOICES.values(), ids=CHOICES)
def test_handles_are_found_among_the_modules_of_the_net(choose):
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    is_chosen = choose([net[0], net[1]])
    with torch.no_grad(), Model(net).trace([X[:1], X[1:]]) as run:
        for _, module in run.named_modules():
            if is_chosen(module):
                module.output = ZERO
        assert [*map(bool, map(is_chosen, run.rows[0]))] == [True, True, False]
    assert torch.equal(run.result, net[2](ZERO))


def test_equal_handles_have_equal_hashes(net):
    net.alias = net.last
    model = Model(net, methods=["new"])
    with model.trace([X[:1], X[1:]]) as run, model.trace(X) as other:
        handles = [model.last, model.alias, run.last, run.alias, run.rows[0].last, run.rows[1].last, other.last]
        handles += [run.last.calls[0], run.last.calls[1], run.layers[0], run.layers, run.new]
        for one in handles:
            equal = [two for two in handles if one == two]
            assert one in equal and {*map(hash, equal)} == {hash(one)}
            assert dict.fromkeys(handles, 0) | {one: 1} == {two: int(two in equal) for two in handles}
        assert run.last == run.alias == net.last == run.last.calls[0] and run.last.calls[1] != net.last
        assert run.last != other.last and run.rows[0].last != run.rows[1].last and run.layers[0] != net.layers[1]
        assert run.new != net and run.last != net.last.forward and run.last != "last"


def test_apply_is_refused(net):
    model = Model(net)
    with model.trace(X) as run:
        with pytest.raises(InputError, match=r"named.apply passes the modules .*run.named.modules\(\)"):
            run.named.apply(print)
    seen = []
    model.named.apply(seen.append)
    assert seen == [*net.named.values(), net.named]


def test_what_is_no_module_of_the_model(net):
    with pytest.raises(NeverReachedError, match=r"spare\.output"):
        net.__dict__["spare"] = nn.Linear(4, 4)
        with Model(net).trace(X) as run:
            run.spare.output = ZERO
    with Model(net).trace(X) as run:
        assert isinstance(run.new(), nn.Linear) and run.space.size == run.number() == 4
        assert run.number is net.number and [name for name, _ in run.last.named_parameters()] == []


class Hidden(nn.Module):
    """Calls a module that is not registered twice."""

    def __init__(self):
        super().__init__()
        self.first, self.kept = nn.Linear(4, 4), [nn.Linear(4, 4)]

    def forward(self, x):
        return self.kept[0](self.first(self.kept[0](x)))


def test_a_later_call_of_an_unregistered_module_is_not_given_as_the_first():
    net = nn.Sequential(Hidden(), Hidden())
    with torch.no_grad():
        hidden = net[0](X)
        first = net[1].kept[0](hidden)
        with Model(net).trace(X) as run:
            assert torch.equal(run[0].output, hidden)
            assert torch.equal(run[1].kept[0].output, first)
            assert torch.equal(run[1].kept[0].calls[1].output, net[1](hidden))
        for early in (lambda run: run[1].first.input, lambda run: run[1].first.output):
            with pytest.raises(OutOfOrderError, match=r"kept\[0\].output was asked for too late"):
                with Model(net).trace(X) as run:
                    early(run)
                    run[1].kept[0].output


class InLists(nn.Module):
    """Keeps layers in a plain list and a plain dictionary."""

    def __init__(self):
        super().__init__()
        self.first, self.several = nn.Linear(4, 4), [nn.Linear(4, 4) for _ in range(3)]
        self.named = {"last": nn.Sequential(nn.Linear(4, 4))}
        self.named["again"] = self.named

    def forward(self, x):
        x = self.first(x)
        for layer in self.several:
            x = layer(x)
        return self.named["last"](x)


@pytest.mark.parametrize("before", [False, True])
def test_unregistered_modules_one_after_the_other(before):
    net, seen = nn.Sequential(nn.Linear(4, 4), InLists()), []
    with torch.no_grad():
        hooks = [layer.register_forward_hook(lambda m, a, o: seen.append(o)) for layer in net[1].several]
        hooks.append(net[1].named["last"][0].register_forward_hook(lambda m, a, o: seen.append(o)))
        net(X)
        for hook in hooks:
            hook.remove()
        with Model(net).trace(X) as run:
            if before:
                run[0].output
            read = [run[1].several[number].output for number in range(3)]
            read.append(run[1].named["last"][0].output)
        assert list(map(torch.equal, read, seen)) == [True] * 4
        with Model(net).trace(X) as run:
            run[1].several[0].output
            run[1].several[1].output = ZERO
        assert torch.equal(run.result, net[1].named["last"](net[1].several[2](ZERO)))
        with pytest.raises(
            OutOfOrderError, match=r"several\[2\].*too late: .*may be past that point. The module is no"
        ):
            with Model(net).trace(X) as run:
                run[1].first.output
                run[1].several[2].output


def test_envoys_have_the_class_of_their_module():
    net = Net()
    model = Model(net)
    with model.trace(X) as run:
        kinds = {type(module) for module in net.modules()}
        for kind in kinds:
            assert [isinstance(module, kind) for module in run.modules()] == [
                isinstance(module, kind) for module in net.modules()
            ]
        assert not isinstance(model, nn.Module) and isinstance(run.last, nn.Tanh) and type(run.last) is type(run.named)
        assert "output" in dir(run.last)
        with pytest.raises(InputError, match=r"Model wraps a torch.nn.Module"):
            Model(run.last)
    probe = nn.Linear(4, 4)
    probe.site = model.last  # outside of runs, an envoy is no module: it does not become a part of the probe
    assert not isinstance(model.last, nn.Module) and [*probe.children()] == []


@dataclasses.dataclass
class Holder:
    first: nn.Module


OBJECTS = {
    "a dataclass": (Holder, lambda held: held.first),
    "a dictionary of its own kind": (
        lambda module: collections.defaultdict(list, k=[module]),
        lambda held: held["k"][0],
    ),
    "a view": (lambda module: types.MappingProxyType({"k": module}), lambda held: held["k"]),
    "a UserList": (lambda module: collections.UserList([module]), lambda held: held[0]),
}


@pytest.mark.parametrize(("hold", "take"), OBJECTS.values(), ids=OBJECTS)
def test_an_assignment_to_a_module_in_an_object_is_an_error(hold, take):
    net, x = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), torch.randn(2, 4)
    net.held = hold(net[0])
    with pytest.raises(AssignmentError, match=r"\.output was assigned to a Linear in held, .* write run\[0\]\.output"):
        with Model(net).trace(x) as run:
            take(run.held).output = torch.zeros(2, 4)
    assert "output" not in vars(net[0])
    with Model(net).trace(x) as run:
        assert take(run.held) is net[0]
