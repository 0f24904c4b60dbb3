"""The attention processors that a pipeline sets for the duration of its call, as perturbed-attention guidance does."""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from diffsight.pipelines.diffusion.call_arguments import call_defaults
from diffsight.pipelines.diffusion.denoising_clock import denoisers


def parts_with_own_processors(pipeline: Any, arguments: Mapping[str, Any]) -> dict[str, nn.Module]:
    """Return the denoisers whose processors a call with these arguments sets, by name."""
    is_guided = (call_defaults(pipeline) | arguments).get("pag_scale") != 0
    parts = denoisers(pipeline) if is_guided and _sets_processors(pipeline) else {}
    return {name: part for name, part in parts.items() if hasattr(part, "attn_processors")}


@contextmanager
def processors_restored(pipeline: Any) -> Iterator[None]:
    """Restore the attention processors if the block ends early, with an error or because its run is stopped.

    A pipeline that sets processors restores them only when its call ends. The processors of other pipelines are left
    alone, because only the user changes them."""
    is_setting = _sets_processors(pipeline)
    parts = [part for part in pipeline.components.values() if is_setting and hasattr(part, "attn_processors")]
    before = [(part, part.attn_processors) for part in parts]
    try:
        yield
    except BaseException:
        for part, processors in before:
            if part.attn_processors != processors:
                part.set_attn_processor(dict(processors))
        raise


def _sets_processors(pipeline: Any) -> bool:
    code = getattr(inspect.unwrap(type(pipeline).__call__), "__code__", None)
    return code is not None and "set_attn_processor" in code.co_names
