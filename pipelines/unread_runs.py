"""Warn if a run with a callback or a streamer is dropped before anything ran, because it is then never called.

warn_if_unread(run, {"streamer": streamer})
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

from diffsight.errors import warn_user
from diffsight.extending import Run, call_if_unread

_CALLED = (  # the arguments that a model calls while it runs
    "streamer",
    "callback",
    "callback_on_step_end",
    "stopping_criteria",
    "logits_processor",
    "prefix_allowed_tokens_fn",
)


def warn_if_unread(run: Run, arguments: Mapping[str, Any]) -> None:
    """Warn if the run is dropped before anything ran, if one of its arguments is to be called while it runs."""
    given = {**arguments, **(arguments.get("generate_kwargs") or {})}
    name = next((name for name in _CALLED if given.get(name) is not None), None)
    if name is not None:
        call_if_unread(run, partial(_warn, name, given.get("streamer")))


def _warn(name: str, streamer: Any) -> None:
    warn_user(
        f"a run with a {name} was dropped before anything ran, because nothing asked for a value: call "
        f"model.generate(..., {name}={name}).finish()",
        RuntimeWarning,
    )
    if hasattr(streamer, "end"):
        streamer.end()  # otherwise whoever reads it waits forever
