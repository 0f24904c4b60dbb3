"""nnsight's functions that plain Python replaces in a live run: `apply`, `log`, `trace`, `local`."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from diffsight.compat.conditions import Cond

log = print


def apply(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call `function`."""
    return function(*args, **kwargs)


def trace(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function: any function can be called in a run."""
    return function


def local() -> nullcontext:
    """Open a block that runs in this process, as everything does."""
    return nullcontext()


class TracerFunctions:
    """The same functions as methods, for tracers and sessions."""

    def cond(self, condition: Any) -> Cond:
        """Run a block only if a condition holds: `with tracer.cond(x > 0):`."""
        return Cond(condition)

    def log(self, *values: Any) -> None:
        """Print values."""
        print(*values)

    def apply(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call `function`."""
        return function(*args, **kwargs)
