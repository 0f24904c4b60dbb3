"""Small nets for the tests of the engine, and what plain PyTorch says about them.

`record` and `replaced` are the hand-written hooks that expected values come from; `footprint` is all that a run could
leave behind on a module.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

WIDTH = 4


def inputs(seed: int = 0, rows: int = 2) -> torch.Tensor:
    """Values (rows, WIDTH), the same for the same seed."""
    return torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(seed))


class Leaf(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return self.lin(x).tanh()


class Branch(nn.Module):
    """Two children, one after the other; the first has a child of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.leaf = Leaf()
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return x + self.out(self.leaf(x))


class Net(nn.Module):
    """first, layers[0..2], last; `log` says what ran. `generate` is `steps` forward passes, each on the last one's
    result."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
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
    """Runs a function in the place of a forward pass; its children are given by keyword."""

    def __init__(self, function: Callable, **children: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, child in children.items():
            self.add_module(name, child)

    def forward(self, *args, **kwargs):
        return self.function(self, *args, **kwargs)


def linear(seed: int = 0) -> nn.Linear:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Linear(WIDTH, WIDTH)


@contextmanager
def record(module: nn.Module) -> Iterator[list[tuple[tuple, dict, Any]]]:
    """(args, kwargs, output) of every call of `module`, from an ordinary hook."""
    calls: list[tuple[tuple, dict, Any]] = []
    handle = module.register_forward_hook(
        lambda _, args, kwargs, out: calls.append((args, kwargs, out)), with_kwargs=True
    )
    try:
        yield calls
    finally:
        handle.remove()


def outputs(module: nn.Module, call: Callable, *args: Any, **kwargs: Any) -> list[Any]:
    """What `module` returned in each of its calls during `call(*args, **kwargs)`."""
    with record(module) as calls:
        call(*args, **kwargs)
    return [out for _, _, out in calls]


@contextmanager
def replaced(module: nn.Module, edit: Callable[[Any], Any], only: int | None = None) -> Iterator[None]:
    """Gives `edit(output)` for the output of `module`, in call number `only` or in all, from an ordinary hook."""
    count = -1

    def hook(_, args, out):
        nonlocal count
        count += 1
        return edit(out) if only in (None, count) else None

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def with_input(module: nn.Module, value: Any, call: Callable[[], Any]) -> Any:
    """`call()`, with `value` as the first argument of every call of `module`, from an ordinary hook."""
    handle = module.register_forward_pre_hook(lambda _, args: (value, *args[1:]))
    try:
        return call()
    finally:
        handle.remove()


def footprint(net: nn.Module) -> dict[str, tuple]:
    """What a run could leave behind: classes, hooks, overridden forward passes, attributes of every module."""
    return {
        name: (
            type(module),
            list(module._forward_hooks.values()),
            list(module._forward_pre_hooks.values()),
            module.__dict__.get("forward"),
            set(module.__dict__),
        )
        for name, module in net.named_modules()
    }
