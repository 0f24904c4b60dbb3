"""A scan leaves the model as it was, however it ends."""

import dataclasses
import gc
import random
import weakref
from collections import Counter, OrderedDict, defaultdict, deque
from threading import Thread
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from torch import nn
from torch._subclasses.fake_tensor import is_fake

from diffsight import Model
from diffsight.errors import ScanError
from helpers import footprint
from models.nets import WIDTH, Calling, Net, Noisy, inputs, linear

pytestmark = pytest.mark.usefixtures("no_mode_is_left")


class Keeping(nn.Module):
    """A module that keeps tables, counts its calls and updates what it holds."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH)
        self.register_buffer("table", torch.zeros(2))
        self.register_buffer("later", None)
        self.rows, self.tables, self.calls, self.cache = 2, {}, 0, [None]

    def forward(self, x):
        self.calls += 1
        if self.rows < len(x) + 2:
            self.rows = len(x) + 2
            self.register_buffer("table", torch.arange(float(self.rows), device=x.device))
        self.later = x.mean(0)
        self.extra = x.sum()
        self.tables[len(x)] = x * 2
        self.cache[0] = x
        self.norm.weight.data.add_(1)
        self.to(torch.float64).to(torch.float32)
        return self.norm(x) + self.table[: len(x), None]


def held(module):
    """Return everything that a module and its submodules hold, by identity and by value."""
    return {
        name: (
            footprint(inner)[""],
            {key: id(value) for key, value in vars(inner).items()},
            {
                key: (id(v), v.clone())
                for key, v in (*inner._parameters.items(), *inner._buffers.items())
                if v is not None
            },
            [dict(v) if isinstance(v, dict) else list(v) for v in vars(inner).values() if type(v) in (dict, list)],
        )
        for name, inner in module.named_modules()
    }


def test_what_a_model_keeps_is_what_it_kept_before(x):
    net = Keeping()
    net(x)
    before = held(net)
    for rows in (2, 5):
        with Model(net).scan(inputs(0, rows)) as run:
            assert run.norm.output.shape == (rows, WIDTH)
        assert str(held(net)) == str(before)
    fresh = Keeping()
    fresh(x)
    assert torch.equal(net(x), fresh(x))


class Bank:
    """An object that a module calls and that keeps what it gets."""

    def __init__(self):
        self.kept, self.sums = [], {"all": torch.zeros(WIDTH)}

    def __call__(self, x):
        self.kept.append(x)
        self.sums["all"] += x.sum(0)


class Remembering(nn.Module):
    """A module with state in plain tensors, containers, arrays, objects, and modules that it does not register."""

    def __init__(self):
        super().__init__()
        self.lin, self.beside = linear(), [nn.Sequential(linear(), nn.BatchNorm1d(WIDTH))]
        self.steps, self.hidden = torch.zeros(1), self.lin(inputs(0)).mean(0)  # the latter with gradients
        self.queue, self.names, self.order = deque(maxlen=3), set(), OrderedDict(first=1)
        self.log, self.counts, self.nested = defaultdict(list), Counter(), {"in": [{"seen": []}]}
        self.array, self.bank, self.cache = np.zeros(2), Bank(), transformers.DynamicCache()
        self.tied = [self.lin.weight]

    def forward(self, x):
        y = self.beside[0](self.lin(x)) + self.hidden + x @ self.tied[0]
        self.steps += 1
        self.hidden = y.mean(0)
        self.queue.append(y), self.names.add(len(y)), self.order.update(last=y), self.order.move_to_end("first")
        self.log["shape"].append(y.shape), self.nested["in"][0]["seen"].append(y), self.bank(y)
        self.counts["calls"] += 1
        self.array += 1
        self.cache.update(y[:, None, None], y[:, None, None], 0)
        self.beside[0].calls = self.counts["calls"]
        if not hasattr(self, "made"):
            self.made = linear()
        return torch.stack([*self.queue]).mean(0) / self.steps + self.bank.sums["all"]


def remembered(net):
    """Return everything that such a module holds, in words."""
    inside = {name: str(value.detach()) for name, value in net.state_dict(keep_vars=True).items()}
    of_objects = [str(vars(net.bank)), str([vars(layer) for layer in net.cache.layers])]
    return str(vars(net)), inside, of_objects, str(vars(net.beside[0])), str(net.beside[0].state_dict())


def test_state_in_attributes_of_any_kind(x):
    torch.manual_seed(0)
    net = Remembering()
    held, before = dict(vars(net)), remembered(net)
    for _ in range(2):
        with Model(net).scan(x) as run:
            assert run.lin.output.shape == (2, WIDTH)
        assert is_fake(run.result)
        assert remembered(net) == before
        assert vars(net).keys() == held.keys() and all(vars(net)[name] is value for name, value in held.items())
    torch.manual_seed(0)
    fresh = Remembering()
    torch.manual_seed(1)
    right = fresh(x), fresh(x)
    torch.manual_seed(1)
    assert torch.equal(net(x), right[0]) and torch.equal(net(x), right[1])


@pytest.mark.parametrize("first", [0, 1])
def test_state_after_two_scans_at_once(x, first):
    net = Remembering()
    held, before = dict(vars(net)), remembered(net)
    runs = [Model(net).scan(x), Model(net).scan(x)]
    for run in runs:
        assert run.lin.output.shape == (2, WIDTH)
    for index in (first, 1 - first):
        assert is_fake(runs[index].result)
    assert remembered(net) == before and all(vars(net)[name] is value for name, value in held.items())


class Slotted:
    __slots__ = ("count", "last")

    def __init__(self):
        self.count = 0


class Tracker:
    """An object that other code holds too."""

    def __init__(self):
        self.seen, self.slots, self.repeats, self.beside = [], Slotted(), 1, nn.BatchNorm1d(WIDTH)


TRACKER, NO_MASK = Tracker(), object()


class Comparing(nn.Module):
    """A module that compares what it holds and gets by identity, and that reaches objects from elsewhere too."""

    def __init__(self):
        super().__init__()
        self.lin, self.tracker, self.options, self.feats = linear(), TRACKER, {"mask": NO_MASK}, []
        self.default, self.copies, self.flag = dataclasses.MISSING, {"lin": [self.lin]}, torch.zeros(3)[1]
        self.lin.register_forward_hook(lambda module, args, output, feats=self.feats: feats.append(output))
        self.large = torch.zeros(WIDTH, 2**17)

    def forward(self, x, mask=NO_MASK, tracker=None):
        self.feats.clear()
        self.tracker.repeats, self.tracker.slots.count, self.tracker.slots.last = 3, 1, x
        self.flag.data.add_(1), self.large.add_(1)
        self.tracker.beside.num_batches_tracked.add_(1)
        known = [self.default is dataclasses.MISSING, self.options["mask"] is NO_MASK, mask is NO_MASK]
        known += [tracker in (None, TRACKER), self.copies["lin"][0] is self.lin]
        x = self.tracker.beside(self.lin(x.repeat(sum(known) + TRACKER.repeats, 1)))
        self.tracker.seen.append(x)
        return torch.cat([x, *self.feats])


@pytest.mark.parametrize("given", [{}, {"mask": NO_MASK, "tracker": TRACKER}])
def test_objects_are_the_same_in_a_scan_and_afterwards(x, given):
    net = Comparing()
    held, options = dict(vars(net)), net.options
    with Model(net).scan(x, **given) as run:
        assert run.lin.output.shape == (16, WIDTH)
    assert run.result.shape == (32, WIDTH)
    assert all(vars(net)[name] is value for name, value in held.items()) and net.options is options
    assert (TRACKER.seen, TRACKER.repeats, TRACKER.slots.count, net.feats) == ([], 1, 0, [])
    assert not hasattr(TRACKER.slots, "last") and TRACKER.beside.num_batches_tracked == 0
    assert net.flag == 0 and not net.large.any()


@pytest.mark.parametrize("compiled", [torch.jit.script, lambda net: torch.jit.trace(net, inputs(0))])
def test_torch_script(x, compiled):
    net = nn.Sequential(compiled(linear()), linear())
    right = net(x)
    assert Model(net).scan(x).result.shape == right.shape
    assert torch.equal(net(x), right)


def test_memory_of_tensors_is_restored_without_a_change_that_autograd_counts(x):
    net = Calling(lambda self, x: self.part(x) * self.scale, part=linear())
    net.scale = torch.ones(WIDTH)
    loss = net(x).sum()
    assert is_fake(Model(net).scan(x).result)
    loss.backward()
    assert net.part.weight.grad is not None


def caches(net):
    """Return a new cache of each kind for a language model."""
    return [
        transformers.DynamicCache(),
        transformers.StaticCache(config=net.config, max_cache_len=16),
        transformers.EncoderDecoderCache(transformers.DynamicCache(), transformers.DynamicCache()),
    ]


@pytest.mark.parametrize("kind", range(3))
@pytest.mark.parametrize("is_filled", [False, True])
def test_a_cache_among_the_arguments(gpt2, ids, kind, is_filled):
    cache, other = caches(gpt2)[kind], caches(gpt2)[kind]
    if is_filled:
        gpt2(ids, past_key_values=cache), gpt2(ids, past_key_values=other)  # with gradients
    with Model(gpt2).scan(ids, past_key_values=cache) as run:
        assert is_fake(run.transformer.h[1].output)
    length = run.result.past_key_values.get_seq_length()
    assert cache.get_seq_length() == other.get_seq_length()
    logits = gpt2(ids, past_key_values=cache).logits
    assert torch.equal(logits, gpt2(ids, past_key_values=other).logits)
    assert length == cache.get_seq_length()


def test_an_object_among_the_arguments(x):
    def forward(self, x, held, names, generator):
        torch.rand(2, generator=generator)
        held.seen.append(self.part(x))
        held.total += 1
        held.count.add_(1)
        names.add("x")
        return held.part(x) * held.total

    net = Calling(forward, part=linear())
    held = SimpleNamespace(seen=deque(), total=torch.zeros(()), count=torch.zeros(2, dtype=torch.long), part=net.part)
    names, generator = set(), torch.Generator()
    state = generator.get_state()
    with Model(net).scan(x, held=held, names=names, generator=generator) as run:
        assert run.part.calls[1].output.shape == (2, WIDTH), "the module in the object is the model's own"
    assert is_fake(run.result)
    assert (len(held.seen), held.total.item(), held.count.tolist(), names) == (0, 0, [0, 0], set())
    assert torch.equal(generator.get_state(), state)


def test_no_random_numbers_are_drawn(x):
    drawn = []
    for scans in (False, True):
        torch.manual_seed(0), random.seed(0), np.random.seed(0)
        net, of_body = Noisy(), []
        if scans:
            with Model(net).scan(x) as run:
                of_body.append(np.random.rand())
                assert run.part.output.shape == x.shape
        else:
            of_body.append(np.random.rand())
        drawn.append((of_body, net(x)))
    assert drawn[0][0] == drawn[1][0] and torch.equal(drawn[0][1], drawn[1][1])


def test_casting_a_module_leaves_its_parameters_in_place(x):
    """Another run of the same model may use them meanwhile."""
    net = Calling(lambda self, x: self.part.to(torch.float64)(x.double()), part=nn.BatchNorm1d(WIDTH).eval())
    before = dict(net.named_parameters()) | dict(net.named_buffers())
    with Model(net).scan(x) as run:
        assert run.part.output.dtype == torch.float64
        now = dict(net.named_parameters()) | dict(net.named_buffers())
        assert all(value is before[name] for name, value in now.items())
        assert run.part.weight.dtype == torch.float64
    assert run.result.dtype == torch.float64 and net.part.weight.dtype == torch.float32


def test_tied_weights(x):
    net = nn.Sequential(linear(), linear())
    net[1].weight = net[0].weight
    want = net(x)
    with Model(net).scan(x) as run:
        assert run[0].weight is run[1].weight
    assert net[1].weight is net[0].weight and torch.equal(net(x), want)


def test_compiled_modules(x):
    net, compiled = Net(), []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    net.layers[1] = torch.compile(net.layers[1], backend=backend)
    net.last.compile(backend=backend)
    with Model(net).scan(x) as run:
        assert is_fake(run.layers[1].output)
        assert net.last(x).shape == run.last.output.shape == (2, WIDTH)
    assert compiled == []
    net(x)
    assert compiled, "afterwards it is compiled as usual"


def error_in_the_body(model, x):
    with pytest.raises(KeyError), model.scan(x) as run:
        run.layers[0].leaf.input
        raise KeyError


def interrupt_in_the_body(model, x):
    with pytest.raises(KeyboardInterrupt), model.scan(x) as run:
        run.layers[0].leaf.input
        raise KeyboardInterrupt


def error_in_the_model(model, x):
    with pytest.raises(RuntimeError), model.scan(x[:, :1]) as run:
        run.layers[0].input


def values_asked_for(model, x):
    with pytest.raises(ScanError), model.scan(x) as run:
        run.layers[0].output.item()


def stopped(model, x):
    with model.scan(x) as run:
        run.layers[0].leaf.lin.input
        run.stop()


def dropped(model, x):
    run = model.scan(x)
    run.layers[0].leaf.input
    del run


def dropped_before_it_began(model, x):
    model.scan(x)


def dropped_in_another_thread(model, x):
    runs = [model.scan(x)]
    runs[0].layers[0].leaf.input
    thread = Thread(target=runs.clear)
    thread.start()
    thread.join()


def left_by_return(model, x):
    def body():
        with model.scan(x) as run:
            return run.layers[0].input

    assert is_fake(body())


def finished(model, x):
    with model.scan(x) as run:
        run.layers[0].skip(run.first.output)
    assert run.result.shape == (2, WIDTH)


ENDS = [
    error_in_the_body,
    interrupt_in_the_body,
    error_in_the_model,
    values_asked_for,
    stopped,
    dropped,
    dropped_before_it_began,
    dropped_in_another_thread,
    left_by_return,
    finished,
]


@pytest.mark.parametrize("end", ENDS, ids=lambda end: end.__name__)
def test_however_it_ends_the_model_is_what_it_was(end, x):
    net = Net()
    want, clean = net(x), footprint(net)
    weights = {name: (id(value), value.clone()) for name, value in net.state_dict(keep_vars=True).items()}
    end(Model(net), x)
    assert footprint(net) == clean
    assert all(value is not None and not value.is_meta for value in net.parameters())
    for name, value in net.state_dict(keep_vars=True).items():
        assert weights[name][0] == id(value) and torch.equal(weights[name][1], value)
    assert torch.equal(net(x), want)
    with Model(net).trace(x) as run:
        run.layers[0].output
    assert torch.equal(run.result, want)


def test_a_real_run_beside_a_scan_of_the_same_model(net, x):
    want, model = net(x), Model(net)
    with model.scan(x) as shapes, model.trace(x) as real:
        for index in range(3):
            assert is_fake(shapes.layers[index].output)
            assert not is_fake(real.layers[index].output)
    assert torch.equal(real.result, want) and is_fake(shapes.result)


def test_a_real_run_in_another_thread(net, x):
    want, model, seen = net(x), Model(net), []
    with model.scan(x) as run:
        assert is_fake(run.layers[0].leaf.output)
        thread = Thread(target=lambda: seen.append(Model(net).trace(x).result))
        thread.start()
        thread.join()
        assert is_fake(run.layers[1].output)
    assert torch.equal(seen[0], want)


def test_a_scan_that_is_dropped_needs_no_garbage_collection(net, x):
    clean = footprint(net)
    gc.disable()
    try:
        x = x.clone()
        run = Model(net).scan(x)
        run.layers[1].input
        gone = weakref.ref(run), weakref.ref(x)
        del run, x
        assert [ref() for ref in gone] == [None, None] and footprint(net) == clean
    finally:
        gc.enable()
