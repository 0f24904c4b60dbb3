"""Settings of the test suite, and the models that several folders use."""

import os

import matplotlib
import pytest
import torch

matplotlib.use("Agg")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # no warnings about random weights and missing packages
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test needs the hub, and waiting for it takes 20 s each time
torch.set_num_threads(1)  # the models are small: more threads would only wait for each other


@pytest.fixture(autouse=True)
def random_state():
    """Seed the global random state, so that no test depends on those that ran before it.

    `torch.manual_seed` would also note, with a traceback, that no GPU has been seeded, which takes 3 ms."""
    torch.default_generator.manual_seed(2026)


@pytest.fixture(scope="session")
def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        n_layer=3, n_head=2, n_embd=16, n_positions=64, vocab_size=61, bos_token_id=0, eos_token_id=0, pad_token_id=0
    )
    with torch.random.fork_rng():
        torch.default_generator.manual_seed(0)
        model = GPT2LMHeadModel(config).eval()
        for p in model.parameters():  # larger than usual, so that tokens and edits make a difference
            torch.nn.init.normal_(p, std=0.3)
    with torch.no_grad():  # transformers adds its own hooks in the first call that asks for hidden states
        model(torch.tensor([[1]]), output_hidden_states=True, output_attentions=True)
    return model


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.tensor([[5, 17, 42]])


@pytest.fixture
def no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture
def sd():
    """Return a small Stable Diffusion pipeline."""
    from models import diffusion

    return diffusion.stable_diffusion()


@pytest.fixture(scope="session")
def saved_pipeline(tmp_path_factory):
    """Return a folder with a small Stable Diffusion pipeline, whose text encoder has three layers."""
    from models import diffusion

    folder = tmp_path_factory.mktemp("saved") / "pipe"
    diffusion.stable_diffusion().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def saved_models(tmp_path_factory):
    """Return a folder with the small models that `lens_results` uses."""
    from models import lens_results

    folder = tmp_path_factory.mktemp("models")
    lens_results.save_models(folder)
    return folder


def pytest_addoption(parser):
    parser.addoption("--remote", action="store_true", help="run the tests with their models on a server")


@pytest.fixture(autouse=True)
def remote_models(request):
    if request.config.getoption("--remote"):
        from remote.swapped import models_on_a_server

        with models_on_a_server():
            yield
    else:
        yield
