"""Rows, one body per row, and passes inside a run: an edit of one input does not reach the others."""

import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GPT2Config, GPT2LMHeadModel

from diffsight import Model, OutOfOrderError
from diffsight.errors import AssignmentError, InputError, NeverReachedError, RunClosedError


class Net(nn.Module):
    """A stack whose middle layer returns a tuple, and which adds a value that all inputs share."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.last = (nn.Linear(4, 4) for _ in range(3))
        self.pair = Pair()
        self.place = Place()

    def forward(self, x):
        x = self.first(x) + self.place()
        x, _ = self.pair(self.second(x))
        return self.last(x)


class Pair(nn.Module):
    def forward(self, x):
        return x.relu(), x.sum(-1)


class Place(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, 4))

    def forward(self):
        return self.weight


@pytest.fixture
def net():
    return Net()


@pytest.fixture
def inputs():
    return [torch.randn(1, 4, generator=torch.Generator().manual_seed(i)) for i in range(3)]


def test_rows_read_their_part(net, inputs):
    with Model(net).trace(inputs) as run:
        rows = run.rows
        parts = [row.first.output for row in rows]
        whole = run.first.output
    assert [row.index for row in rows] == [0, 1, 2]
    for i, part in enumerate(parts):
        assert part.data_ptr() == whole[i].data_ptr()  # views of the batch
        assert torch.allclose(part, net.first(inputs[i]), atol=1e-6)


def test_inputs_of_several_entries_and_a_tensor_as_batch(net, inputs):
    a, b = torch.cat(inputs[:2]), inputs[2]
    with Model(net).trace([a, b]) as run:
        x, y = run.rows
        assert x.first.output.shape == (2, 4) and y.first.output.shape == (1, 4)
    with Model(net).trace(a) as run:
        assert len(run.rows) == 2


class Queries(nn.Module):
    """A value whose rows share their memory, which is a weight's unless it is computed."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.queries = nn.Parameter(torch.randn(1, 4, generator=torch.Generator().manual_seed(0)))

    def forward(self, x):
        expanded = (self.queries * 1 if self.kind == "computed" else self.queries).expand(len(x), -1)
        return {"x": x, "queries": expanded} if self.kind == "dictionary" else expanded


class AddQueries(nn.Module):
    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        self.queries, self.last = Queries(kind), nn.Linear(4, 4)
        self.same = nn.Identity()

    def forward(self, x):
        queries = self.queries(x)
        return self.last(x + self.same(queries["queries"] if self.queries.kind == "dictionary" else queries))


@pytest.mark.parametrize("has_gradients", [False, True])
@pytest.mark.parametrize("kind", ["tensor", "dictionary"])
def test_rows_that_share_memory_are_edited_one_by_one(kind, has_gradients, inputs):
    net, factors = AddQueries(kind), torch.tensor([[1.0], [2.0], [1.0]])
    weight = net.queries.queries.clone()
    expected = net.last(torch.cat(inputs) + weight * factors)
    with torch.set_grad_enabled(has_gradients), Model(net).trace(inputs, grad=has_gradients) as run:
        rows = [row.queries.output for row in run.rows]
        row = rows[1]["queries"] if kind == "dictionary" else rows[1]
        row.mul_(2)
        if has_gradients:
            run.backward(run.output.sum())
    assert torch.allclose(run.result, expected, atol=1e-6)
    assert torch.equal(net.queries.queries, weight)
    if has_gradients:
        assert torch.allclose(net.queries.queries.grad, net.last.weight.sum(0, keepdim=True) * 4, atol=1e-5)


def test_inputs_that_share_memory_and_functions_of_each(inputs):
    net = AddQueries("tensor")
    x, queries = torch.cat(inputs), net.queries.queries
    expected = net.last(x + queries * torch.tensor([[1.0], [2.0], [3.0]])).detach()

    def multiply(row):
        row.same.input[:] *= row.index + 1

    with torch.no_grad(), Model(net).trace(inputs) as run:
        run.each(multiply)
    assert torch.allclose(run.result, expected, atol=1e-6)
    with torch.no_grad(), Model(net).trace(inputs) as run:
        for row in run.rows:
            multiply(row)
    assert torch.allclose(run.result, expected, atol=1e-6)
    windows = torch.arange(5.0).unfold(0, 4, 1)  # two rows that overlap
    expected = net.last(torch.stack([windows[0], windows[1] * 2]) + queries).detach()
    with torch.no_grad(), Model(net).trace(windows.as_strided((2, 4), (1, 1))) as run:
        run.rows[1].input[:] *= 2
    assert torch.allclose(run.result, expected, atol=1e-6)


def test_changes_beside_rows_that_share_memory(inputs):
    net = AddQueries("computed")
    x, queries = torch.cat(inputs), net.queries.queries.detach()
    with torch.no_grad(), Model(net).trace(inputs) as run:
        whole, row = run.queries.output, run.rows[1].queries.output
        assert torch.equal(row, queries)
        whole[0] *= 2  # of all rows, as without the run
    assert torch.allclose(run.result, net.last(x + queries * 2), atol=1e-6)
    with torch.no_grad(), Model(net).trace(inputs) as run:
        first, second = run.rows[0].queries.output, run.rows[1].queries.output
        first += 1
        second += 2
        run.rows[0].queries.output[:] *= 3
    factors, terms = torch.tensor([[3.0], [1.0], [1.0]]), torch.tensor([[3.0], [2.0], [0.0]])
    assert torch.allclose(run.result, net.last(x + queries * factors + terms), atol=1e-6)
    for change in (lambda run: run.queries.output[0].mul_(2), lambda run: run.rows[1].queries.output.mul_(2)):
        with pytest.raises(OutOfOrderError, match="continues with a copy"), torch.no_grad():
            with Model(net).trace(inputs) as run:
                row = run.rows[1].queries.output
                change(run)
                row[:] = 0


def test_values_in_several_places_stay_so_in_rows_that_share_memory(inputs):
    class Twice(nn.Module):
        def forward(self, x):
            y = x[:1].expand(len(x), -1)
            return y, {"again": y}

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.twice = Twice()

        def forward(self, x):
            y, others = self.twice(x)
            return y + 10 * others["again"]

    x = torch.cat(inputs)
    with torch.no_grad(), Model(Net()).trace(inputs) as run:
        pair = run.rows[1].twice.output
        assert pair[0] is pair[1]["again"]
        pair[0][:] = 5
    assert torch.allclose(run.result, torch.stack([x[0] * 11, torch.full((4,), 55.0), x[0] * 11]))


def test_an_edit_in_place_reaches_one_row(net, inputs):
    with Model(net).trace(inputs) as run:
        run.rows[1].second.output[:] = 0
    expected = net(torch.cat(inputs))
    expected[1] = net.last(torch.zeros(4))
    assert torch.allclose(run.result, expected, atol=1e-6)


def test_a_row_feeds_another(net, inputs):
    a, _, c = inputs
    with Model(net).trace(inputs) as run:
        x, y, z = run.rows
        z.first.output = z.first.output * 2
        y.second.output = x.second.output
    expected = [net(a), net(a), net.last(net.pair(net.second(2 * net.first(c) + net.place()))[0])]
    assert torch.allclose(run.result, torch.cat(expected), atol=1e-6)


def test_an_assigned_row_leaves_the_models_own_tensor_alone(net, inputs):
    with Model(net).trace(inputs) as run:
        before = run.first.output
        kept = before.clone()
        run.rows[0].first.output = torch.zeros(1, 4)
        assert torch.equal(before, kept)
        assert torch.equal(run.first.output[0], torch.zeros(4)) and torch.equal(run.first.output[1:], kept[1:])


def test_assignments_of_rows_wait_for_the_model(net, inputs):
    with Model(net).trace(inputs) as run:
        x, _, z = run.rows
        z.last.input = torch.ones(1, 4)
        x.last.input = torch.zeros(1, 4)
        seen = run.last.input.clone()
    assert torch.equal(seen[0], torch.zeros(4)) and torch.equal(seen[2], torch.ones(4))
    assert torch.allclose(seen[1], net.pair(net.second(net.first(inputs[1]) + net.place()))[0][0], atol=1e-6)


def test_tuples_are_narrowed_element_by_element(net, inputs):
    with Model(net).trace(inputs) as run:
        hidden, total = run.rows[2].pair.output
        assert hidden.shape == (1, 4) and total.shape == (1,)
        run.rows[2].pair.output = (torch.ones(1, 4), total)
    assert torch.allclose(run.result[2], net.last(torch.ones(4)))


def test_a_single_input_is_a_batch_as_well(net, inputs):
    with Model(net).trace(inputs[:1]) as run:
        (row,) = run.rows
        row.pair.output = (torch.ones(1, 4), row.pair.output[1])
    assert torch.equal(run.result, net.last(torch.ones(1, 4)))


def test_gradients_flow_through_every_row_that_is_assigned(net, inputs):
    with Model(net).trace(inputs) as run:
        for row in run.rows:
            row.first.output = row.first.output**2  # what autograd keeps of it is not written over
    run.result.sum().backward()
    got = net.first.weight.grad.clone()
    net.zero_grad()
    net.last(net.pair(net.second(net.first(torch.cat(inputs)) ** 2 + net.place()))[0]).sum().backward()
    assert torch.allclose(got, net.first.weight.grad, atol=1e-6)


class Clones(TorchDispatchMode):
    """Counts the tensors of a shape that are cloned."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape, self.count = shape, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten.clone.default and tuple(args[0].shape) == self.shape
        return function(*args, **(kwargs or {}))


def test_the_batch_is_copied_once_for_all_rows_that_are_assigned(net, inputs):
    with Model(net).trace(inputs) as run:
        before, rows = run.first.output, run.rows
        with Clones((3, 4)) as clones:
            for number, row in enumerate(rows):
                row.first.output = torch.full((1, 4), float(number))
        middle = run.first.output.square().sum()  # autograd holds the copy for this
        with Clones((3, 4)) as more:
            for row in rows[:2]:
                row.first.output = torch.zeros(1, 4, requires_grad=True)
    assert (clones.count, more.count) == (1, 1)
    (middle + run.result.sum()).backward()
    expected = torch.tensor([0.0, 0.0, 2.0]).view(3, 1).expand(3, 4)
    assert torch.allclose(run.result, net.last(net.pair(net.second(expected + net.place()))[0]), atol=1e-6)
    assert before.grad_fn is not None and middle == (0 + 1 + 4) * 4


def test_a_row_assigned_without_gradients_leaves_those_of_the_others(net, inputs):
    with torch.no_grad(), Model(net).trace(inputs, grad=True) as run:
        whole = run.first.output
        run.rows[1].first.output = torch.zeros(1, 4)
    whole.retain_grad()
    run.result.sum().backward()
    assert whole.grad[1].count_nonzero() == 0 and whole.grad[[0, 2]].count_nonzero() > 0


def test_output_objects_are_narrowed():
    gpt2 = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=30)).eval()
    ids = torch.arange(10).view(2, 5)
    with torch.no_grad(), Model(gpt2).trace(ids) as run:
        row = run.rows[1].output
    assert type(row) is type(run.result) and torch.equal(row.logits, run.result.logits[1:])


def test_what_has_no_batch_is_an_error(net, inputs):
    with pytest.raises(InputError, match=r"place\.output cannot be cut into rows: its shape is \(1, 4\)"):
        with Model(net).trace(inputs) as run:
            run.rows[0].place.output


def test_a_batch_in_the_second_dimension_is_an_error():
    lstm, batch = nn.LSTM(4, 5, batch_first=True), [torch.randn(1, 3, 4) for _ in range(2)]
    with Model(lstm).trace(batch) as run:
        _, states = run.output
        with pytest.raises(InputError, match=r"cannot be cut into rows: its shape is \(1, 2, 5\)"):
            run.rows[1].output
        with pytest.raises(InputError, match=r"cannot be cut into rows: its shape is \(1, 2, 5\)"):
            run.rows[1].output = (torch.zeros(1, 3, 5), states)
    assert torch.equal(run.result[0], lstm(torch.cat(batch))[0])


@pytest.mark.parametrize("value", [torch.zeros(1, 4), torch.zeros(3, 4)])
def test_what_all_rows_share_takes_no_row(net, inputs, value):
    with pytest.raises(InputError, match=r"place\.output .*cannot be cut into rows: its shape is \(1, 4\)"):
        with Model(net).trace(inputs) as run:
            run.rows[0].place.output = value


def test_wrong_shapes_and_types_for_a_row(net, inputs):
    with pytest.raises(AssignmentError, match=r"\(1, 4\), not \(2, 4\)"):
        with Model(net).trace(inputs) as run:
            run.rows[0].first.output = torch.zeros(2, 4)
    with pytest.raises(AssignmentError, match="is a tuple; it cannot take a Tensor"):
        with Model(net).trace(inputs) as run:
            run.rows[0].pair.output = torch.zeros(1, 4)
    with pytest.raises(InputError, match="the inputs do not form a batch"):
        Model(net).trace([torch.zeros(1, 4), torch.zeros(1, 5)])
    with pytest.raises(InputError, match="has no rows"):
        Model(net.place).trace().rows
    with pytest.raises(InputError, match="for all rows"):
        with Model(net).trace(inputs) as run:
            run.rows[0].first.skip(torch.zeros(1, 4))


# ---- dimensions that have the size of the batch and are something else


class TimeFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.rnn, self.last = nn.Linear(4, 4), nn.GRU(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.last(self.rnn(self.first(x).transpose(0, 1))[0]).transpose(0, 1)


class Experts(nn.Module):
    """Which tokens an expert gets depends on their values."""

    def __init__(self):
        super().__init__()
        self.first, self.all, self.last = nn.Linear(4, 3), nn.Identity(), nn.Linear(4, 4)
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x):
        chosen, together = self.first(x).argmax(-1), torch.zeros_like(x)
        outputs = self.all(torch.stack([expert(x) for expert in self.experts]))
        for number, output in enumerate(outputs):
            together[(chosen == number).nonzero(as_tuple=True)] = output[(chosen == number).nonzero(as_tuple=True)]
        return self.last(together)


class InChunks(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.chunk, self.last = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x):
        chunks = [self.chunk(part) for part in self.first(x).flatten(0, 1).split(3)]
        return self.last(torch.cat(chunks).view_as(x))


class Mixed(nn.Module):
    """The values of its middle: one with the batch, one for all inputs, one with the time first."""

    def __init__(self):
        super().__init__()
        self.first, self.rnn, self.last = nn.Linear(4, 4), Several(), nn.Linear(4, 4)

    def forward(self, x):
        return self.last(self.rnn(self.first(x))["hidden"])


class Several(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(3, 4))

    def forward(self, x):
        return {"table": self.table * 2, "hidden": x, "count": 3}


class ByName(nn.Module):
    def __init__(self, crossed):
        super().__init__()
        self.first, self.rnn, self.last, self.crossed = nn.Linear(4, 4), nn.Identity(), nn.Linear(4, 4), crossed

    def forward(self, x):
        hidden = self.first(x)
        together = self.rnn({"time": hidden.transpose(0, 1), "hidden": hidden} if self.crossed else (hidden, None))
        return self.last(together["hidden"] if self.crossed else together[0])


def cut(net, path, call=0):
    x = torch.randn(3, 3, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), Model(net).trace(x) as run:
        whole = run[path].calls[call].output
        return whole, [row[path].calls[call].output for row in run.rows]


@pytest.mark.parametrize("path", ["first", "last"])
@pytest.mark.parametrize("kind", [Experts, InChunks, Mixed])
def test_the_batch_is_found_where_it_is(kind, path):
    whole, rows = cut(kind(), path)
    assert torch.equal(torch.cat(rows), whole) and len(rows) == 3


@pytest.mark.parametrize("kind, path", [(TimeFirst, "rnn"), (TimeFirst, "last"), (Experts, "all"), (InChunks, "chunk")])
def test_another_dimension_of_the_same_size_is_an_error(kind, path):
    with pytest.raises(InputError, match=rf"rows\[0\].{path}.*cannot be cut into rows: its shape is \(3, [34]"):
        cut(kind(), path)


def test_what_all_rows_share_is_left_whole_in_containers():
    net = Mixed()
    whole, rows = cut(net, "rnn")
    assert all(torch.equal(row["table"], whole["table"]) and row["count"] == 3 for row in rows)
    assert torch.equal(torch.cat([row["hidden"] for row in rows]), whole["hidden"])
    x = torch.randn(3, 3, 4)
    with torch.no_grad(), Model(net).trace(x) as run:
        run.rows[1].rnn.output = {"table": whole["table"], "hidden": torch.ones(1, 3, 4), "count": 3}
    expected = net(x)
    expected[1] = net.last(torch.ones(3, 4))
    assert torch.allclose(run.result, expected, atol=1e-6)


@pytest.mark.parametrize("path", ["", "rnn"])
def test_time_that_is_taken_for_the_batch_is_an_error(path):
    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = nn.LSTM(4, 5)

        def forward(self, x):
            return self.rnn(x)[0]

    with pytest.raises(InputError, match="cannot be cut into rows"):
        cut(Around(), path) if path else cut_root(nn.LSTM(4, 5))


def cut_root(net):
    with Model(net).trace(torch.randn(3, 3, 4)) as run:
        return run.rows[0].output


def test_the_inputs_of_a_model_that_are_asked_for_first():
    x = torch.randn(3, 3, 4)
    with torch.no_grad(), Model(Experts()).trace(x) as run:
        assert torch.equal(run.rows[1].input, x[1:2]) and torch.equal(run.rows[1].inputs[0][0], x[1:2])
        with pytest.raises(InputError, match="cannot be cut into rows"):
            run.rows[1].all.output


def test_one_value_of_a_dictionary_without_rows_is_an_error():
    assert len(cut(ByName(False), "rnn")[1]) == 3
    with pytest.raises(InputError, match="cannot be cut into rows"):
        cut(ByName(True), "rnn")


def test_a_sequence_as_long_as_the_batch():
    gpt2 = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=30)).eval()
    ids = torch.arange(9).view(3, 3)
    with torch.no_grad(), Model(gpt2).generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0) as run:
        for _ in run.steps[1:]:
            whole = run.transformer.h[1].output
            rows = [row.transformer.h[1].output for row in run.rows]
            assert torch.equal(torch.cat(rows), whole)
    expected = gpt2.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert torch.equal(run.result, expected)


def test_windows_of_swin_are_no_rows():
    from transformers import SwinConfig, SwinModel

    config = SwinConfig(image_size=8, patch_size=1, embed_dim=8, depths=[1], num_heads=[2], window_size=4)
    net, images = SwinModel(config).eval(), torch.randn(4, 3, 8, 8)
    with torch.no_grad(), Model(net).trace(images) as run:
        block = run.encoder.layers[0].blocks[0]
        with pytest.raises(InputError, match="cannot be cut into rows"):
            run.rows[1].encoder.layers[0].blocks[0].attention.output
        row, whole = run.rows[1].encoder.layers[0].blocks[0].output, block.output
        assert torch.equal(row[0], whole[0][1:2])


def test_looking_for_the_batch_leaves_nothing_behind():
    """The calls on copies touch neither the weights, the buffers, the random state nor the user's hooks."""
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
    seen, x = [], torch.randn(3, 4)
    net[0].register_forward_hook(lambda *_: seen.append(1))
    state = {name: value.clone() for name, value in net.state_dict().items()}
    torch.manual_seed(0)
    expected = net(x)
    after = net.state_dict()
    after = {name: value.clone() for name, value in after.items()}
    net.load_state_dict(state)
    torch.manual_seed(0)
    with Model(net).trace(x) as run:
        run.rows[1][0].output
    assert torch.equal(run.result, expected) and len(seen) == 2
    assert all(torch.equal(value, after[name]) for name, value in net.state_dict().items())


# ---- a body a row


def test_each_row_at_its_own_place(net, inputs):
    def early(row):
        row.first.output = torch.zeros(1, 4)
        return row.first.output.clone()

    def late(row):
        return row.last.output.clone()

    with Model(net).trace(inputs) as run:
        zero, last, first = run.each([early, late, early])
    assert torch.equal(zero, torch.zeros(1, 4)) and torch.equal(first, zero)
    assert torch.allclose(last, net(inputs[1]), atol=1e-6)
    assert torch.allclose(run.result[0], net.last(net.pair(net.second(net.place()))[0])[0], atol=1e-6)


def test_values_flow_forward_between_the_bodies(net, inputs):
    kept = {}

    def source(row):
        kept["hidden"] = row.first.output

    def sink(row):
        row.second.output = kept["hidden"] if row.second.output is not None else None

    with Model(net).trace(inputs) as run:
        run.each([source, sink, sink])
    expected = net.last(net.pair(net.first(inputs[0]))[0])
    assert torch.allclose(run.result[1:], expected.expand(2, 4), atol=1e-6)


def test_each_repeats_over_steps():
    gpt2 = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=30)).eval()
    ids = torch.arange(10).view(2, 5)

    def norms(row):
        return [row.transformer.h[1].output.norm() for _ in row.steps]

    with Model(gpt2).generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0) as run:
        seen = run.each(norms)
    expected = []
    hook = gpt2.transformer.h[1].register_forward_hook(lambda m, i, o: expected.append([o[0].norm(), o[1].norm()]))
    gpt2.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0)
    hook.remove()
    assert torch.equal(torch.tensor(seen), torch.tensor(expected).T)


def test_each_in_a_loop_over_steps():
    gpt2 = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=30)).eval()
    ids, given = torch.arange(10).view(2, 5), dict(max_new_tokens=3, do_sample=False, pad_token_id=0)
    model, expected = Model(gpt2), []
    hook = gpt2.transformer.h[1].register_forward_hook(lambda m, i, o: expected.append(o))
    gpt2.generate(ids, **given)
    hook.remove()
    with model.generate(ids, **given) as run:
        seen = [run.each(lambda row: row.transformer.h[1].output.clone()) for _ in run.steps]
    assert [torch.equal(torch.cat(rows), whole) for rows, whole in zip(seen, expected, strict=True)] == [True] * 3

    def triple(row):
        row.transformer.h[1].output *= 3

    with model.generate(ids, **given) as run, model.generate(ids, **given) as other:
        for _ in run.steps[1:]:
            run.each(triple)
        for _ in other.steps[1:]:
            other.transformer.h[1].output *= 3
    assert torch.equal(run.result, other.result)
    with pytest.raises(OutOfOrderError, match="step 0 ended"):
        with model.generate(ids, **given) as run:
            for _ in run.steps:
                run.each(lambda row: row.transformer.h[1].calls[1].output)


def test_errors_of_a_body_surface_and_leave_nothing(net, inputs):
    def behind(row):
        row.second.output
        row.first.output

    with pytest.raises(OutOfOrderError, match=r"first\.output"):
        with Model(net).trace(inputs) as run:
            run.each(behind)
    with pytest.raises(ZeroDivisionError):
        with Model(net).trace(inputs) as run:
            run.each(lambda row: row.last.output.norm() / 0 if row.index < 1 else 1 / 0)
    with pytest.raises(NeverReachedError):
        with Model(net).trace(inputs) as run:
            run.each(lambda row: row.first.calls[1].output)
    with pytest.raises(InputError, match="2 functions for 3 rows"):
        with Model(net).trace(inputs) as run:
            run.each([print, print])
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())


def test_a_body_keeps_its_own_grad_mode(net, inputs):
    def body(row):
        with torch.set_grad_enabled(row.index == 0):
            row.first.output
            before = torch.is_grad_enabled()
            row.last.output
            return before, torch.is_grad_enabled()

    with Model(net).trace(inputs) as run:
        assert run.each(body) == [(True, True), (False, False), (False, False)]


# ---- passes inside a run


def test_a_later_pass_has_any_value_of_an_earlier_one(net, inputs):
    model = Model(net)
    with model.trace() as run:
        with run.invoke(inputs[0]):
            late = model.second.output
        with run.invoke(inputs[1]) as part:
            assert part.inputs[0][0] is inputs[1]
            run.first.output = late
    first, second = run.result
    assert torch.equal(first, net(inputs[0]))
    assert torch.equal(second, net.last(net.pair(net.second(late + net.place()))[0]))


def test_passes_take_what_the_run_was_given():
    gpt2 = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=30)).eval()
    ids = torch.arange(5)[None]
    with Model(gpt2).generate(max_new_tokens=2, do_sample=False, pad_token_id=0) as run:
        with run.invoke(ids):
            pass
    assert torch.equal(run.result[0], gpt2.generate(ids, max_new_tokens=2, do_sample=False, pad_token_id=0))


def test_invoke_needs_a_run_without_input(net, inputs):
    with pytest.raises(InputError, match="opened without input"):
        with Model(net).trace(inputs[0]) as run:
            run.invoke(inputs[1])


class Looping(Net):
    def generate(self, x, steps=3):
        for _ in range(steps):
            x = self(x)
        return x


def test_the_run_stands_for_its_last_pass(inputs):
    net = Looping()
    with Model(net).generate() as run:
        with run.invoke(inputs[:2]):
            kept = run.record("first")
            rows = [[row.second.output for row in run.rows] for _ in run.steps]
        with run.invoke(inputs[2], steps=2):
            assert [step.index for step in run.steps] == [0, 1]
    assert [[tuple(part.shape) for part in parts] for parts in rows] == [[(1, 4)] * 2] * 3
    assert torch.equal(kept["first.output"][0], net.first(torch.cat(inputs[:2])))
    assert torch.equal(run.result[1], net.generate(inputs[2], steps=2))


def test_a_pass_can_be_stopped(net, inputs):
    with Model(net).trace() as run:
        with run.invoke(inputs[0]):
            early = run.first.output
            run.last.output = torch.zeros(1, 4)
            run.stop()
        with run.invoke(inputs[1]) as part:
            part.stop()
        with run.invoke(inputs[2]) as last:
            last.first.output = early
    assert torch.equal(last.result, net.last(net.pair(net.second(early + net.place()))[0]))
    with pytest.raises(RunClosedError, match="stopped"):
        run.result


def test_an_error_closes_all_passes(net, inputs):
    with pytest.raises(ZeroDivisionError):
        with Model(net).trace() as run:
            left_open = run.invoke(inputs[0])
            left_open.first.output
            with run.invoke(inputs[1]):
                1 / 0
    assert not net.first._forward_hooks and not net._forward_hooks
    with pytest.raises(RunClosedError):
        left_open.second.output


@pytest.mark.parametrize("ask", [lambda run: run.result, lambda run: run.finish(), lambda run: run.each(id)])
def test_the_function_of_a_row_cannot_run_the_model(net, inputs, ask):
    with pytest.raises(InputError, match=r"a function of run\.each runs alongside the model"):
        with Model(net).trace(inputs) as run:
            run.each(lambda row: ask(run))
    assert not net._forward_hooks


def test_each_takes_functions(net, inputs):
    def yielding(row):
        yield row.first.output

    with pytest.raises(InputError, match="a function of a row"):
        with Model(net).trace(inputs) as run:
            run.each(None)
    with pytest.raises(InputError, match="plain functions"):
        with Model(net).trace(inputs) as run:
            run.each(yielding)


@pytest.mark.parametrize(
    "value, told",
    [
        ((torch.zeros(1, 4), None), "is a Tensor; it cannot take a NoneType"),
        ((torch.zeros(1, 4),), "holds 2 values; it cannot take a tuple of 1"),
    ],
)
def test_a_row_takes_what_the_output_holds(net, inputs, value, told):
    with pytest.raises(AssignmentError, match=rf"rows\[1\].pair.output.*{told}"):
        with Model(net).trace(inputs) as run:
            run.rows[1].pair.output = value
    assert not net._forward_hooks


class TwoParts(nn.Module):
    """Its middle returns something made of the hidden states, of shape (batch, 3, 4)."""

    def __init__(self, divided, joined):
        super().__init__()
        self.first, self.middle, self.divided, self.joined = nn.Linear(4, 4), nn.Identity(), divided, joined

    def forward(self, x):
        return self.joined(self.middle(self.divided(self.first(x))))


@pytest.mark.parametrize("tokens", [3, 6])
def test_a_list_with_a_tensor_per_input_is_not_cut(tokens):
    net = TwoParts(list, torch.stack)  # each tensor is (tokens, 4), and there are as many inputs as tokens
    for use in (lambda row: row.middle.output, lambda row: setattr(row.middle, "output", [torch.zeros(1, 4)] * 3)):
        with (
            pytest.raises(InputError, match="cannot be cut into rows"),
            Model(net).trace(torch.randn(3, tokens, 4)) as run,
        ):
            use(run.rows[0])


@pytest.mark.parametrize(
    "shared, other", [(torch.ones(()), torch.zeros(())), (torch.ones(1, 4), torch.ones(1, 4) * 2), (2.0, 3.0)]
)
def test_a_row_cannot_change_what_all_rows_share(shared, other):
    net, x, row = (
        TwoParts(lambda y: (y, shared), lambda parts: parts[0] * parts[1]),
        torch.randn(3, 2, 4),
        torch.ones(1, 2, 4),
    )
    with Model(net).trace(x) as run:
        run.rows[1].middle.output = (row, copy.copy(shared))
    expected = net(x)
    expected[1] = row[0] * shared
    assert torch.equal(run.result, expected)
    with pytest.raises(AssignmentError, match="that all rows share"), Model(net).trace(x) as run:
        run.rows[1].middle.output = (row, other)
