"""transformers puts hooks on a model in the first call that asks for hidden states, and keeps in mind that they are
there. Where a pass is undone, both are."""

import pytest
import torch
import transformers
from torch import nn

from diffsight import LanguageModel, Model


@pytest.fixture
def net():
    sizes = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 16, "vocab_size": 32}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, output_hidden_states=True)).eval()


IDS = torch.tensor([[3, 4, 5]])


def test_names_are_checked_without_a_trace(net):
    model = LanguageModel(net)
    assert len(model.trace(IDS).result.hidden_states) == 4
    assert len(net(IDS).hidden_states) == 4


def test_a_scan_leaves_hidden_states_as_they_are(net):
    with Model(net).scan(IDS) as run:
        assert len(run.output.hidden_states) == 4
    assert len(net(IDS).hidden_states) == 4


def test_hooks_from_before_a_scan_stay(net):
    seen = []
    net.transformer.h[0].register_forward_hook(lambda *call: seen.append(call))
    with Model(net).scan(IDS) as run:
        run.output
    net(IDS)
    assert len(seen) == 2


def test_a_run_within_a_scan_keeps_its_hooks():
    one, other = nn.Linear(2, 2), nn.Linear(2, 2)
    both = Model(nn.Sequential(one, other))
    x = torch.ones(1, 2)
    with both.scan(x) as run:
        run[1].output
        inner = Model(other).trace(x)
        inner.input
    assert torch.equal(inner.output, other(x))
