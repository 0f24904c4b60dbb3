"""A small language model for the lenses on language models."""

import pytest

from models import language


@pytest.fixture(scope="module")
def net():
    return language.gpt2()


@pytest.fixture(scope="module")
def model(net):
    return language.model(net)
