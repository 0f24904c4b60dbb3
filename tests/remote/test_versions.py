"""Clients and servers of different versions agree on a version of the protocol, or say that there is none."""

import pytest
import torch

from diffsight import LanguageModel
from diffsight.gallery.serve import descriptions
from diffsight.remote import ProtocolError, protocol
from remote.serving import serving

IDS = torch.tensor([[5, 17, 42, 8]])
BOTH_SIDES = "install the same version of diffsight on both sides"


def opened(language, monkeypatch, server, client):
    """Return the version on which a server and a client with these versions agree, after a run."""
    monkeypatch.setattr(descriptions, "VERSIONS", server)
    with serving({"gpt2": language}) as address:
        monkeypatch.setattr(protocol, "VERSIONS", client)
        model = LanguageModel("gpt2", remote=address)
        with torch.no_grad():
            assert torch.equal(model.trace(IDS).result.logits, language.trace(IDS).result.logits)
        return model.server.version


@pytest.mark.parametrize(("server", "client"), [((1, 2), (1,)), ((1,), (0, 1, 2)), ((0, 1), (1, 2))])
def test_the_best_version_that_both_know(server, client, language, monkeypatch):
    assert opened(language, monkeypatch, server, client) == 1


@pytest.mark.parametrize(
    ("server", "client", "text"),
    [
        ((2, 3), (1,), "the server speaks version 2 and 3 of the protocol, and this client 1"),
        ((1,), (2, 3), "the server speaks version 1 of the protocol, and this client 2 and 3"),
    ],
    ids=["newer server", "newer client"],
)
def test_no_common_version(server, client, text, language, monkeypatch):
    with pytest.raises(ProtocolError, match=f"{text}: {BOTH_SIDES}"):
        opened(language, monkeypatch, server, client)


def test_a_server_that_was_exchanged_while_the_model_was_open(remote_language):
    """The run is refused at the user's line, and later runs are served."""
    remote_language.server.version = 99
    try:
        with pytest.raises(ProtocolError, match=f"the server speaks version 1 of the protocol, not 99: {BOTH_SIDES}"):
            remote_language.trace(IDS).finish()
    finally:
        remote_language.server.version = 1
    assert remote_language.trace(IDS).result.logits.shape == (1, 4, 61)
