"""The names and routes of the applications on Ray Serve: one for each model, and the front."""

from collections.abc import Mapping
from typing import Any

from diffsight.errors import InputError

FRONT = "front"  # the application that answers all requests except runs


def app_of(name: str) -> str:
    """Return the name of the application of a model."""
    return "model-" + "".join(letter if letter.isalnum() else "-" for letter in name)


def route_of(name: str) -> str:
    """Return the route of the runs of a model."""
    return f"/runs/{name}"


def check_settings(builder: str, args: Mapping[str, Any], known: set[str]) -> None:
    """Raise InputError if a builder of an application was given an unknown argument."""
    unknown = sorted(args.keys() - known)
    if unknown:
        raise InputError(f"{builder} has no argument {unknown[0]!r}; its arguments are {', '.join(sorted(known))}")
