"""The strength of LoRA adapters in a single call, `cross_attention_kwargs={"scale": 0.5}`.

diffusers multiplies the scales of the adapters before it encodes the prompt and before each call of the denoiser, and
divides them afterwards.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from diffsight.pipelines.diffusion.components import components


def scaled_parts(pipeline: Any, arguments: Mapping[str, Any]) -> dict[str, nn.Module]:
    """Return the components whose adapters a call with these arguments scales, by name."""
    if _scale(arguments) == 1:
        return {}
    parts = components(pipeline).items()
    return {name: part for name, part in parts if isinstance(part, nn.Module) and any(_scales(part))}


@contextmanager
def lora_scales_restored(pipeline: Any, arguments: Mapping[str, Any]) -> Iterator[None]:
    """Restore the scales of the adapters if the block ends early, with an error or because its run is stopped.

    Scales that the user has set in the meantime are left alone."""
    parts, scale = scaled_parts(pipeline, arguments).values(), _scale(arguments)
    before = [(scales, dict(scales)) for part in parts for scales in _scales(part)]
    try:
        yield
    except BaseException:
        for scales, own in before:
            scales.update({name: value for name, value in own.items() if scales.get(name) == value * scale})
        raise


def _scale(arguments: Mapping[str, Any]) -> float:
    given = [value for name, value in arguments.items() if name.endswith("attention_kwargs")]
    scales = (value.get("scale") for value in given if isinstance(value, Mapping))
    return next((scale for scale in scales if scale is not None), 1.0)


def _scales(part: nn.Module) -> Iterator[dict[str, float]]:
    """Yield the scales of the adapters of each layer of PEFT in a component."""
    return (module.scaling for module in part.modules() if hasattr(module, "scale_layer"))
