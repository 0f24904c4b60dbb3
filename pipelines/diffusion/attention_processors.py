"""The attention processors that a pipeline sets for the duration of its call, as perturbed-attention guidance does."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def processors_restored(pipeline: Any) -> Iterator[None]:
    """Restore the attention processors if the block ends early, with an error or because its run is stopped.

    A pipeline that sets processors restores them only when its call ends. The processors of other pipelines are left
    alone, because only the user changes them."""
    code = getattr(inspect.unwrap(type(pipeline).__call__), "__code__", None)
    is_setting = code is not None and "set_attn_processor" in code.co_names
    parts = [part for part in pipeline.components.values() if is_setting and hasattr(part, "attn_processors")]
    before = [(part, part.attn_processors) for part in parts]
    try:
        yield
    except BaseException:
        for part, processors in before:
            if part.attn_processors != processors:
                part.set_attn_processor(dict(processors))
        raise
