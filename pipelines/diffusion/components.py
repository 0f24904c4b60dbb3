"""The components of a diffusers pipeline: which ones there are, and which of their calls a run can follow.

components(pipeline)                        # {"text_encoder": CLIPTextModel, "unet": …, "scheduler": …}
traceable_methods(pipeline, pipeline.vae)   # {"encode": "vae.encode", "decode": "vae.decode"}
component_names(pipeline.text_encoder)      # {"layers": "encoder.layers", "ln_final": "final_layer_norm"}
text_encoder_names(pipeline)                # ["text_encoder"]
"""

from collections.abc import Mapping
from types import FunctionType
from typing import Any

from diffusers import DiffusionPipeline, SchedulerMixin
from torch import nn
from transformers import PreTrainedModel

from diffsight.extending import join, unwrapped
from diffsight.pipelines.standard_names import standard_names, word_embeddings

_PLAIN = (bool, int, float, str, list, tuple, dict)


def components(pipeline: DiffusionPipeline) -> dict[str, Any]:
    """Return the components of a pipeline by name, without those that are unset or plain values."""
    held = vars(pipeline)
    found = ((name, held.get(name)) for name in pipeline.config if not name.startswith("_"))
    return {name: part for name, part in found if part is not None and not isinstance(part, _PLAIN)}


def traceable_methods(pipeline: DiffusionPipeline, owner: Any) -> Mapping[str, str]:
    """Return the methods of the pipeline or of a component that pipelines call directly, name to path.

    These are `encode_prompt` of the pipeline, `encode` and `decode` of a VAE, and `step` of a scheduler."""
    if owner is pipeline:
        return {name: name for name in ("encode_prompt",) if _has_method(owner, name)}
    for path, component in components(pipeline).items():
        component = unwrapped(component)
        if component is owner:
            return {name: join(path, name) for name in _direct_methods(component) if _has_method(component, name)}
    return {}


def component_names(component: Any) -> dict[str, str]:
    """Return the standard names of a component, name to real path. Only models of transformers have any."""
    return standard_names(component) if isinstance(unwrapped(component), PreTrainedModel) else {}


def text_encoder_names(pipeline: DiffusionPipeline) -> list[str]:
    """Return the names of the components that may encode text: those with layers and a word embedding."""
    modules = {name: part for name, part in components(pipeline).items() if isinstance(part, nn.Module)}
    return [name for name, m in modules.items() if "layers" in component_names(m) and word_embeddings(m)]


def _direct_methods(component: Any) -> tuple[str, ...]:
    if isinstance(component, nn.Module):
        return "encode", "decode"
    return ("step",) if isinstance(component, SchedulerMixin) else ()


def _has_method(component: Any, name: str) -> bool:
    defined = (vars(cls)[name] for cls in type(component).__mro__ if name in vars(cls))
    return isinstance(next(defined, None), FunctionType)
