"""Scans: shapes match those of a real run, and nothing is computed."""

from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import is_fake
from torch.utils._pytree import tree_leaves, tree_map_only

from diffsight import Model, OutOfOrderError
from diffsight.errors import AssignmentError, NeverReachedError, ScanError
from models.nets import WIDTH, Calling, Net, inputs, linear

pytestmark = pytest.mark.usefixtures("no_mode_is_left")


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


# Shapes


def test_shapes_everywhere(some, x):
    net = Net()
    assert scanned(Model(some), some, x) == everything(net, lambda: net(x))


def test_no_tensor_of_the_model_has_values(some, x):
    with Model(some).scan(x) as run:
        assert run.input is x
        assert all_fake([run.first.input, run.layers[0].leaf.output, run.last.output])
        output = run.output
    assert output is run.result
    assert is_fake(output) and output.shape == (2, WIDTH) and output.device == x.device
    with pytest.raises(ScanError, match="shapes only"):
        run.result.sum().item()


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
            assert all_fake((layer.keys, layer.values))


def test_an_encoder_and_a_decoder(t5, ids):
    given = {"input_ids": ids, "decoder_input_ids": ids, "attention_mask": torch.ones_like(ids)}
    assert described(Model(t5).scan(**given).result.logits) == described(t5(**given).logits)


def test_a_cache_from_a_scan(gpt2, ids):
    past = Model(gpt2).scan(ids).result.past_key_values
    result = Model(gpt2).scan(ids, past_key_values=past).result
    longer = result.past_key_values
    assert longer.layers[0].keys.shape == (1, 2, 6, 8) and all_fake(longer.layers[0].keys)
    assert past.get_seq_length() == 3 and result.logits.shape == (1, 3, 61)


def test_nothing_is_computed(x):
    """A product that would not fit in memory."""

    def forward(self, x):
        wide = self.up(x)
        return self.down(wide.unsqueeze(-1) * wide.unsqueeze(-2)).sum()

    net = Calling(forward, up=linear(), down=nn.Identity())
    net.up = nn.Linear(WIDTH, 10_000_000, device="meta")
    with Model(net).scan(x) as run:
        assert run.down.output.shape == (2, 10_000_000, 10_000_000)
    assert run.result.shape == ()


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


def test_weights_without_a_shape(x):
    net = nn.Sequential(nn.Tanh(), nn.Sequential(nn.LazyLinear(3)))
    model = Model(net)
    with pytest.raises(ScanError, match=r"\[1\]\[0\] is a LazyLinear.*: call the model once"):
        model.scan(x)
    assert isinstance(net[1][0], nn.LazyLinear)
    with torch.no_grad():
        model(x)
    assert model.scan(x).result.shape == net(x).shape == (2, 3)


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
    assert all_fake(run.result)


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
