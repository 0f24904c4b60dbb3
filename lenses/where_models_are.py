"""Run a lens where the model is: if the weights are on a server, it runs there and only its result is returned."""

from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from diffsight.errors import InputError
from diffsight.remote import can_be_sent, is_on_server

_P, _R = ParamSpec("_P"), TypeVar("_R")


def where_the_model_is(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Return a lens that runs on the server of its first argument, the model, if the server has a lens of its name.

    A lens that is given a folder to write into, or something that cannot be sent, such as another model or a function,
    runs locally, and reads what it needs from the server."""

    @wraps(function)
    def lens(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        model = args[0] if args else kwargs.get("model")
        if not is_on_server(model) or kwargs.get("folder") is not None or model.edits:
            return function(*args, **kwargs)
        given: dict[str, Any] = {name: value for name, value in kwargs.items() if name not in ("model", "progress")}
        if function.__name__ not in model.server.services or not can_be_sent([args[1:], given]):
            return function(*args, **kwargs)
        return model.server.lens(function.__name__, *args[1:], **given)

    return lens


def check_is_here(
    lens: Callable[..., Any],
    model: Any,
    why: str = "computes gradients with",
    instead: str = "run.backward(loss) in a run",
) -> None:
    """Raise InputError if a lens that needs the modules of a model in this process is given a model on a server."""
    if is_on_server(model):
        raise InputError(
            f"{lens.__name__} {why} a model in this process, but this model is on the server at "
            f"{model.server.address}: use a local model, or {instead}"
        )
