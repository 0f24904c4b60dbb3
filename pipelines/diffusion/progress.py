"""The progress bar of a pipeline, set otherwise for a while."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def progress_bar(pipeline: Any, **settings: Any) -> Iterator[None]:
    """Within it the bar has these settings, those of tqdm: `with progress_bar(pipeline, disable=True):`."""
    shown = getattr(pipeline, "_progress_bar_config", {})
    pipeline.set_progress_bar_config(**{**shown, **settings})
    try:
        yield
    finally:
        pipeline.set_progress_bar_config(**shown)
