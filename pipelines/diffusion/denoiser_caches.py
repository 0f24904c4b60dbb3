"""The caches of diffusers, `transformer.enable_cache(...)`, which keep values from step to step within a call."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from diffusers.hooks import HookRegistry
from torch import nn

from diffsight.pipelines.diffusion.components import components


def cached_parts(pipeline: Any) -> dict[str, nn.Module]:
    """Return the components of a pipeline that have a cache, by name."""
    parts = components(pipeline).items()
    return {name: part for name, part in parts if isinstance(part, nn.Module) and any(_with_state(part))}


@contextmanager
def caches_emptied(pipeline: Any) -> Iterator[None]:
    """Empty the caches if the block ends early, with an error or because its run is stopped.

    A pipeline empties them only when its call ends. Otherwise they would change the next call."""
    try:
        yield
    except BaseException:
        for part in cached_parts(pipeline).values():
            for registry in _with_state(part):
                registry.reset_stateful_hooks(recurse=False)
        raise


def _with_state(part: nn.Module) -> Iterator[HookRegistry]:
    """Yield the hooks of diffusers on modules in a component that keep a state."""
    for module in part.modules():
        registry = getattr(module, "_diffusers_hook", None)
        if registry is not None and any(hook._is_stateful for hook in registry.hooks.values()):
            yield registry
