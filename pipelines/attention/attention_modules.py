"""Recognize attention modules, count their heads, and find out which backend they use."""

import re
from collections.abc import Iterator
from typing import Any

from torch import nn

_SEEN = re.compile(r"eager|sdpa|native(?!_(npu|xla|flex))", re.IGNORECASE)  # backends whose products can be seen
_ATTENTION = re.compile(r"attention|attn", re.IGNORECASE)


def is_attention(module: Any) -> bool:
    """Return whether a module is an attention module by its class name, and contains no other."""
    return (
        isinstance(module, nn.Module)
        and is_named_attention(module)
        and not any(map(is_named_attention, _inside(module)))
    )


def can_attend(module: Any) -> bool:
    """Return whether a module may make a product itself. PyTorch's own layers do not, except `MultiheadAttention`."""
    if not isinstance(module, nn.Module) or type(module).forward is nn.Module.forward:
        return False
    return not type(module).__module__.startswith("torch.nn.") or isinstance(module, nn.MultiheadAttention)


def attentions_in(module: nn.Module) -> dict[str, nn.Module]:
    """Return the attention modules in a module, by path."""
    return {path: part for path, part in module.named_modules() if path and is_attention(part)}


def count_heads(attention: nn.Module) -> int | None:
    """Return the number of heads of an attention module, or None if it is unknown."""
    for holder in (attention, getattr(attention, "config", None)):
        for name in ("num_heads", "num_attention_heads", "n_heads", "n_head", "num_attn_heads", "heads"):
            count = getattr(holder, name, None)
            if isinstance(count, int) and count > 0:
                return count
    return None


def why_hidden(attention: nn.Module) -> str | None:
    """Return why the products of an attention module cannot be seen, and how to change that; None if they can."""
    backend, advice = _backend_of(attention)
    if _SEEN.search(backend):
        return None
    return (
        f"{type(attention).__name__} computes its attention with {backend!r}, a kernel that shows none of its values. "
        f"{advice}"
    )


def _backend_of(attention: nn.Module) -> tuple[str, str]:
    """Return the name of the backend of an attention module, and how to switch to another."""
    config = getattr(attention, "config", None)
    used = getattr(config, "_attn_implementation", None)
    if isinstance(used, str):
        return used, 'Load the model with attn_implementation="sdpa", or call model.set_attn_implementation("sdpa")'
    processor = getattr(attention, "processor", None)
    if "XFormers" in type(processor).__name__:
        return "xformers", "Call pipeline.disable_xformers_memory_efficient_attention()"
    used = getattr(processor, "_attention_backend", None)
    if used is None and hasattr(processor, "_attention_backend"):  # it uses the active backend of diffusers
        from diffusers.models.attention_dispatch import _AttentionBackendRegistry

        used = _AttentionBackendRegistry.get_active_backend()[0]
    return str(getattr(used, "value", used) or "native"), 'Call set_attention_backend("native") on the component'


def is_named_attention(module: nn.Module) -> bool:
    """Return whether a module is an attention module by its class name."""
    name = type(module).__name__
    return bool(_ATTENTION.search(name)) and "Processor" not in name


def _inside(module: nn.Module) -> Iterator[nn.Module]:
    modules = iter(module.modules())
    next(modules)
    return modules
