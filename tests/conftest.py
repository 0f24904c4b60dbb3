"""Settings of the test suite."""

import os

import matplotlib
import pytest
import torch

matplotlib.use("Agg")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # what it says of random weights and of missing packages
torch.set_num_threads(1)  # the models are tiny: more threads only wait for each other


@pytest.fixture(autouse=True)
def random_state():
    """The same for every test, whichever ran before it."""
    torch.manual_seed(2026)
