"""What several files of these tests share."""

import pytest
import torch

from models import diffusion


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """A folder in the diffusers format: `diffusion.stable_diffusion()`."""
    folder = tmp_path_factory.mktemp("saved") / "pipe"
    diffusion.stable_diffusion().save_pretrained(folder)
    return folder


@pytest.fixture
def no_gradients():
    with torch.no_grad():
        yield
