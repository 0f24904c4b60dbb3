"""Classes of modules whose outputs a run cannot see, because their calls do not go through `forward` alone."""

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable

from torch import nn

_OF_PYTORCH = ("__call__", "_call_impl", "_wrapped_call_impl")  # they call `forward` and the hooks around it


@functools.cache
def why_unseen(kind: type[nn.Module]) -> str | None:
    """Return the reason why outputs of the modules of a class cannot be seen, in words; None if they can."""
    if inspect.isdatadescriptor(inspect.getattr_static(kind, "forward", None)):
        return f"the `forward` of {kind.__name__} is a property, which diffsight cannot see"
    if kind.__call__ is nn.Module.__call__ or _is_passed_through(kind.__call__):
        return None
    return f"{kind.__name__} has a `__call__` of its own, and diffsight cannot see what that returns"


def _is_passed_through(call: Callable) -> bool:
    """Whether a `__call__` is certain to return the result of PyTorch's own `__call__`."""
    if call.__module__.split(".")[0] == "torch":
        return True
    try:
        (code,) = ast.parse(textwrap.dedent(inspect.getsource(call))).body
    except (OSError, SyntaxError, TypeError, ValueError):  # the source is not available
        return False
    returned = [node.value for node in ast.walk(code) if isinstance(node, ast.Return)]
    functions = [value.func if isinstance(value, ast.Call) else None for value in returned]
    return bool(functions) and all(
        isinstance(function, ast.Attribute) and function.attr in _OF_PYTORCH for function in functions
    )
