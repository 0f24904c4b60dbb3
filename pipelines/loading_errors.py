"""Errors of the libraries that load a model, in the user's terms: what cannot be loaded, and why."""

from collections.abc import Iterator
from contextlib import contextmanager

from diffsight.errors import DiffsightError, InputError
from diffsight.pipelines.hub_access import hub_access
from diffsight.pipelines.weights import MissingWeightsError


@contextmanager
def explained(failed: str, unknown: str | None = None) -> Iterator[None]:
    """Turn the errors of a block that loads a model into InputErrors.

    Args:
        failed: What the block could not do, such as "the folder x cannot be loaded as a pipeline".
        unknown: For a model on the hub: the sentence to begin with if there is no such model, or no network.
    """
    try:
        yield
    except DiffsightError:
        raise
    except MissingWeightsError as error:
        raise InputError(f"{failed}: {error}. If that is intended, pass a live model instead") from error
    except Exception as error:  # a damaged file or configuration can fail anywhere in the libraries
        if isinstance(error, OSError) and unknown is not None:  # huggingface_hub finds no repository, or no network
            raise InputError(f"{unknown}. {hub_says(first_line(error))}") from error
        raise InputError(f"{failed}: {reason_of(error)}") from error


def hub_says(reason: str) -> str:
    """Return a sentence that says why the hub has no such model; `reason` is the library's message."""
    if hub_access():
        return "The hub cannot be reached, and the model is not in the cache"
    return f"The hub: {reason.split('. ')[0]}"


def reason_of(error: Exception) -> str:
    """Return the type and the first line of an error, and how to run a repository's own code if it is about that."""
    reason = f"{type(error).__name__}: {first_line(error)}"
    if "trust_remote_code" in str(error) and "trust_remote_code" not in reason:
        reason = f"{reason.rstrip(' .')}. If you trust that code, pass trust_remote_code=True"
    return reason


def first_line(error: Exception) -> str:
    """Return the first line of an error's message."""
    return next(iter(str(error).strip().splitlines()), "")
