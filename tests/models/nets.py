"""Small modules for the tests of the engine.

    net = Net()
    net(inputs())  # (2, WIDTH)

The weights depend on the seed alone.
"""

import random
from collections.abc import Callable

import numpy as np
import torch
from torch import nn

WIDTH = 4


def inputs(seed: int = 0, rows: int = 2) -> torch.Tensor:
    """Return values, (rows, WIDTH), that depend on the seed alone."""
    return torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(seed))


class Leaf(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return self.lin(x).tanh()


class Branch(nn.Module):
    """A module with two children that run one after the other; the first has a child of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.leaf = Leaf()
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return x + self.out(self.leaf(x))


class Net(nn.Module):
    """A net of `first`, `layers[0]` to `layers[2]` and `last`. `log` lists what has run.

    `generate` is `steps` forward passes, each on the result of the one before.
    """

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.default_generator.manual_seed(seed)
            self.first = nn.Linear(WIDTH, WIDTH)
            self.layers = nn.ModuleList(Branch() for _ in range(3))
            self.last = nn.Linear(WIDTH, WIDTH)
            self.unused = nn.Linear(WIDTH, WIDTH)
        self.log: list[str] = []

    def forward(self, x):
        self.log.append("first")
        x = self.first(x)
        for index, layer in enumerate(self.layers):
            self.log.append(f"layers[{index}]")
            x = layer(x)
        self.log.append("last")
        return self.last(x)

    def generate(self, x, steps: int = 3):
        for _ in range(steps):
            x = self(x)
        return x


class Calling(nn.Module):
    """A module that runs a function as its forward pass. Children are passed by keyword."""

    def __init__(self, function: Callable, **children: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, child in children.items():
            self.add_module(name, child)

    def forward(self, *args, **kwargs):
        return self.function(self, *args, **kwargs)


def linear(seed: int = 0) -> nn.Linear:
    with torch.random.fork_rng():
        torch.default_generator.manual_seed(seed)
        return nn.Linear(WIDTH, WIDTH)


class Direct(nn.Module):
    """Calls the forward pass of its part, past the hooks on it."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return self.inner.forward(x)


class Noisy(nn.Module):
    """Draws random numbers from every generator that it knows."""

    def __init__(self):
        super().__init__()
        self.part, self.own, self.of_numpy = nn.Identity(), torch.Generator(), np.random.default_rng(0)
        self.others, self.named = [np.random.RandomState(0)], {"python": random.Random(0)}

    def forward(self, x):
        x = self.part(x)
        own = torch.rand(1, generator=self.own) + self.of_numpy.random() + self.others[0].rand()
        shared = torch.rand(1) + random.random() + np.random.rand()
        return x + own + shared + self.named["python"].random()
