"""Settings of the test suite, and the models that several folders use."""

import gc
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # also in processes that tests start: more would only wait for each other

import matplotlib
import pytest
import torch

matplotlib.use("Agg")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # no warnings about random weights and missing packages
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test needs the hub, and waiting for it takes 20 s each time
torch.set_num_threads(1)  # the models are small
gc.disable()  # while the tests are collected, which leaves little garbage
gc.set_threshold(700, 10, 100)  # full collections are rare, as there is a lot to look through


@pytest.fixture(autouse=True, scope="module")
def short_garbage_collections():
    """Leave out of garbage collections what earlier files have loaded. Otherwise they take a seventh of the time."""
    gc.collect()
    gc.freeze()
    gc.enable()


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


# ---- tests of the engine with their models on a server, see tests/remote/swapped.py

ALSO_REMOTE = {"test_assignments.py", "test_rows.py", "test_steps.py", "test_values.py"}  # in every run of the suite


def pytest_addoption(parser):
    parser.addoption("--remote", action="store_true", help="run tests of the engine with their models on a server")


def pytest_generate_tests(metafunc):
    path = metafunc.definition.path
    if path.parent.name == "engine" and path.name in ALSO_REMOTE and not metafunc.config.getoption("--remote"):
        metafunc.parametrize("models_on_a_server", ["here", "remote"], indirect=True)


def pytest_collection_modifyitems(config, items):
    from remote.made_for_one_process import why_local

    is_for_all, kept = config.getoption("--remote"), []
    for item in items:
        text = item.name.replace("[remote-", "[").replace("-remote]", "]").replace("[remote]", "")
        why = why_local(f"{item.path.name}::{text}") if is_for_all or text != item.name else None
        if why is not None and is_for_all:
            item.add_marker(pytest.mark.skip(reason=why))
        if why is None or is_for_all:
            kept.append(item)
    items[:] = kept


@pytest.fixture(scope="session")
def model_server():
    """Return the address of a server, and the dictionary of the models that it has."""
    pytest.importorskip("websockets", reason="remote runs need the package websockets")
    from remote.swapped import served_models

    with served_models() as served:
        yield served


@pytest.fixture(autouse=True)
def models_on_a_server(request):
    """Let the models that a test opens be on a server, if they are to."""
    if not (request.config.getoption("--remote") or getattr(request, "param", "here") == "remote"):
        yield
        return
    from remote.swapped import swapped

    with swapped(*request.getfixturevalue("model_server")):
        yield
