"""What has no effect, and what raises an error that says what to write instead."""

import pytest
import torch

import diffsight.compat as nnsight
from diffsight.compat import CONFIG
from diffsight.errors import DiffsightError, InputError, NeverReachedError, PointNotFoundError


@pytest.mark.parametrize("opens", [lambda model: model.edit(inpace=True), lambda model: model.session(iter=1)])
def test_unknown_arguments(tiny_model, opens):
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        opens(tiny_model)


def test_settings(tiny_model, net, input):
    """Guide to 0.4: Improved Error Messaging, Turning off syntactic changes; remote_execution.ipynb: the key."""
    CONFIG.set_default_api_key("YOUR_API_KEY")
    nnsight.CONFIG.APP.REMOTE_LOGGING = False
    nnsight.CONFIG.APP.CONTROL_FLOW_HANDLING = False
    nnsight.CONFIG.APP.DEBUG = False
    nnsight.CONFIG.save()
    assert CONFIG.API.APIKEY == "YOUR_API_KEY" and CONFIG.APP.CONTROL_FLOW_HANDLING is False
    with tiny_model.trace(input, remote=False), nnsight.local():
        output = tiny_model.output
    assert torch.equal(output, net(input)) and nnsight.trace(len) is len


def test_remote(tiny_model, input):
    for opened in (
        lambda: tiny_model.trace(input, remote=True),
        lambda: tiny_model.generate(input, remote=True),
        lambda: tiny_model.session(remote=True),
        lambda: tiny_model.edit(remote=True),
    ):
        with pytest.raises(InputError, match="in this process"):
            opened()


@pytest.mark.parametrize("method", ["trace", "scan", "edit", "session"])
def test_backends(tiny_model, input, method):
    given = (input,) if method in ("trace", "scan") else ()
    with pytest.raises(InputError, match="backend= is not supported"):
        getattr(tiny_model, method)(*given, backend="x")


@pytest.mark.parametrize("name", ["NNsight", "LanguageModel", "TransformersModel", "DiffusionModel"])
def test_classes_of_envoys(name):
    with pytest.raises(InputError, match="envoys= is not supported"):
        getattr(nnsight, name)("openai-community/gpt2", envoys={})


def test_unsupported_names(llm, ids):
    with pytest.raises(DiffsightError, match="methods="):
        llm.transformer.h[0].source
    with pytest.raises(PointNotFoundError, match="has 3 children"), llm.trace(ids):
        llm.transformer.h[100].output
    with pytest.raises(NeverReachedError), llm.trace(ids):
        llm.transformer.h[0].output.calls = llm.transformer.h[0].calls[5].output
