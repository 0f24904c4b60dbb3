"""Tests of models in this process, run on a server: each model that a test opens is served, and taken from there.

    pytest tests/engine --remote

A test is the same test, with the same expected values: `Model(net)` is the model of a server that holds `net`, over a
WebSocket on the loopback. So are `DiffusionModel(...)` and `LanguageModel(...)`. `made_for_one_process.py` lists the
tests that make no sense with a server, and why.
"""

import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partialmethod
from typing import Any
from unittest.mock import patch

from diffsight import DiffusionModel, LanguageModel, Model
from diffsight.gallery.serve.services import services_of
from diffsight.remote import VERSIONS, ServedModel, put_on_server
from diffsight.remote.connection import Address
from remote.serving import serving


class _Known(ServedModel):
    """A model that this process serves under a number: nothing is asked of the server before the first run."""

    def __init__(self, name: str, address: str, model: Model) -> None:
        self.name, self.address, self.dtype = name, Address(address), None
        self.description = {"name": name, "services": sorted(services_of(model))}
        self.version, self._kept, self._is_busy, self._runs = VERSIONS[-1], None, False, {}


@contextmanager
def served_models() -> Iterator[tuple[str, dict[str, Model]]]:
    """Serve models, and return the address and where to put them."""
    models: dict[str, Model] = {}
    with serving(models, at_once=1000) as address:
        yield address, models


@contextmanager
def swapped(address: str, models: dict[str, Model]) -> Iterator[None]:
    """Let `Model(module)`, `DiffusionModel(...)` and `LanguageModel(...)` in the block be models on the server."""
    numbers = itertools.count()

    def open_there(self: Model, wrap: Callable[..., None], cls: type[Model], *args: Any, **kwargs: Any) -> None:
        wrap(self, *args, **kwargs)
        if type(self) is not cls or kwargs.get("remote"):
            return
        there = object.__new__(cls)
        wrap(there, *args, **kwargs)
        name = f"model-{next(numbers)}"
        models[name] = there
        put_on_server(self, _Known(name, address, there))

    with ExitStack() as stack:
        stack.callback(models.clear)
        for cls in (Model, DiffusionModel, LanguageModel):
            opens = partialmethod(open_there, cls.__init__, cls)
            stack.enter_context(patch.object(cls, "__init__", opens))
        yield
