"""Find the components of a diffusers pipeline, and the methods whose calls a run can follow.

components(pipeline)                        # {"text_encoder": CLIPTextModel, "unet": …, "scheduler": …}
traceable_methods(pipeline, pipeline.vae)   # {"encode": "vae.encode", "decode": "vae.decode"}
component_names(pipeline.text_encoder)      # {"layers": "encoder.layers", "ln_final": "final_layer_norm"}
text_encoder_names(pipeline)                # ["text_encoder"]
"""

from collections.abc import Mapping
from types import FunctionType
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModularPipeline, ModularPipelineBlocks, SchedulerMixin
from diffusers.guiders import BaseGuidance
from torch import nn
from transformers import PreTrainedModel

from diffsight.extending import Target, join, unwrapped
from diffsight.pipelines.standard_names import standard_names, word_embeddings

TEXT_EMBEDDINGS = "prompt_embeds"  # their name in the blocks of modular pipelines
GUIDERS_METHODS = ("prepare_inputs", "prepare_inputs_from_block_state")  # these return the inputs of each branch
_PLAIN = (bool, int, float, str, list, tuple, dict)


def components(pipeline: DiffusionPipeline) -> dict[str, Any]:
    """Return the components of a pipeline by name, without those that are unset or plain values."""
    held = vars(pipeline)
    names = pipeline.components if isinstance(pipeline, ModularPipeline) else pipeline.config
    found = ((name, held.get(name)) for name in names if not name.startswith("_"))
    return {name: part for name, part in found if part is not None and not isinstance(part, _PLAIN)}


def traceable_methods(pipeline: DiffusionPipeline, owner: Any) -> Mapping[str, str]:
    """Return the methods of the pipeline or of a component that pipelines call directly, name to path.

    These are `encode_prompt` of the pipeline, `encode` and `decode` of a VAE, `step` of a scheduler, and the
    methods with which the guider of a modular pipeline prepares inputs."""
    if owner is pipeline:
        return {name: name for name in ("encode_prompt",) if _has_method(owner, name)}
    for path, component in components(pipeline).items():
        component = unwrapped(component)
        if component is owner:
            return {name: join(path, name) for name in _direct_methods(component) if _has_method(component, name)}
    return {}


def text_block_targets(pipeline: Any) -> list[Target]:
    """Return targets for the blocks of a modular pipeline that encode the prompt. Other pipelines have `encode_prompt`.

    They are the innermost blocks that have text embeddings among their outputs, but not among their inputs."""
    blocks = [("blocks", pipeline._blocks)] if isinstance(pipeline, ModularPipeline) else []
    for path, block in blocks:
        blocks += [(join(path, name), inner) for name, inner in block.sub_blocks.items()]
    return [Target(block, "__call__", path) for path, block in blocks if _encodes_text(block)]


def blocks_in(block: ModularPipelineBlocks) -> list[ModularPipelineBlocks]:
    """Return a block of a modular pipeline, followed by all blocks in it."""
    blocks = [block]
    for outer in blocks:
        blocks += outer.sub_blocks.values()
    return blocks


def _encodes_text(block: ModularPipelineBlocks) -> bool:
    if block.sub_blocks:
        return False
    made = {output.name for output in block.intermediate_outputs}
    return TEXT_EMBEDDINGS in made and TEXT_EMBEDDINGS not in {given.name for given in block.inputs}


def component_names(component: Any) -> dict[str, str]:
    """Return the standard names of a component, name to real path. Only transformers models have any."""
    return standard_names(component) if isinstance(unwrapped(component), PreTrainedModel) else {}


def text_encoder_names(pipeline: DiffusionPipeline) -> list[str]:
    """Return the names of the components that may encode text: those with layers and a word embedding."""
    modules = {name: part for name, part in components(pipeline).items() if isinstance(part, nn.Module)}
    return [name for name, m in modules.items() if "layers" in component_names(m) and word_embeddings(m)]


def execution_device(pipeline: DiffusionPipeline) -> torch.device:
    """Return the device on which a pipeline computes, which is not that of weights that are offloaded."""
    return pipeline._execution_device


def _direct_methods(component: Any) -> tuple[str, ...]:
    if isinstance(component, nn.Module):
        return "encode", "decode"
    if isinstance(component, BaseGuidance):
        return GUIDERS_METHODS
    return ("step",) if isinstance(component, SchedulerMixin) else ()


def _has_method(component: Any, name: str) -> bool:
    defined = (vars(cls)[name] for cls in type(component).__mro__ if name in vars(cls))
    return isinstance(next(defined, None), FunctionType)
