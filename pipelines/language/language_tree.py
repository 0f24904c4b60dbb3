"""The traceable parts of a language model and their standard names, found or set by the user, and verified."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from diffsight.errors import InputError, suggest
from diffsight.extending import Points, Target, join, points_on, target_of, unwrapped
from diffsight.pipelines.language.heads_result import HEADS_RESULT, heads_result
from diffsight.pipelines.language.name_check import Structure, check_names
from diffsight.pipelines.module_spans import Span, module_at
from diffsight.pipelines.named_tree import NamedTree
from diffsight.pipelines.standard_names import (
    are_layers,
    embeddings,
    is_list,
    layer_names,
    model_names,
    standard_names,
)

_OF_MODEL = ("layers", "ln_final", "lm_head", "embed_tokens", "encoder", "decoder")
_OF_LAYER = ("self_attn", "mlp")


class LanguageTree(NamedTree):
    """The traceable parts of a language model and their standard names.

    Attributes:
        stacks: Its lists of layers.
    """

    def __init__(self, root: Target, load: Callable[[], None] | None, given: Mapping[str, str | None]) -> None:
        super().__init__(root, load)
        net = root.owner
        self._given = _check_given(net, given)
        found = model_names(net) | {name: path for name, path in self._given.items() if name in _OF_MODEL}
        found = {name: path for name, path in found.items() if path is not None}
        self.stacks = [module for module in net.modules() if is_list(module) and are_layers(module)]
        self.stacks += [net.get_submodule(found["layers"])] if "layers" in found else []
        self.known_names[net] = found
        self._checks: list[Structure] = []  # shared by edited copies of the model

    @property
    def structure(self) -> Structure | None:
        """The structure that the check of the names found, or None before the check."""
        return self._checks[0] if self._checks else None

    def weights_loaded(self) -> None:
        self.check_names()

    def check_names(self) -> None:
        """Verify the standard names. A check that needs weights is postponed until they are loaded."""
        net = self.root.owner
        inputs = _trial_inputs(net)
        if inputs and not self._checks:
            structure = check_names(net, self.names_of(net), inputs, self.names_of)
            self._checks += [] if structure is None else [structure]

    def find_names(self, part: nn.Module) -> dict[str, str]:
        """Return the standard names in a layer of any stack, or in a model inside the model, such as an encoder."""
        if any(part is layer for layers in self.stacks for layer in layers):
            return self._of_layer(part)
        return standard_names(part) if isinstance(unwrapped(part), PreTrainedModel) else {}

    def _of_layer(self, layer: nn.Module) -> dict[str, str]:
        found = layer_names(layer) | {name: path for name, path in self._given.items() if name in _OF_LAYER}
        return {name: path for name, path in found.items() if path is not None and _is_there(layer, path)}

    def named_value(self, points: Points, name: str) -> Any:
        target = target_of(points)
        return super().named_value(points_on(points, target.first) if isinstance(target, Span) else points, name)

    def value_target(self, target: Target, name: str) -> Target | None:
        if name == HEADS_RESULT:
            return heads_result(target, join(target.path, name))
        return super().value_target(target, name)

    def describe(self, owner: Any) -> str:
        names = ", ".join(f"{name} = {real}" for name, real in self.names_of(owner).items() if name != real)
        return super().describe(owner) + (f"\nstandard names: {names}" if names else "")


def _check_given(net: nn.Module, names: Mapping[str, str | None]) -> Mapping[str, str | None]:
    """Return the names that the user passes. Raise InputError if they are not valid."""
    for name, path in names.items():
        if name not in _OF_MODEL + _OF_LAYER:
            known = ", ".join(_OF_MODEL + _OF_LAYER)
            raise InputError(
                f"names: {name!r} is not a standard name{suggest(name, _OF_MODEL + _OF_LAYER)}; the standard "
                f"names are {known}"
            )
        if name in _OF_MODEL and path is not None and not _is_there(net, path):
            raise InputError(f"names: {type(net).__name__} has no module {path!r} for {name!r}")
        if name == "layers" and path is not None and not hasattr(net.get_submodule(path), "__getitem__"):
            raise InputError(f"names: {path!r} is a {type(net.get_submodule(path)).__name__}, not a list of layers")
    return names


def _is_there(module: nn.Module, real: str) -> bool:
    try:
        module_at(module, real)
    except AttributeError:
        return False
    return True


def _trial_inputs(net: nn.Module) -> dict[str, torch.Tensor]:
    """Return the inputs of the pass that verifies the names: three tokens."""
    parameters = inspect.signature(unwrapped(net).forward).parameters
    words = getattr(embeddings(net), "num_embeddings", None)
    if "input_ids" not in parameters or not words:
        return {}
    rows = getattr(net, "num_codebooks", 1)  # audio models have one row per codebook
    ids = torch.arange(2, 5, device=getattr(net, "device", None)).expand(rows, 3) % words
    halves = getattr(net.config, "is_encoder_decoder", False) and "decoder_input_ids" in parameters
    return {"input_ids": ids} | ({"decoder_input_ids": ids} if halves else {})
