"""Models for the tests of `diffsight.compat`, which run code of nnsight's guides.

The models are small and random. The blocks of a bare GPT-2 return plain tensors in transformers 5, so the guides'
`.output[0]` is `.output` here. Expected values come from ordinary hooks.
"""

from collections import OrderedDict

import pytest
import torch
from torch import nn

from compat.constants import HIDDEN_DIMS, INPUT_SIZE, OUTPUT_SIZE
from diffsight.compat import NNsight


@pytest.fixture
def net():
    with torch.random.fork_rng():
        torch.default_generator.manual_seed(0)
        layers = [
            ("layer1", nn.Linear(INPUT_SIZE, HIDDEN_DIMS)),
            ("layer2", nn.Linear(HIDDEN_DIMS, OUTPUT_SIZE)),
        ]
        return nn.Sequential(OrderedDict(layers)).requires_grad_(False)


@pytest.fixture
def tiny_model(net):
    return NNsight(net)


@pytest.fixture
def input():
    return torch.rand((1, INPUT_SIZE), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def llm(gpt2):
    return NNsight(gpt2)


@pytest.fixture
def other():
    return torch.tensor([[3, 9, 27]])
