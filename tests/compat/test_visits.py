"""`tracer.iter` in a run of one pass, where a turn means a call of each module."""

import pytest
import torch
from torch import nn

from diffsight.compat import LanguageModel, NNsight
from diffsight.errors import InputError


class Loop(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = nn.Linear(4, 4)

    def forward(self, x):
        outs = []
        for _ in range(4):
            x = self.block(x)
            outs.append(x)
        return torch.stack(outs)


@pytest.fixture
def loop():
    return Loop().requires_grad_(False)


X = torch.ones(1, 4)


def test_reading(loop):
    model, expected = NNsight(loop), loop(X)
    with model.trace(X) as tracer:
        some = [model.block.output for _ in tracer.iter[1:3]]
    assert torch.equal(torch.stack(some), expected[1:3])
    with model.trace(X) as tracer:
        picked = [(turn, model.block.output) for turn in tracer.iter[[0, 3]]]
    assert [turn for turn, _ in picked] == [0, 3] and torch.equal(picked[1][1], expected[3])
    with model.trace(X) as tracer:
        for _ in tracer.iter[2]:
            value = model.block.output
        reached = True
    assert torch.equal(value, expected[2]) and reached


def test_writing(loop):
    model = NNsight(loop)
    with model.trace(X) as tracer:
        for _ in tracer.iter[1:2]:
            model.block.output = torch.zeros(1, 4)
        result = tracer.result
    by_hand = torch.stack([loop.block(X), torch.zeros(1, 4), *loop(torch.zeros(1, 4))[:2]])
    assert torch.equal(result, by_hand)
    with model.trace(X) as tracer:
        with tracer.iter[1:2]:
            model.block.output[:] = 0
    assert torch.equal(tracer.result, by_hand)


def test_more_turns_than_calls(loop):
    model, expected, reached = NNsight(loop), loop(X), []
    for stop in (None, 9):
        found = []
        with pytest.warns(UserWarning, match="was never reached"), model.trace(X) as tracer:
            for _ in tracer.iter[:stop]:
                found.append(model.block.output)
            reached.append("behind the loop")
        assert torch.equal(torch.stack(found), expected) and reached == []
    with pytest.raises(InputError, match="negative"), model.trace(X) as tracer:
        tracer.iter[-1]


def test_skipping(loop):
    model, given = NNsight(loop), torch.zeros(1, 4)
    first, after = loop.block(X), loop(given)
    with model.trace(X) as tracer:
        for _ in tracer.iter[1:2]:
            model.block.skip(given)
    assert torch.equal(tracer.result, torch.stack([first, given, *after[:2]]))
    with pytest.warns(UserWarning, match="was never reached"), model.trace(X) as tracer:
        for _ in tracer.iter[:]:
            model.block.skip(given)
    assert torch.equal(tracer.result, torch.zeros(4, 1, 4))


class Adapter(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4).requires_grad_(False)

    def forward(self, x):
        return self.inner(x)


@pytest.fixture
def adapted(loop):
    """A model in which an edit applies an attached module at every call, and what its calls return."""
    model, adapter = NNsight(loop), Adapter()
    model.block.adapter = adapter
    with model.edit(inplace=True) as tracer:
        for _ in tracer.iter[:]:
            model.block.output[:] = model.block.adapter(model.block.output, hook=True)
    expected = [X]
    for _ in range(4):
        expected.append(adapter(loop.block(expected[-1])))
    return model, torch.stack(expected[1:])


def test_edit_at_every_call(adapted):
    model, expected = adapted
    with model.trace(X) as tracer:
        some = [model.block.adapter.inner.output for _ in tracer.iter[:3]]
        rest = model.block.adapter.calls[3].output
    assert torch.equal(torch.stack([*some, rest]), expected) and torch.equal(tracer.result, expected)
    with model.trace(X) as tracer:
        later = [model.block.output for _ in tracer.iter[1:3]]
    assert torch.equal(torch.stack(later), expected[1:3]) and torch.equal(tracer.result, expected)


@pytest.mark.parametrize("chosen, changed", [(slice(1, 3), [1, 2]), (slice(0, 9), [0, 1, 2, 3]), (2, [2])])
def test_edit_at_some_calls(loop, chosen, changed):
    model = NNsight(loop)
    with model.edit(inplace=True) as tracer:
        for _ in tracer.iter[chosen]:
            model.block.output = model.block.output * 2
    expected = [X]
    for call in range(4):
        expected.append(loop.block(expected[-1]) * (2 if call in changed else 1))
    with model.trace(X) as tracer:
        pass
    assert torch.equal(tracer.result, torch.stack(expected[1:]))


def test_open_loop_that_asks_for_nothing_more_ends(loop):
    model = NNsight(loop)
    with model.edit(inplace=True) as tracer:
        for turn in tracer.iter[:]:
            if turn == 0:
                model.block.output = torch.zeros(1, 4)
    with model.trace(X) as tracer:
        for turn in tracer.iter[:]:
            if turn == 1:
                second = model.block.output
    by_hand = torch.stack([torch.zeros(1, 4), *loop(torch.zeros(1, 4))[:3]])
    assert torch.equal(second, by_hand[1]) and torch.equal(tracer.result, by_hand)


def test_every_name_means_the_call_of_the_turn(gpt2, ids):
    """Each layer is called once in a pass, so that turn 1 has no value of it, by whichever name."""
    model, reached = LanguageModel(gpt2), []
    for change in (
        lambda: model.layers_output[1],
        lambda: model.heads_output[1],
        lambda: model.layers[1].mlp.calls[0].output,
        lambda: setattr(model, "logits", torch.zeros(1, 3, 61)),
        lambda: model.layers_output.__setitem__(1, torch.zeros(1, 3, 16)),
        lambda: model.steer(1, torch.ones(16)),
    ):
        with (
            torch.no_grad(),
            pytest.warns(UserWarning, match="was never reached") as caught,
            model.trace(ids) as tracer,
        ):
            for _ in tracer.iter[1:2]:
                reached.append(change())
        assert torch.equal(tracer.result.logits, gpt2(ids).logits) and caught[0].filename == __file__
    assert reached == []


def test_calls_are_counted_from_the_turn(loop):
    model, expected = NNsight(loop), loop(X)
    with model.trace(X) as tracer:
        for _ in tracer.iter[1:2]:
            own, following = model.block.calls[0].output, model.block.calls[2].output
    assert torch.equal(own, expected[1]) and torch.equal(following, expected[3])
