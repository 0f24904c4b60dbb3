"""Served models that the tests of this folder share: each by itself, and as a client has it."""

import pytest

from diffsight import DiffusionModel, LanguageModel
from remote.serving import serving

PIPELINES = ("diffsight/shapes-clip", "diffsight/shapes-t5", "diffsight/shapes-flux")


@pytest.fixture(scope="session")
def pipelines():
    """Return the packaged pipelines by name."""
    models = {name: DiffusionModel(name) for name in PIPELINES}
    for model in models.values():
        model.set_progress_bar_config(disable=True)
    return models


@pytest.fixture(scope="session")
def language(gpt2):
    return LanguageModel(gpt2)


@pytest.fixture(scope="session")
def address(pipelines, language):
    """Return the address of a server of all these models."""
    pytest.importorskip("websockets", reason="remote runs need the package websockets")
    with serving({**pipelines, "gpt2": language}) as address:
        yield address


@pytest.fixture(scope="session")
def remote_language(address):
    return LanguageModel("gpt2", remote=address)


@pytest.fixture(scope="session")
def remote_pipelines(address):
    return {name: DiffusionModel(name, remote=address) for name in PIPELINES}
