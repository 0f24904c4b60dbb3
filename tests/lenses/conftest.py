"""A small language model for the lenses on language models."""

import pytest
import writers


@pytest.fixture(scope="module")
def net():
    return writers.gpt2()


@pytest.fixture(scope="module")
def model(net):
    return writers.model(net)
