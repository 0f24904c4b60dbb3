"""`tracer.iter` in a run of one pass, where a turn means a call of each module."""

import pytest
import torch
from torch import nn

from diffsight.compat import NNsight
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
