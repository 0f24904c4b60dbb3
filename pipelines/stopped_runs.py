"""Tell runs that were stopped from those that have ended: `was_stopped(run)` after `run.stop()`."""

from typing import Any

from diffsight.extending import STOPPED, flow_of


def was_stopped(run: Any) -> bool:
    """Return whether a run was stopped before its model had ended."""
    return flow_of(run).outcome == STOPPED
