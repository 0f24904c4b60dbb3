"""`nnsight.list()`, `nnsight.int(0)`, `nnsight.str("a")`: Python's types, with the methods of nnsight's proxies.

total = nnsight.int(0)
total.update(total + 1)
tokens = nnsight.list()
tokens.append(token).save()
"""

import builtins
from collections.abc import Callable
from typing import Any

_METHODS = (
    *("add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "rtruediv", "floordiv", "rfloordiv", "mod", "rmod"),
    *("pow", "rpow", "neg", "abs", "eq", "ne", "lt", "le", "gt", "ge", "hash", "bool", "int", "float", "complex"),
    *("index", "str", "format", "len", "iter", "contains", "getitem", "round", "bytes"),
)


class List(builtins.list):
    """A list whose `append` returns the list, so that `.save()` can follow."""

    def append(self, value: Any) -> "List":
        super().append(value)
        return self


class Literal:
    """A value of an immutable Python type that `update` can replace. Otherwise it behaves like the value."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def update(self, value: Any) -> None:
        """Replace the value."""
        self.value = value.value if isinstance(value, Literal) else value

    def save(self) -> "Literal":
        """Return the literal itself: a name bound in a run stays bound after it."""
        return self

    def __getattr__(self, name: str) -> Any:
        return getattr(self.value, name)

    def __repr__(self) -> str:
        return repr(self.value)


def _delegating(name: str) -> Callable:
    def method(own: Literal, *args: Any) -> Any:
        given = [argument.value if isinstance(argument, Literal) else argument for argument in args]
        return getattr(own.value, name)(*given)

    return method


for _name in _METHODS:
    setattr(Literal, f"__{_name}__", _delegating(f"__{_name}__"))


def literal_of(cls: type) -> Callable[..., Literal]:
    """Return a function that creates a `Literal` from the arguments of a type."""

    def make(*args: Any, **kwargs: Any) -> Literal:
        return Literal(cls(*args, **kwargs))

    return make
