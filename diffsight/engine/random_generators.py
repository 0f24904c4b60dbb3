"""Restore the random generators that a model may use: the global ones, and those of its modules.

generators = generators_of(model.modules())
with kept_generators(generators):
    model(x)                                # draws random numbers
                                            # here all generators are as before
"""

import random
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from diffsight.engine.torch_state import kept_random_state, random_state


def generators_of(modules: Iterable[nn.Module]) -> list[Any]:
    """Return the global generators of Python and NumPy, and those that modules hold as attributes or directly in lists
    and dictionaries."""
    numpy = sys.modules.get("numpy.random")
    of_numpy = [numpy] if numpy else []
    kinds = (torch.Generator, random.Random, *((numpy.Generator, numpy.RandomState) if numpy else ()))
    found = {id(value): value for module in modules for value in _held_by(module) if isinstance(value, kinds)}
    return [random, *of_numpy, *(one for one in found.values() if not isinstance(one, random.SystemRandom))]


def states_of(generators: Iterable[Any]) -> list[Any]:
    """Return the states of some generators, and of PyTorch's global ones, for comparing them."""
    states = [*random_state(), *map(_state_of, generators)]
    return tree_map(lambda value: value.tolist() if hasattr(value, "tolist") else value, states)  # arrays and tensors


def _held_by(module: nn.Module) -> Iterator[Any]:
    for value in vars(module).values():
        if type(value) is dict:
            yield from value.values()
        elif type(value) in (list, tuple):
            yield from value
        else:
            yield value


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
