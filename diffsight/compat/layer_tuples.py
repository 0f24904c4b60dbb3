"""Layers whose output code written for nnsight expects to be a tuple, as in transformers 4: `layer.output[0]`."""

from typing import Any

import torch

from diffsight.compat.config import CONFIG
from diffsight.errors import InputError
from diffsight.extending import Tree


class LayerOutput(tuple):
    """The output of a layer as a tuple. Operations that only a tensor supports raise an error that names the switch."""

    __slots__ = ()

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, tuple):
            raise InputError(f"{_IS_TUPLE} Write `.output[0][...]` for `.output[...]`, {_OR_SWITCH}")
        return super().__getitem__(key)

    def __setitem__(self, key: Any, value: Any) -> None:
        if key == 0 and value is super().__getitem__(0):  # `output[0] += x`, which has changed the value in place
            return
        raise InputError(f"{_IS_TUPLE} Write `.output[0][...] = ` for `.output[...] = `, {_OR_SWITCH}")

    def __getattr__(self, name: str) -> Any:
        if hasattr(torch.Tensor, name) and not name.startswith("__"):
            raise InputError(f"{_IS_TUPLE} Write `.output[0].{name}` for `.output.{name}`, {_OR_SWITCH}")
        raise AttributeError(f"'tuple' object has no attribute {name!r}")


_IS_TUPLE = "the output of a layer is a tuple here, as in transformers 4."
_OR_SWITCH = "or set CONFIG.APP.BLOCKS_GIVE_TUPLES = False for tensors"


def gives_tuple(tree: Tree, owner: Any) -> bool:
    """Return whether the output of a module is a tuple in code written for nnsight."""
    if not CONFIG.APP.BLOCKS_GIVE_TUPLES or not tree.__dict__.get("blocks_give_tuples"):
        return False
    if any(owner is layer for stack in getattr(tree, "stacks", ()) for layer in stack):
        return True
    return any(cls.__name__ == "GradientCheckpointingLayer" for cls in type(owner).__mro__)  # transformers' layers
