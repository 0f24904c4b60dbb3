"""Accessors: the values one asks for most, in the same words and as plain tensors on every language model.

    hidden = run.layers_output[5]                   # (batch, tokens, features), whatever tuple the layer returns
    run.layers_output[5] = hidden * 2               # the rest of the tuple stays
    run.attentions_output[3][:, -1] = 0
    run.steer([4, 5], direction, factor=2, positions=-1)
    run.skip_layers(6, 8)
    run.next_token_probs.argmax(-1)

They stand on a model, on a run and on a row. What is assigned or steered may lie ahead of the model; a value that is
read moves the model up to it, as any other.
"""

import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from diffsight.errors import InputError, PointNotFoundError
from diffsight.extending import (
    Envoy,
    MethodEnvoy,
    Points,
    Target,
    keeping_attribute_errors,
    model_of,
    owner_of,
    part_of,
    run_of,
    target_of,
)
from diffsight.pipelines.language.attention import count_heads, output_projection, probabilities, projection
from diffsight.pipelines.language.unembedding import Layout, run_tail
from diffsight.pipelines.language.value_parts import FIRST, Added, Heads, HiddenInput, Logits, NextLogits, Within
from diffsight.pipelines.targets import Span


class PerLayer:
    """One value a layer, by its number: read with `[i]` (or a slice), assigned with `[i] = tensor`."""

    def __init__(self, root: "Accessors", name: str, point: Callable[[Envoy, str], tuple[Points, str, Any]]) -> None:
        self._root, self._name, self._point = root, name, point

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        points, part = self._at(index)
        return points._fetch(part)

    def __setitem__(self, index: int, value: torch.Tensor) -> None:
        points, part = self._at(index)
        points._assign(part, value)

    def __len__(self) -> int:
        return len(self._root._layers())

    def __iter__(self) -> Iterator[Any]:
        return (self[i] for i in range(len(self)))

    def __repr__(self) -> str:
        return f"<{self._name} of {len(self)} layers>"

    def _at(self, index: int) -> tuple[Points, str]:
        path = f"{self._name}[{index}]"
        points, part, narrow = self._point(self._root._layer(index, path), path)
        return narrowed(points, narrow), part


class Accessors:
    """What a language model's handle has besides its modules."""

    @property
    def layers_input(self) -> PerLayer:
        """The hidden states that enter a layer, by number. Assignable."""
        return PerLayer(self, "layers_input", lambda layer, path: (layer, "inputs", HiddenInput()))

    @property
    def layers_output(self) -> PerLayer:
        """The hidden states that a layer gives, by number. Assignable."""
        return PerLayer(self, "layers_output", lambda layer, path: (layer, "output", FIRST))

    @property
    def attentions_input(self) -> PerLayer:
        """The hidden states that enter a layer's attention (as a rule normed). Assignable."""
        return PerLayer(
            self, "attentions_input", lambda layer, path: (_part(layer, "self_attn", path), "inputs", HiddenInput())
        )

    @property
    def attentions_output(self) -> PerLayer:
        """What a layer's attention gives (or what stands in its place: Mamba, a convolution). Assignable."""
        return PerLayer(
            self, "attentions_output", lambda layer, path: (_part(layer, "self_attn", path), "output", FIRST)
        )

    @property
    def mlps_input(self) -> PerLayer:
        """The hidden states that enter a layer's MLP (as a rule normed). Assignable."""
        return PerLayer(self, "mlps_input", lambda layer, path: (_part(layer, "mlp", path), "inputs", HiddenInput()))

    @property
    def mlps_output(self) -> PerLayer:
        """What a layer's MLP gives. Assignable."""
        return PerLayer(self, "mlps_output", lambda layer, path: (_part(layer, "mlp", path), "output", FIRST))

    @property
    def attention_probs(self) -> PerLayer:
        """The attention probabilities of a layer as they meet the values, (batch, heads, tokens, tokens). Assignable.
        Needs eager attention."""
        return PerLayer(self, "attention_probs", _probabilities)

    @property
    def q(self) -> PerLayer:
        """The queries of a layer, (batch, tokens, heads, features), as the projection gives them. Assignable."""
        return PerLayer(self, "q", _projected)

    @property
    def k(self) -> PerLayer:
        """The keys of a layer, (batch, tokens, key heads, features), as the projection gives them. Assignable."""
        return PerLayer(self, "k", _projected)

    @property
    def v(self) -> PerLayer:
        """The values of a layer, (batch, tokens, key heads, features), as the projection gives them. Assignable."""
        return PerLayer(self, "v", _projected)

    @property
    def heads_output(self) -> PerLayer:
        """What each head of a layer gives, (batch, tokens, heads, features), before they are projected. Assignable."""
        return PerLayer(self, "heads_output", _of_heads)

    @property
    def logits(self) -> torch.Tensor:
        """The logits that the model returns, (batch, tokens, vocabulary). Assignable."""
        with keeping_attribute_errors(self):
            return self._logits()._fetch("output")

    @logits.setter
    def logits(self, value: torch.Tensor) -> None:
        self._logits()._assign("output", value)

    @property
    def next_token_probs(self) -> torch.Tensor:
        """The probabilities of the token that comes after the last one, (batch, vocabulary); after the last real one,
        where a row is padded behind it."""
        with keeping_attribute_errors(self):
            run = self._run if self._run is not None else self._model._innermost_run()
            inputs = getattr(getattr(run, "_pass", None), "_inputs", None)
            last = None if inputs is None or owner_of(self._model).config.is_encoder_decoder else inputs.last
            return narrowed(self, NextLogits(last))._fetch("output").float().softmax(-1)

    def skip_layers(self, start: int, end: int | None = None, value: torch.Tensor | None = None) -> None:
        """Leaves out the layers from `start` to `end` (included; `start` alone without it). The model goes on with
        `value`, else with what enters the first of them."""
        first = self._index(start, "skip_layers")
        last = first if end is None else self._index(end, "skip_layers")
        if last < first:
            raise InputError(f"skip_layers({start}, {end}): the last layer lies before the first")
        value = self.layers_input[first] if value is None else value
        for index in range(first, last + 1):
            size = self._model._structure.tuples[index] if self._model._structure else 0
            self._layer(index, "skip_layers").skip((value, *[None] * (size - 1)) if size else value)

    def steer(
        self,
        layers: int | Sequence[int],
        vector: torch.Tensor,
        factor: float = 1.0,
        positions: int | Sequence[int] | None = None,
    ) -> None:
        """Adds `factor * vector` to what the layers give, at `positions` of the tokens, or at all. `vector` has the
        shape (features,), or any that can be added to (batch, tokens, features)."""
        if not isinstance(vector, torch.Tensor):
            raise InputError(f"steer takes a tensor, not {type(vector).__name__}")
        places = None if positions is None else [operator.index(p) for p in _listed(positions)]
        for index in _listed(layers):
            layer = self._layer(index, "steer")
            narrowed(layer, FIRST, Added(places))._assign("output", vector * factor)

    def project_on_vocab(self, hidden: torch.Tensor) -> torch.Tensor:
        """The logits that the model would give if `hidden` came out of its last layer: what `ln_final` and `lm_head`
        make of it, with the scales and caps that the model has there. (..., features) to (..., vocabulary), computed
        without any point firing."""
        model = self._model
        model._load_unless_scanning()
        if model._target_named(target_of(model), "lm_head") is None:
            raise PointNotFoundError(f"{type(owner_of(model)).__name__} has no lm_head that was found")
        structure = model._structure
        if structure is not None and not structure.has_plain_tail and structure.layout is not None:
            layers = [target_of(layer).owner for layer in model._layers()]
            return run_tail(owner_of(model), layers, structure.tuples, structure.layout, hidden)
        for name in ("ln_final", "lm_head"):
            target = model._target_named(target_of(model), name)
            if target is not None:
                hidden = target.call(hidden) if isinstance(target, Span) else target.owner(hidden)
        return hidden

    @property
    def hidden_layout(self) -> Layout | None:
        """Where the batch and the tokens stand among the dimensions of `layers_output[i]`: first and second, but for a
        few models. None where the layers do not give one hidden state a token."""
        structure = self._model._structure
        return Layout() if structure is None else structure.layout

    # ---- parts

    def _layers(self) -> Envoy:
        layers = self._child("layers")
        if layers is None:
            raise PointNotFoundError(
                f"no layers were found in {type(self._owner).__name__}: name them, as in "
                "LanguageModel(source, names={'layers': 'path.of.the.list'})"
            )
        return layers

    def _index(self, index: int, path: str) -> int:
        count = len(self._layers())
        if isinstance(index, bool) or not hasattr(index, "__index__") or not -count <= index < count:
            raise InputError(f"{path}: there is no layer {index!r}, the model has {count} (0 to {count - 1})")
        return operator.index(index) % count

    def _layer(self, index: int, path: str) -> Envoy:
        return self._layers()[self._index(index, path)]

    def _logits(self) -> Points:
        return narrowed(self, Logits())

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "logits":
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)


class LanguageEnvoy(Accessors, Envoy):
    """The handle on a language model in one run, or on a row of it."""


def narrowed(points: Points, narrow: Any, inner: Any = None) -> Points:
    """The same point, of whose value only what `narrow` takes is meant; of that the row's part, if it is a row's; and
    of that what `inner` takes."""
    parts = [part for part in (narrow, part_of(points), inner) if part is not None]
    whole = parts.pop() if parts else None
    while parts:
        whole = Within(parts.pop(), whole)
    return Points(model_of(points), target_of(points), run_of(points), points._call, whole)


# ---- parts of a layer


def _part(layer: Envoy, name: str, path: str) -> Points:
    part = layer._child(name)
    if part is None:
        raise PointNotFoundError(
            f"{path}: {layer.path} has no {name}; it has {', '.join(layer._names())}. Name it, as in "
            f"LanguageModel(source, names={{{name!r}: 'path.in.the.layer'}})"
        )
    return part


def _attention(layer: Envoy, path: str) -> Target:
    """The target of a layer's attention module; of a span, its first module's."""
    target = target_of(_part(layer, "self_attn", path))
    return target.first if isinstance(target, Span) else target


def _projected(layer: Envoy, path: str) -> tuple[Points, str, Any]:
    attention = _attention(layer, path)
    name, heads = projection(attention.owner, path[0], path)
    return _envoy(layer, attention.children()[name]), "output", heads


def _of_heads(layer: Envoy, path: str) -> tuple[Points, str, Any]:
    target = target_of(_part(layer, "self_attn", path))
    attention = _attention(layer, path)
    heads = count_heads(attention.owner)
    if heads is None:
        raise InputError(f"{path}: {type(attention.owner).__name__} does not say how many heads it has")
    if isinstance(target, Span):
        return _envoy(layer, target.last), "input", Heads((heads, 1))
    return _envoy(layer, attention.children()[output_projection(attention.owner, path)]), "input", Heads((heads, 1))


def _probabilities(layer: Envoy, path: str) -> tuple[Points, str, Any]:
    target = probabilities(_attention(layer, path), path)
    return MethodEnvoy(model_of(layer), target, run_of(layer), part=part_of(layer)), "output", None


def _envoy(layer: Envoy, target: Target) -> Envoy:
    return Envoy(model_of(layer), target, run_of(layer), part=part_of(layer))


def _listed(value: Any) -> list:
    if isinstance(value, torch.Tensor):
        return value.flatten().tolist()
    return list(value) if isinstance(value, (Sequence, range)) else [value]
