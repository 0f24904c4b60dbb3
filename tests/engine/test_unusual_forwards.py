"""Modules with an unusual forward pass, and code that calls it without `__call__`."""

import contextlib
import copy
import functools
import inspect
from types import MethodType

import pytest
import torch
from torch import nn

from diffsight import Model
from diffsight.errors import AssignmentError, InputError, PointNotFoundError
from helpers import footprint, outputs
from models.nets import Direct, Net


def test_a_fused_transformer_layer_is_taken_apart_where_something_in_it_is_read():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    net, x = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval(), torch.randn(2, 3, 8)
    clean = footprint(net)
    with torch.no_grad():
        want, inner = net(x), outputs(net.layers[1].linear1, net, x)
        with Model(net).trace(x) as run:
            hidden = run.layers[1].linear1.output
        with Model(net).trace(x) as unfused:
            outer = unfused.layers[0].output
        assert torch.equal(outer, net.layers[0](x)) and torch.equal(unfused.result, want)
    assert torch.equal(hidden, inner[0]) and torch.allclose(run.result, want, atol=1e-6)
    assert footprint(net) == clean


def test_a_module_of_torchscript():
    torch.manual_seed(0)
    net, x = nn.Sequential(torch.jit.script(nn.Linear(2, 3)), nn.Linear(3, 2)), torch.randn(1, 2)
    clean = footprint(net)
    with Model(net).trace(x) as run:
        run[0].output[:] = 1
    assert torch.equal(run.result, net[1](torch.ones(1, 3))) and footprint(net) == clean


def test_a_wrapper_that_names_the_module_in_its_signature(net, x):
    @functools.wraps(type(net.first).forward)
    def forward(*args):
        return type(net.first).forward(net.first, *args) + 1

    want = net.first(x) + 1
    net.first.forward = forward
    with Model(net).trace(x) as run:
        assert torch.equal(run.first.output, want)
    assert net.first.__dict__["forward"] is forward


def test_signatures_stay_those_of_the_forward_pass(net, x):
    net.last.forward = lambda x, *, scale=2: x * scale
    before = [inspect.signature(module.forward) for module in (net, net.first, net.last)]
    names = inspect.getfullargspec(net.first.forward)  # does not look at what a function wraps
    with Model(net).trace(x) as run:
        run.first.output
        assert [inspect.signature(module.forward) for module in (net, net.first, net.last)] == before
        assert inspect.getfullargspec(net.first.forward) == names


def test_a_copy_of_a_module_with_a_forward_pass_of_its_own_is_its_own(net, x):
    net.first.forward = MethodType(lambda module, x: 2 * nn.functional.linear(x, module.weight, module.bias), net.first)
    with Model(net).trace(x) as run:
        run.first.output
        clone = copy.deepcopy(net.first)
    nn.init.zeros_(clone.weight)
    assert torch.equal(clone(x), 2 * clone.bias.expand(len(x), -1))
    assert clone.forward.__self__ is clone and clone.forward.__func__ is net.first.forward.__func__


def test_a_class_that_is_patched_between_two_runs(net, x, monkeypatch):
    model = Model(net)
    model.trace(x).result
    with model.trace(x) as run:
        run.first.output
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: x * 2)
    with model.trace(x) as run:
        assert torch.equal(run.first.output, x * 2)


def test_a_call_past_the_hooks_is_a_call():
    net, x = Direct(), torch.randn(1, 4)
    with Model(net).trace(x) as run:
        run.inner.input[:] = 0
        assert torch.equal(run.inner.output, net.inner.bias[None])
    assert torch.equal(run.result, net.inner.bias[None])


def test_a_call_that_fails_and_is_caught_by_the_model(x):
    class Tolerant(Net):
        def forward(self, x):
            with contextlib.suppress(AttributeError, TypeError):
                self.first(None)
            return super().forward(x)

    net = Tolerant()
    with Model(net).trace(x) as run:
        second, layer = run.first.calls[1].output, run.layers[0].output
    assert torch.equal(second, outputs(net.first, Net.forward, net, x)[0])
    assert torch.equal(layer, outputs(net.layers[0], Net.forward, net, x)[0])
    assert torch.equal(run.result, net(x))


def test_a_module_that_is_asked_for_while_a_counted_call_of_it_runs(x):
    """`outer` calls into its neighbour, past the way that the tree shows."""

    class Crossing(nn.Module):
        def __init__(self):
            super().__init__()
            self.outer, self.other = nn.Module(), Net()
            self.outer.forward = lambda x: self.other.first(x) * 3

        def forward(self, x):
            return self.outer(x)

    net = Crossing()
    want = net(x)
    with Model(net).trace(x) as run:
        run.other.first.output
        assert torch.equal(run.outer.output, want)
        run.outer.output = want + 1
    assert torch.equal(run.result, want + 1)


class Twice(nn.Module):
    def forward(self, x):
        return x * 2


@pytest.mark.parametrize("ahead", [False, True])
def test_the_forward_pass_of_a_class_is_replaced_in_the_body(monkeypatch, x, ahead):
    net = nn.Sequential(nn.Linear(4, 4), Twice(), Twice())
    with torch.no_grad(), Model(net).trace(x) as run:
        first = run[0].output
        if ahead:
            run[1].output = first + 1
        monkeypatch.setattr(Twice, "forward", lambda self, x: x * 3)
        second = run[1].output
        third = run[2].output
    expected = first + 1 if ahead else first * 3
    assert torch.equal(second, expected) and torch.equal(third, expected * 3) and torch.equal(run.result, third)


def sigmoid(monkeypatch, module):
    monkeypatch.setattr(Twice, "forward", torch.sigmoid)  # not bound: it takes the input alone


def static(monkeypatch, module):
    monkeypatch.setattr(Twice, "forward", staticmethod(torch.tanh))


def another_class(monkeypatch, module):
    module.__class__ = nn.Tanh


@pytest.mark.parametrize("replace", [sigmoid, static, another_class])
def test_other_ways_to_replace_the_forward_pass_of_a_class(monkeypatch, x, replace):
    net = nn.Sequential(nn.Linear(4, 4), Twice())
    with torch.no_grad(), Model(net).trace(x) as run:
        first = run[0].output
        replace(monkeypatch, net[1])
        second = run[1].output
    assert torch.equal(second, net[1](first)) and not torch.equal(second, first * 2)
    assert torch.equal(run.result, second)


class ByProperty(nn.Module):
    forward = property(lambda self: torch.tanh)


class NoForward(nn.Module):
    def __call__(self, x):
        return torch.tanh(x)


class AroundForward(Twice):
    def __call__(self, x):
        return super().__call__(x) + 1


class PassedThrough(Twice):
    def __call__(self, *args):
        return super().__call__(*args)


@pytest.mark.parametrize("kind", [ByProperty, NoForward, AroundForward])
def test_outputs_that_cannot_be_seen(kind, x):
    net = nn.Sequential(nn.Linear(4, 4), kind(), nn.Linear(4, 4))
    with torch.no_grad(), Model(net).trace(x) as run:
        with pytest.raises(PointNotFoundError, match=rf"\[1\] has no values: .*{kind.__name__}"):
            run[1].output
        with pytest.raises(PointNotFoundError, match=rf"\[1\] has no values: .*{kind.__name__}"):
            run[1](x, hook=True)
        kept = run.record("**")
        assert torch.equal(run[2].input, net[1](net[0](x)))
    assert "[1].output" not in kept and torch.equal(kept["[2].output"], net(x))
    assert torch.equal(run.result, net(x))


def test_a_call_that_is_passed_through(x):
    net = nn.Sequential(nn.Linear(4, 4), PassedThrough(), nn.Linear(4, 4))
    with torch.no_grad(), Model(net).trace(x) as run:
        assert torch.equal(run[1].output, net[0](x) * 2)
        run[1].output = run[1].output + 1
    assert torch.equal(run.result, net[2](net[0](x) * 2 + 1))


def test_nested_tensors_between_layers():
    net = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2).eval()
    x, padding = torch.randn(2, 5, 8), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with torch.no_grad():
        hook = net.layers[0].register_forward_hook(lambda module, args, output: output * 2)
        expected = net(x, src_key_padding_mask=padding)
        hook.remove()
        with Model(net).trace(x, src_key_padding_mask=padding) as run:
            run.layers[0].output = run.layers[0].output * 2
        assert torch.equal(run.result, expected)
        with Model(net).trace(x, src_key_padding_mask=padding) as run:
            run.layers[1].input = run.layers[1].input * 2
        assert torch.equal(run.result, expected)
        with pytest.raises(InputError, match="is a nested tensor, which cannot be cut into rows"):
            with Model(net).trace(x, src_key_padding_mask=padding) as run:
                assert torch.equal(run.rows[1].layers[0].input[0], x[1])
                run.rows[1].layers[0].output
        with pytest.raises(AssignmentError, match=r"has the shape \(\(5, 8\), \(3, 8\)\), but \(2, 5, 8, 1\) was"):
            with Model(net).trace(x, src_key_padding_mask=padding) as run:
                run.layers[0].output = x[..., None]


class Sparse(nn.Module):
    def forward(self, x, mixing):
        return (mixing @ x).relu().to_sparse()


class AroundSparse(nn.Module):
    def __init__(self):
        super().__init__()
        self.before, self.sparse, self.after = nn.Linear(4, 4), Sparse(), nn.Linear(4, 4)

    def forward(self, x):
        return self.after(self.sparse(self.before(x), torch.eye(len(x)).to_sparse()).to_dense())


@pytest.mark.parametrize("rows", [1, 2])
def test_sparse_tensors_between_layers(rows):
    net, inputs = AroundSparse(), list(torch.randn(rows, 1, 4))
    with torch.no_grad():
        for use in (lambda row: row.sparse.output, lambda row: setattr(row.sparse, "output", torch.zeros(1, 4))):
            with pytest.raises(InputError, match=r"sparse.output.* is a sparse tensor, which cannot be cut into rows"):
                with Model(net).trace(inputs) as run:
                    use(run.rows[-1])
        with pytest.raises(AssignmentError, match=r"before.output .* cannot take a sparse tensor"):
            with Model(net).trace(inputs) as run:
                run.rows[-1].before.output = torch.zeros(1, 4).to_sparse()
        with Model(net).trace(inputs) as run:
            run.sparse.output = (run.sparse.output.to_dense() * 2).to_sparse()
        assert torch.allclose(run.result, net.after(net.before(torch.cat(inputs)).relu() * 2), atol=1e-6)


class TakesAList(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, views: list[torch.Tensor], grad=False):
        return sum(map(self.linear, views))


def test_a_forward_that_takes_a_list():
    net, views = TakesAList(), [torch.randn(2, 4), torch.randn(2, 4)]
    assert torch.equal(Model(net).trace(views).result, net(views))
    assert torch.equal(Model(net).trace(views=views).result, net(views))
    for annotation in (list[torch.Tensor] | None, "Optional[List[Tensor]]", "t.Union[torch.Tensor, t.List[Tensor]]"):
        kind = type("Annotated", (TakesAList,), {"forward": lambda self, views: TakesAList.forward(self, views)})
        kind.forward.__annotations__["views"] = annotation
        assert Model(kind()).trace(views).result.shape == (2, 4)
    assert torch.equal(Model(torch.compile(net, backend="eager")).trace(views).result, net(views))
    plain = Model(nn.Sequential(nn.Linear(4, 4)))
    assert torch.equal(plain.trace(views).result, plain(torch.cat(views)))
    with pytest.raises(InputError, match=r"do not form a batch.*takes a list, pass it by name: input=\[\.\.\.\]"):
        plain.trace([views[0], views[0][0]])


class TakesTwo(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x, y, scale=1):
        y = torch.cat(y) if isinstance(y, list) else y
        return self.left(x) - scale * self.right(y)


def annotated(annotation):
    """Return a TakesTwo whose second argument has an annotation."""
    kind = type("Annotated", (TakesTwo,), {"forward": lambda self, x, y: TakesTwo.forward(self, x, y)})
    kind.forward.__annotations__["y"] = annotation
    return kind()


def test_lists_for_several_arguments_are_one_batch():
    net, (a, b, c, d) = TakesTwo(), torch.randn(4, 1, 4)
    for first, second in (([a, b], [c, d]), ([a, torch.cat([b, c])], [b, torch.cat([c, d])])):
        with torch.no_grad(), Model(net).trace(first, second, 2) as run:
            value = run.rows[1].right.output
        assert torch.allclose(value, net.right(second[1])) and value.shape == second[1].shape
        assert torch.equal(run.result, net(torch.cat(first), torch.cat(second), 2))
    with Model(annotated("torch.Tensor | None")).trace([a], [b]) as run:
        assert torch.equal(run.right.input, b)
    for arguments, named in ((([a, b],), {"y": [c, d]}), (([a, b], [c, d]), {})):
        with Model(annotated(list[torch.Tensor])).trace(*arguments, **named) as run:
            args, kwargs = run.inputs
        given = kwargs.get("y", args[-1])
        assert type(given) is list and given[0] is c


def test_a_further_list_that_may_not_be_of_the_batch():
    net, (a, b, c, d) = TakesTwo(), torch.randn(4, 1, 4)
    told = r"argument 2 is a list .*torch\.cat\(.*takes a list, pass it by name: y=\[\.\.\.\]"
    for first, second in (([a], [b]), ([a, b], [c, torch.cat([d, d])])):
        with pytest.raises(InputError, match=told):
            Model(net).trace(first, second)
    with pytest.raises(InputError, match=told):
        Model(annotated("tuple[torch.Tensor, torch.Tensor]")).trace([a, b], [c, d])
    with pytest.raises(InputError, match=r"takes a list, write torch\.cat\(\[\.\.\.\]\) in place of the first list"):
        Model(net.left).check([a], [b])


@pytest.mark.parametrize("annotation", [None, "tuple[torch.Tensor, ...]", "torch.Tensor"])
def test_a_list_of_another_number_of_tensors_is_not_of_the_batch(annotation):
    net, (a, b, c, d) = annotated(annotation), torch.randn(4, 1, 4)
    for first, states in (([a, b], [c]), ([torch.cat([a, b])], [c, d])):
        with Model(net).trace(first, states) as run:
            assert run.inputs[0][1] is states
        assert torch.equal(run.result, net(torch.cat(first), states))


@pytest.mark.parametrize(
    "other, kinds",
    [
        (torch.zeros(1, 4, device="meta"), "devices are cpu, meta"),
        (torch.zeros(1, 4).to_sparse(), r"layouts are torch\.strided, torch\.sparse_coo"),
        (torch.zeros(1, 4, dtype=torch.float8_e4m3fn), r"dtypes are torch\.float32, torch\.float8_e4m3fn"),
        (torch.zeros(1, 5, device="meta"), r"shapes are \(1, 4\), \(1, 5\)"),
    ],
)
def test_inputs_that_do_not_form_a_batch(other, kinds):
    with pytest.raises(InputError, match=f"the inputs do not form a batch: their {kinds}"):
        Model(nn.Linear(4, 4)).check([torch.zeros(1, 4), other])


def test_a_forward_with_an_argument_called_grad():
    model, views = Model(TakesAList()), [torch.randn(2, 4)]
    with pytest.raises(InputError, match="an argument of that name too: pass that by position, as argument 2"):
        model.trace(views, grad=True)
    assert torch.equal(model.trace(views, True).result, model(views))
