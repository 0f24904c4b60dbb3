"""Restore the random generators that a model may use: the global ones, and those that its modules and its code hold.

generators = generators_of(model.modules())
with kept_generators(generators), GivenGenerators():
    model(x)                                # draws random numbers
                                            # here all generators are as before
"""

import random
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from diffsight.engine.function_code import values_used
from diffsight.engine.torch_state import kept_random_state, random_state


def generators_of(modules: Iterable[nn.Module]) -> list[Any]:
    """Return the random generators that modules may use, apart from PyTorch's global ones.

    These are the global ones of Python and NumPy; those that the modules hold as attributes, or in lists, dictionaries
    and objects there; and those in variables that their methods use, or the functions that they hold."""
    numpy = sys.modules.get("numpy.random")
    of_numpy = [numpy] if numpy else []
    kinds = (torch.Generator, random.Random, *((numpy.Generator, numpy.RandomState) if numpy else ()))
    modules = [*modules]
    bases = {cls for kind in {*map(type, modules)} for cls in kind.__mro__} - {nn.Module, object}
    held = [*chain.from_iterable(map(held_by, modules)), *chain.from_iterable(vars(cls).values() for cls in bases)]
    used = values_used(held)
    found = {id(value): value for value in (*held, *used) if isinstance(value, kinds)}
    return [random, *of_numpy, *(one for one in found.values() if not isinstance(one, random.SystemRandom))]


def states_of(generators: Iterable[Any]) -> list[Any]:
    """Return the states of some generators, and of PyTorch's global ones, for comparing them."""
    return _comparable([*random_state(), *map(_state_of, generators)])


def states_of_other_libraries(generators: Iterable[Any]) -> list[Any]:
    """Return the states of those generators that are not of PyTorch, for comparing them."""
    return _comparable([_state_of(one) for one in generators if not isinstance(one, torch.Generator)])


def _comparable(states: list[Any]) -> list[Any]:
    return tree_map(lambda value: value.tolist() if hasattr(value, "tolist") else value, states)  # arrays and tensors


def held_by(module: nn.Module) -> Iterator[Any]:
    """Yield what a module holds as attributes, and what these refer to directly, see `generators_of`."""
    for value in vars(module).values():
        if type(value) is dict:
            yield from value.values()
        elif type(value) in (list, tuple):
            yield from value
        else:
            yield value
            if not isinstance(value, nn.Module):
                yield from getattr(value, "__dict__", {}).values()


class GivenGenerators(TorchFunctionMode):
    """At the end of the block, restores the generators that were passed to functions of PyTorch within it.

    `restorers` holds a function for each of them, by id."""

    def __init__(self) -> None:
        super().__init__()
        self.restorers: dict[int, Callable[[], Any]] = {}

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        given = (kwargs or {}).get("generator")
        if given is not None and id(given) not in self.restorers:
            self.restorers[id(given)] = _restorer(given)
        return function(*args, **(kwargs or {}))

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for restore in self.restorers.values():
            restore()


@contextmanager
def kept_generators(generators: Iterable[Any]) -> Iterator[None]:
    """Restore some generators, and PyTorch's global ones, at the end of the block."""
    with kept_random_state():
        restored = [_restorer(generator) for generator in generators]
        try:
            yield
        finally:
            for restore in restored:
                restore()


def _restorer(generator: Any) -> Callable[[], Any]:
    """Return a function that gives a generator the state that it has now."""
    state = _state_of(generator)
    if hasattr(generator, "setstate"):
        return partial(generator.setstate, state)
    if hasattr(generator, "set_state"):
        return partial(generator.set_state, state)
    return partial(setattr, generator.bit_generator, "state", state)


def _state_of(generator: Any) -> Any:
    if hasattr(generator, "getstate"):  # one of Python
        return generator.getstate()
    if hasattr(generator, "get_state"):  # one of PyTorch, or an old one of NumPy
        return generator.get_state()
    return generator.bit_generator.state
