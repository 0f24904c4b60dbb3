"""Tests of models in this process, run on a server: each model that a test opens is served, and taken from there.

    pytest tests/engine --remote

A test is the same test, with the same expected values. `Model(net)` is the model of a server that holds `net`, over a
WebSocket on the loopback. `made_for_one_process.py` lists the tests that make no sense with a server, and why.
"""

import itertools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

from diffsight import Model
from diffsight.remote import ServedModel, put_on_server
from diffsight.remote.connection import Address
from remote.serving import serving

_PATIENCE = 1.0  # seconds that a run waits for a replica: with two of one model at once there is none


class _Known(ServedModel):
    """A model that this process serves under a number: nothing is asked of the server before the first run."""

    def __init__(self, name: str, address: str) -> None:
        self.name, self.address, self.dtype = name, Address(address), None
        self.description = {"name": name, "services": []}
        self._kept, self._is_busy = None, False


@contextmanager
def models_on_a_server() -> Iterator[None]:
    """Let `Model(module)` in the block be a model on a server."""
    models, numbers, wrap = {}, itertools.count(), Model.__init__

    def open_there(self, *args, **kwargs):
        wrap(self, *args, **kwargs)
        if type(self) is not Model:
            return
        there = object.__new__(Model)
        wrap(there, *args, **kwargs)
        name = f"model-{next(numbers)}"
        models[name] = there
        put_on_server(self, _Known(name, address))

    with ExitStack() as stack:
        address = stack.enter_context(serving(models, patience=_PATIENCE))
        stack.enter_context(patch.object(Model, "__init__", open_there))
        yield
