"""Copies of pipelines that share everything with the pipeline, except for what changes in a call."""

import copy
from typing import Any

import torch
from diffusers import ConfigMixin, DiffusionPipeline, ModularPipeline
from diffusers.guiders import BaseGuidance
from torch import nn
from torch.utils._pytree import tree_leaves


def stateful_parts(pipeline: DiffusionPipeline) -> list[Any]:
    """Return a pipeline, the pipelines in it, and all their components that change in a run."""
    parts = [pipeline]
    for held in parts:
        parts += [part for part in vars(held).values() if _is_stateful(part)] if is_pipeline(held) else []
    return parts


def copied_pipeline(pipeline: DiffusionPipeline, copies: dict[int, Any]) -> DiffusionPipeline:
    """Return a copy that shares everything with the pipeline, except for what changes in a run.

    `copies` are those made so far, by the ids of the objects, which may be held in several places."""
    copied = copies[id(pipeline)] = object.__new__(type(pipeline))
    vars(copied).update(vars(pipeline))
    for name, part in vars(pipeline).items():
        if _is_stateful(part):
            if id(part) not in copies:
                copies[id(part)] = copied_pipeline(part, copies) if is_pipeline(part) else _unused(part)
            vars(copied)[name] = copies[id(part)]
    return copied


def is_pipeline(part: Any) -> bool:
    """Whether an object is a pipeline, modular or not."""
    return isinstance(part, (DiffusionPipeline, ModularPipeline))


def _unused(part: Any) -> Any:
    """Return a deep copy without a current step. A scheduler resets itself when its timesteps are set."""
    held = [leaf for leaf in tree_leaves(vars(part)) if isinstance(leaf, torch.Tensor)]
    copied = copy.deepcopy(part, {id(tensor): tensor.detach().clone() for tensor in held if not tensor.is_leaf})
    if isinstance(copied, BaseGuidance):
        copied.set_state(None, None, None)
    return copied


def _is_stateful(part: Any) -> bool:
    return isinstance(part, ConfigMixin) and not isinstance(part, nn.Module)
