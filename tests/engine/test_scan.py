"""Scans: shapes match those of a real run, nothing is computed, and the model is left unchanged."""

import gc
import weakref
from collections import OrderedDict
from threading import Thread

import pytest
import torch
from engine.nets import WIDTH, Calling, Net, footprint, inputs, linear
from torch import nn
from torch._subclasses.fake_tensor import is_fake
from torch.utils._pytree import tree_leaves, tree_map_only

from diffsight import DiffsightError, Model, OutOfOrderError
from diffsight.errors import AssignmentError, NeverReachedError, ScanError


def described(value):
    """Return the shapes and dtypes of all tensors in a value."""
    return tree_map_only(torch.Tensor, lambda tensor: (tuple(tensor.shape), tensor.dtype), value)


def everything(module, call):
    """Return what every module gets and returns during `call()`, described, from ordinary hooks."""
    seen = {}
    handles = [
        inner.register_forward_hook(
            lambda _, *call, name=name: seen.setdefault(name, described((call[:2], call[2]))) and None,
            with_kwargs=True,
        )
        for name, inner in module.named_modules()
    ]
    try:
        call()
    finally:
        for handle in handles:
            handle.remove()
    return seen


def scanned(model, module, *args, **kwargs):
    """Return the same, as read in a scan."""
    seen = {}
    for name in dict(module.named_modules()):
        with model.scan(*args, **kwargs) as run:
            envoy = run[name] if name else run
            if not envoy._target.is_called:
                continue
            try:
                given = described(envoy.inputs)
            except NeverReachedError:
                continue
            seen[name] = given, described(envoy.output)
    return seen


def all_fake(value):
    return all(is_fake(leaf) for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor))


def all_zeros(value):
    return all(not is_fake(leaf) and not leaf.any() for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor))


@pytest.fixture(autouse=True)
def no_mode_is_left():
    yield
    assert torch.overrides._get_current_function_mode_stack() == []


@pytest.fixture(params=["loaded", "never loaded"])
def some(request):
    """A net with its weights, or one without any."""
    return Net() if request.param == "loaded" else Net().to("meta")


# Shapes


def test_shapes_everywhere(some, x):
    net = Net()
    assert scanned(Model(some), some, x) == everything(net, lambda: net(x))


def test_inside_is_fake_and_outside_are_zeros(some, x):
    with Model(some).scan(x) as run:
        assert run.input is x
        assert all_fake([run.first.input, run.layers[0].leaf.output, run.last.output])
        output = run.output
    assert output is run.result
    assert torch.equal(output, torch.zeros(2, WIDTH)) and output.device == x.device


def test_transformers(gpt2, ids):
    mask = torch.tensor([[0, 1, 1]])
    for given in ({}, {"attention_mask": mask}, {"attention_mask": mask, "output_hidden_states": True}):
        plain = gpt2(ids, **given)
        with Model(gpt2).scan(ids, **given) as run:
            hidden = run.transformer.h[1].output
        assert described(hidden) == ((1, 3, 16), torch.float32)
        assert type(run.result) is type(plain) and run.result.keys() == plain.keys()
        assert described(tuple(run.result.logits)) == described(tuple(plain.logits))
        for layer, other in zip(run.result.past_key_values.layers, plain.past_key_values.layers):
            assert described((layer.keys, layer.values)) == described((other.keys, other.values))
            assert all_zeros((layer.keys, layer.values))


def test_an_encoder_and_a_decoder(t5, ids):
    given = {"input_ids": ids, "decoder_input_ids": ids, "attention_mask": torch.ones_like(ids)}
    assert described(Model(t5).scan(**given).result.logits) == described(t5(**given).logits)


def test_a_cache_that_is_handed_in_holds_zeros_afterwards(gpt2, ids):
    past = Model(gpt2).scan(ids).result.past_key_values
    result = Model(gpt2).scan(ids, past_key_values=past).result
    assert past.layers[0].keys.shape == (1, 2, 6, 8) and all_zeros(past.layers[0].keys)
    assert result.logits.shape == (1, 3, 61)


def test_nothing_is_computed(x):
    """A product that would not fit in memory."""

    def forward(self, x):
        wide = self.up(x)
        return self.down(wide.unsqueeze(-1) * wide.unsqueeze(-2)).sum()

    net = Calling(forward, up=linear(), down=nn.Identity())
    net.up = nn.Linear(WIDTH, 10_000_000, device="meta")
    with Model(net).scan(x) as run:
        assert run.down.output.shape == (2, 10_000_000, 10_000_000)
    assert run.result == 0


def test_types_and_devices_that_the_model_asks_for(x):
    def forward(self, x):
        made = torch.zeros(2, WIDTH, device=self.part.weight.device, dtype=self.part.weight.dtype)
        moved = x.to(self.part.weight.device).to("cpu").cpu().to(torch.device("cpu"), torch.float64)
        kept = torch.arange(WIDTH, device=x.device) + torch.arange(WIDTH)
        return self.part((moved + made + kept).float()).half()

    net = Calling(forward, part=linear())
    assert described(Model(net).scan(x).result) == described(net(x)) == ((2, WIDTH), torch.float16)


def test_weights_are_where_they_are_or_will_be(some, x):
    with Model(some).scan(x) as run:
        run.first.output
        assert run.first.weight.device == torch.device("cpu")
        assert torch.zeros(3, device=run.last.weight.device).device == torch.device("cpu")


def test_nothing_large_is_created(x):
    def forward(self, x):
        ones = torch.ones(1_000_000, 1_000_000, dtype=torch.bool, device=x.device)
        return x[:1, :1] + ones.tril().sum(0) + torch.zeros(1_000_000, 1_000_000, device=x.device)[0]

    assert Model(Calling(forward)).scan(x).result.shape == (1, 1_000_000)


def test_autocast(some, x):
    with torch.autocast("cpu", torch.bfloat16):
        plain = Net()(x)
        with Model(some).scan(x) as run:
            assert run.layers[0].leaf.lin.output.dtype == torch.bfloat16
    assert described(run.result) == described(plain) == ((2, WIDTH), torch.bfloat16)


def test_vmap(x):
    net = Calling(lambda self, x: torch.vmap(lambda row: self.part.weight @ row)(x), part=linear())
    assert described(Model(net).scan(x).result) == described(net(x))


def test_inputs_without_values(some):
    x = torch.empty(2, WIDTH, device="meta")
    assert described(Model(some).scan(x).result) == ((2, WIDTH), torch.float32)


# Like any other run


def test_values_can_be_assigned(some, x):
    with Model(some).scan(x) as run:
        hidden = run.layers[0].output
        hidden[:, 0] = 0
        run.layers[1].output = torch.cat([hidden, hidden])
        run.last.input = run.layers[2].output + torch.ones(WIDTH)
        assert run.last.output.shape == (4, WIDTH)
        run.output = run.last(hidden)
    assert run.result.shape == (2, WIDTH)
    with pytest.raises(NeverReachedError, match="unused"), Model(some).scan(x) as run:
        run.unused.input = x
    with pytest.raises(OutOfOrderError), Model(some).scan(x) as run:
        run.last.output
        run.first.output
    with pytest.raises(AssignmentError, match=r"layers\[1\]"), Model(some).scan(x) as run:
        run.layers[1].output = torch.zeros(2, 5)


def test_skip_stop_calls_record_and_hooked_calls(some, x):
    model = Model(some)
    with model.scan(x) as run:
        kept = run.record("layers[*]", device="cpu")
        run.layers[1].skip(run.layers[0].output)
        assert run.first(x, hook=True).shape == (2, WIDTH)
        run.layers[2].output
        run.stop()
    assert kept["layers[1].output"].shape == (2, WIDTH)
    run = model.scan(x)
    assert run.layers[2].leaf.input.shape == (2, WIDTH)
    assert run.finish().shape == (2, WIDTH)


def test_rows(some):
    with Model(some).scan([inputs(0, 1), inputs(1, 2)]) as run:
        a, b = run.rows
        assert b.layers[0].output.shape == (2, WIDTH)
        a.layers[0].output = b.layers[0].output[:1] * 2
        answers = run.each(lambda row: row.layers[1].output + row.layers[2].output)
    assert [answer.shape for answer in answers] == [(1, WIDTH), (2, WIDTH)]
    assert all_fake(answers)


def test_invoke(some, x):
    model = Model(some)
    with model.scan() as run:
        with run.invoke(x):
            late = model.layers[2].output
        with run.invoke(torch.cat([x, x])):
            model.layers[0].output = torch.cat([late, late])
    assert [result.shape for result in run.result] == [(2, WIDTH), (4, WIDTH)]
    assert all_zeros(run.result)


def test_steps(some, x):
    with Model(some).scan(x) as run:
        assert [step.index for step in run.steps if is_fake(run.layers[0].output)] == [0]


def test_methods(x):
    class Coder(Net):
        def encode(self, x):
            return OrderedDict(code=self.layers[0](x), more=(x, [x.sum(0)]))

        def forward(self, x):
            return self.encode(x)["code"]

    net = Coder()
    with Model(net, methods=["encode"]).scan(x) as run:
        assert run.encode.input.shape == (2, WIDTH)
        output = run.encode.output
    assert described(output) == described(net.encode(x)) and type(output) is OrderedDict


def test_gradients(some, x):
    x = x.clone().requires_grad_()
    with Model(some).scan(x, grad=True) as run:
        hidden = run.layers[1].output
        hidden.retain_grad()
        seen = []
        run.layers[2].output.register_hook(lambda gradient: seen.append(gradient.shape))
        run.output.sum().backward()
    assert hidden.grad.shape == x.grad.shape == (2, WIDTH) and seen == [(2, WIDTH)]
    assert not x.grad.any()
    assert all(parameter.grad is None for parameter in some.parameters())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_modes(some, x, mode):
    with mode():
        plain = Net()(x)
        with Model(some).scan(x) as run:
            assert run.layers[1].output.requires_grad == plain.requires_grad
    assert described(run.result) == described(plain)


# The body


def helper(run, direction):
    """Compute what a user would write for a real run."""
    hidden = run.layers[0].output
    logits = run.last(hidden)
    again = hidden @ run.last.weight.T + run.last.bias
    centred = (hidden.float().cpu() - direction) / hidden.std(dim=-1, keepdim=True).to("cpu")
    run.layers[2].output = run.layers[2].output + direction.to(hidden.device) * 3
    return logits, again, centred, torch.stack([logits, again]).softmax(-1)


def test_a_helper_is_tried_on_shapes(some, x):
    direction = torch.ones(WIDTH)
    with Model(some).scan(x) as run:
        seen = helper(run, direction)
    with Model(Net()).trace(x) as real:
        assert described(seen) == described(helper(real, direction))
    assert all_fake(seen)
    assert described(run.result) == described(real.result)


def test_what_has_nothing_to_do_with_the_model_is_real(some, x):
    with Model(some).scan(x) as run:
        run.first.output
        assert torch.equal(x @ x.T, x.matmul(x.T))
        assert (x > 0).nonzero().shape[1] == 2 and x.sum().item() == float(x.sum())
        other = linear()
        assert torch.equal(other(x), nn.functional.linear(x, other.weight, other.bias))


def test_weights_are_not_changed_by_the_body(x):
    net = Net()
    kept = net.last.weight.clone()
    with Model(net).scan(x) as run:
        with torch.no_grad():
            run.last.weight.zero_()
            run.last.weight.data = torch.zeros(WIDTH, WIDTH)
        run.output
    assert torch.equal(net.last.weight, kept)


def test_another_model_runs_for_real_in_the_body(some, x):
    net = Net(seed=1)
    with Model(some).scan(x) as run:
        hidden = run.layers[0].output
        with Model(net).trace(x) as real:
            assert torch.equal(real.layers[0].output, net.layers[0](net.first(x)))
        with Model(net).scan(hidden) as other:
            assert other.layers[0].output.shape == hidden.shape
    assert torch.equal(real.result, net(x))


def test_two_scans_feed_each_other(some, x):
    with Model(some).scan(x, grad=True) as a, Model(Net(seed=1)).scan(x, grad=True) as b:
        hidden = a.layers[1].output
        hidden.retain_grad()
        b.layers[1].output = torch.cat([hidden, b.layers[0].output])
        b.output.sum().backward()
    assert a.result.shape == hidden.grad.shape == (2, WIDTH) and b.result.shape == (4, WIDTH)


# Where values are needed


ASKING = {
    "item": lambda x: x.sum().item(),
    "float": lambda x: float(x.sum()),
    "if": lambda x: 1 if (x > 0).all() else 0,
    "list": lambda x: x.tolist(),
    "numpy": lambda x: x.detach().numpy(),
    "format": lambda x: f"{x.sum():.2f}",
    "mask": lambda x: x[x > 0],
    "nonzero": lambda x: x.nonzero(),
    "where": lambda x: torch.where(x > 0),
    "unique": lambda x: x.unique(),
    "index": lambda x: range(4)[x.sum().long()],
    "equal": lambda x: torch.equal(x, x + 1),
}


@pytest.mark.parametrize("ask", ASKING.values(), ids=ASKING)
def test_the_model_asks_for_values(x, ask):
    class Asking(nn.Module):
        def forward(self, x):
            ask(x)
            return x

    net = nn.Sequential(OrderedDict(first=linear(), inner=nn.Sequential(linear(), Asking())))
    with pytest.raises(ScanError, match=r"inner\[1\] asks for the values of a tensor") as caught:
        Model(net).scan(x).result
    assert f"{__file__}:{ask.__code__.co_firstlineno}" in str(caught.value)
    assert "cannot go past this line" in str(caught.value)
    net(x)


@pytest.mark.parametrize("ask", ASKING.values(), ids=ASKING)
def test_the_body_asks_for_values(some, x, ask):
    with pytest.raises(DiffsightError, match="the body asks for the values"):
        with Model(some).scan(x) as run:
            ask(run.layers[0].output)


def test_other_errors_of_the_model_are_its_own(x, caplog):
    net = Calling(lambda self, x: self.part(x[:, :2]), part=linear())
    with pytest.raises(RuntimeError, match="reduction dim") as caught:
        Model(net).scan(x).result
    assert not isinstance(caught.value, ScanError)
    assert not caplog.records, "PyTorch logs errors of fake tensors, with a traceback"


def test_numbers_and_masks_that_come_in_are_known(x):
    """They are known while they depend on nothing else: models look at masks, and count tokens."""
    seen = {}

    def forward(self, x, ids, mask):
        places = torch.arange(ids.shape[1], device=ids.device)[None] * mask
        seen.update(
            all=bool(mask.all()), top=places.max().item(), count=int((ids == 7).sum()), last=ids.argmax(-1).tolist()
        )
        ids[0, 0] = x.argmax()
        return x[:, places.max() :]

    net = Calling(forward)
    given = torch.tensor([[3, 7, 1, 7]]), torch.tensor([[1, 1, 1, 0]])
    run = Model(net).scan(x, *given)
    assert run.result.shape == (2, 2)
    assert seen == {"all": False, "top": 2, "count": 2, "last": [1]}
    assert given[0].tolist() == [[3, 7, 1, 7]]


def test_masks_that_a_model_makes_itself_are_known(x):
    """A mask is made of ones, or by writing into zeros; the inputs themselves are not written to."""
    seen = {}

    def forward(self, x, lengths):
        ones = torch.ones(x.shape[:2], device=x.device)
        ends = torch.zeros(len(lengths), x.shape[1], dtype=torch.long, device=x.device)
        ends[torch.arange(len(lengths), device=x.device), lengths - 1] = 1
        mask = ends.flip(-1).cumsum(-1).flip(-1).bool()
        lengths[0] = 9
        seen.update(all=bool(ones.bool().all()), mask=mask.tolist(), lengths=lengths.tolist())
        return x[mask]

    lengths = torch.tensor([1, 3])
    assert Model(Calling(forward)).scan(x[:, :3], lengths).result.shape == (4, *x.shape[2:])
    assert seen == {"all": True, "mask": [[True, False, False], [True, True, True]], "lengths": [9, 3]}
    assert lengths.tolist() == [1, 3]


def test_products_by_groups(x):
    """Mixtures of experts use them: tokens sorted by expert, and the end of each expert's tokens."""
    weights = torch.randn(3, 16, 8)

    def forward(self, tokens, ends):
        return nn.functional.grouped_mm(tokens, weights.to(tokens.device), offs=ends)

    for dtype in (torch.float32, torch.bfloat16):
        run = Model(Calling(forward)).scan(torch.randn(6, 16, dtype=dtype), torch.tensor([2, 4, 6], dtype=torch.int32))
        assert (run.result.shape, run.result.dtype) == ((6, 8), dtype)


def test_numbers_that_depend_on_more_are_not_known(x):
    def forward(self, x, ids):
        ids = ids.clone()
        ids += x.argmax(-1)
        return ids.max().item()

    with pytest.raises(ScanError):
        Model(Calling(forward)).scan(x, torch.tensor([3, 7])).result


def test_values_of_floats_are_never_known(x):
    """Not even of small ones, and not as zeros."""

    def forward(self, x):
        return x if torch.isnan(x).any() else x + 1

    with pytest.raises(ScanError, match="__bool__"):
        Model(Calling(forward)).scan(x).result


def test_values_that_are_written_over_are_not_known(x):
    def forward(self, x):
        counts = torch.zeros(2, dtype=torch.long, device=x.device)
        assert counts.tolist() == [0, 0]
        counts[1] = x.argmax()
        return counts.tolist()

    with pytest.raises(ScanError, match="tolist"):
        Model(Calling(forward)).scan(x).result


def test_repeats_and_masks_beside_unknown_values(x):
    def forward(self, x, repeats, mask):
        x = x.repeat_interleave(repeats, 0)
        x[:, mask] = 0
        return x[:, mask]

    given = x, torch.tensor([1, 3]), torch.tensor([True, False, True, True])
    assert Model(Calling(forward)).scan(*given).result.shape == Calling(forward)(*given).shape == (4, 3)


# Nothing is left behind


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
    assert torch.equal(real.result, want) and not shapes.result.any()


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
