"""Accessors: the most used values, as plain tensors and under the same names on every language model.

    hidden = run.layers_output[5]                   # (batch, tokens, features), even if the layer returns a tuple
    run.layers_output[5] = hidden * 2               # the rest of the tuple stays as it is
    run.attentions_output[3][:, -1] = 0
    run.steer([4, 5], direction, factor=2, positions=-1)
    run.skip_layers(6, 8)
    run.next_token_probs.argmax(-1)

Models, runs and rows have them. A value can be assigned or steered before the model reaches it. Reading a value
runs the model up to it, like any other read.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from diffsight.errors import InputError, PointNotFoundError
from diffsight.extending import (
    Envoy,
    Points,
    Target,
    assign,
    child_of,
    fetch,
    flow_of,
    handle_on,
    join,
    keeping_attribute_errors,
    narrowed,
    owner_of,
    part_of,
    run_meant_by,
    target_of,
    tree_of,
)
from diffsight.pipelines.attention.attention_values import attention_value
from diffsight.pipelines.language.heads_result import heads_result
from diffsight.pipelines.language.text_configs import WRITES, text_config
from diffsight.pipelines.language.unembedding import HiddenLayout, hidden_dtype, norm_and_head, run_tail
from diffsight.pipelines.language.value_parts import FIRST, Added, HiddenInput, Logits, NextLogits, Within
from diffsight.pipelines.module_spans import Span
from diffsight.pipelines.numbers import as_integer
from diffsight.pipelines.standard_names import EMBEDDING
from diffsight.pipelines.steering_arguments import check_factor, check_finite, check_positions, described


class PerLayer:
    """One value per layer: read with `[i]` or a slice, assigned with `[i] = tensor`."""

    def __init__(
        self, root: "LayerAccessors", name: str, point: Callable[[Envoy, str], tuple[Points, str, Any]]
    ) -> None:
        self._root, self._name, self._point = root, name, point

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return fetch(*self._at(index))

    def __setitem__(self, index: int, value: torch.Tensor) -> None:
        points, name = self._at(index)
        assign(points, name, value)

    def __len__(self) -> int:
        return len(self._root._layers())

    def __iter__(self) -> Iterator[Any]:
        return (self[i] for i in range(len(self)))

    def __repr__(self) -> str:
        return f"<{self._name} of {len(self)} layers>"

    def _at(self, index: int) -> tuple[Points, str]:
        path = join(target_of(self._root).path, f"{self._name}[{index}]")
        points, name, part = self._point(self._root._layer(index, path), path)
        return _part_of_value(self._root._call_of_layer(points, index, path), part), name


class LayerAccessors:
    """The accessors that language models and text encoders have."""

    @property
    def layers_input(self) -> PerLayer:
        """The hidden states that enter each layer, `(batch, tokens, features)`. Assignable."""
        return PerLayer(self, "layers_input", lambda layer, path: (layer, "inputs", HiddenInput()))

    @property
    def layers_output(self) -> PerLayer:
        """The hidden states that each layer returns, `(batch, tokens, features)`. Assignable."""
        return PerLayer(self, "layers_output", lambda layer, path: (layer, "output", FIRST))

    def _hint(self, name: str, known: Iterable[str]) -> str:
        if name in ("hidden_states", "hidden_state", "last_hidden_state"):
            return "; hidden states are .layers_output[i], and .layers_input[0] before the first layer"
        if name in ("num_layers", "n_layers", "n_layer"):
            path = f"model.{self.path}" if self.path else "model"
            return f"; it has {len(self._layers())} layers: len({path}.layers)"
        return super()._hint(name, known)

    def _layers(self) -> Envoy:
        layers = child_of(self, "layers")
        if layers is None:
            raise PointNotFoundError(
                f"no layers were found in {self._tree.title}: name them, as in "
                "LanguageModel(source, names={'layers': 'path.of.the.list'})"
            )
        return layers

    def _index(self, index: int, path: str) -> int:
        count = len(self._layers())
        if isinstance(index, (list, tuple, range, slice)) or getattr(index, "ndim", 0):
            raise InputError(f"{path} takes the number of a layer, not {index!r}")
        number = as_integer(index)
        if number is None or not -count <= number < count:
            instead = "; the input of the first layer is layers_input[0]" if index == EMBEDDING else ""
            raise InputError(f"{path}: there is no layer {index!r}, the model has {count} (0 to {count - 1}){instead}")
        return number % count

    def _layer(self, index: int, path: str) -> Envoy:
        return self._layers()[self._index(index, path)]

    def _call_of_layer(self, points: Points, index: int, path: str) -> Points:
        """Return the points of a layer: those of its own call, if its module is listed several times."""
        layers, number = [*owner_of(self._layers())._modules.values()], self._index(index, path)
        earlier = layers[:number].count(layers[number])
        return points.calls[earlier] if earlier else points


class Accessors(LayerAccessors):
    """The accessors of a language model."""

    def _hint(self, name: str, known: Iterable[str]) -> str:
        if name in ("show", "display"):
            return "; print(run.text) prints the text that a run generated"
        return super()._hint(name, known)

    @property
    def attentions_input(self) -> PerLayer:
        """The hidden states that enter the attention of each layer, usually normed. Assignable."""
        return PerLayer(
            self, "attentions_input", lambda layer, path: (_part(layer, "self_attn", path), "inputs", HiddenInput())
        )

    @property
    def attentions_output(self) -> PerLayer:
        """The output of the attention of each layer, or of Mamba or a convolution in its place. Assignable."""
        return PerLayer(
            self, "attentions_output", lambda layer, path: (_part(layer, "self_attn", path), "output", FIRST)
        )

    @property
    def mlps_input(self) -> PerLayer:
        """The hidden states that enter the MLP of each layer, usually normed. Assignable."""
        return PerLayer(self, "mlps_input", lambda layer, path: (_part(layer, "mlp", path), "inputs", HiddenInput()))

    @property
    def mlps_output(self) -> PerLayer:
        """The output of the MLP of each layer. Assignable."""
        return PerLayer(self, "mlps_output", lambda layer, path: (_part(layer, "mlp", path), "output", FIRST))

    @property
    def attention_probs(self) -> PerLayer:
        """The attention probabilities of each layer as they are multiplied with the values, `(batch, heads, tokens,
        tokens)`. Assignable."""
        return PerLayer(self, "attention_probs", _of_attention)

    @property
    def q(self) -> PerLayer:
        """The queries of each layer as they meet the keys, after any norm and rotary embedding, `(batch, tokens, heads,
        features)`. Assignable."""
        return PerLayer(self, "q", _of_attention)

    @property
    def k(self) -> PerLayer:
        """The keys of each layer as they meet the queries, `(batch, tokens, heads, features)`. Assignable.

        Heads that share a key have one key, or a copy each, depending on which the model computes with."""
        return PerLayer(self, "k", _of_attention)

    @property
    def v(self) -> PerLayer:
        """The values of each layer, of the same shape as the keys. Assignable."""
        return PerLayer(self, "v", _of_attention)

    @property
    def heads_output(self) -> PerLayer:
        """The output of each head, probabilities times values, `(batch, tokens, heads, features)`. Assignable."""
        return PerLayer(self, "heads_output", _of_attention)

    @property
    def heads_result(self) -> PerLayer:
        """What each head adds to the residual stream, `(batch, tokens, heads, features of the model)`. Assignable.

        The sum over the heads, plus the bias of the output projection, is the output of the attention."""
        return PerLayer(self, "heads_result", _result)

    @property
    def logits(self) -> torch.Tensor:
        """The logits that the model returns, `(batch, tokens, vocabulary)`. Assignable."""
        with keeping_attribute_errors(self):
            return self._logits().output

    @logits.setter
    def logits(self, value: torch.Tensor) -> None:
        self._logits().output = value

    @property
    def next_token_probs(self) -> torch.Tensor:
        """The probabilities of the token after the last one, `(batch, vocabulary)`.

        In a row with padding at the end, the last token is the last one that is not padding."""
        with keeping_attribute_errors(self):
            run = run_meant_by(self, "next_token_probs")
            run.check_one_pass_of_prompt("next_token_probs")
            last = getattr(run, "last_tokens", None)
            return _part_of_value(self, NextLogits(last)).output.float().softmax(-1)

    def skip_layers(self, start: int, end: int | None = None, value: torch.Tensor | None = None) -> None:
        """Skip the layers from `start` to `end`, both included, or only layer `start`.

        The model continues with `value`, or by default with the input of the first skipped layer."""
        first = self._index(start, "skip_layers")
        last = first if end is None else self._index(end, "skip_layers")
        if last < first:
            raise InputError(f"skip_layers({start}, {end}): the last layer comes before the first")
        run_meant_by(self, "skip_layers").check_one_pass_of_prompt("skip_layers")
        value = self.layers_input[first] if value is None else value
        structure = self._tree.structure
        for index in range(first, last + 1):
            size = structure.tuples[index] if structure else 0
            self._layer(index, "skip_layers").skip((value, *[None] * (size - 1)) if size else value)

    def steer(
        self,
        layers: int | Sequence[int],
        vector: torch.Tensor,
        factor: float = 1.0,
        positions: int | Sequence[int] | None = None,
    ) -> None:
        """Add `factor * vector` to the output of layers. A layer or position that is listed twice is steered once.

        Args:
            layers: The number of a layer, or several.
            vector: `(features,)`, or any shape that can be added to `(batch, tokens, features)`. With `positions`, the
                tokens are those at the positions.
            factor: A scale.
            positions: The positions of the tokens to steer in each input: 0 is its first token, -1 its last. Padding
                does not count. None stands for all positions.

        Raises:
            InputError: An argument is not valid, or `prefill_chunk_size` splits the prompt that is to be steered, or
                the token at a position is not read because it is in `past_key_values`.
        """
        if not isinstance(vector, torch.Tensor) or not vector.ndim or vector.is_complex():
            raise InputError(f"steer takes a tensor of real numbers, (features,), not {described(vector)}")
        factor = _factors(factor, vector) if isinstance(factor, torch.Tensor) else check_factor(factor)
        places = None if positions is None else check_positions(_listed(positions))
        chosen = dict.fromkeys(self._index(index, "steer") for index in _listed(layers))
        if not chosen:
            raise InputError("no layers are chosen: pass the number of a layer")
        run = run_meant_by(self, "steer")
        run.check_one_pass_of_prompt("steer")
        if not flow_of(run).is_scan:  # which knows shapes alone
            check_finite(vector)
            check_finite(torch.as_tensor(factor), "the factor")
        mask = None if places is None else self._padding_mask()
        added = Added(places, mask, run.cached_tokens)
        tokens = 0 if run.tokens is None else run.tokens.shape[-1]
        if places is not None and 0 < added.cached < tokens:  # raise an error now, before the model runs
            added.places(1 if mask is None else len(mask), tokens - added.cached, "steer")
        for index in chosen:
            layer = self._call_of_layer(self._layer(index, "steer"), index, "steer")
            _part_of_value(layer, FIRST, added).output = vector * factor

    def project_on_vocab(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the logits that the model would compute if `hidden` were the output of its last layer.

        This applies `ln_final` and `lm_head`, with any scales and caps that the model has there. They are called
        outside the run, so nothing in them is read or replaced.

        Args:
            hidden: `(..., features)`, of any floating-point type. It is cast to the type of the model's hidden states.

        Returns:
            Logits, `(..., vocabulary)`.
        """
        if not isinstance(hidden, torch.Tensor) or not hidden.ndim or not hidden.is_floating_point():
            raise InputError("project_on_vocab takes a floating-point tensor of hidden states, (..., features)")
        tree = self._tree
        if tree.elsewhere is not None and tree.elsewhere.is_meant_by(self):
            return tree.elsewhere.call(self, (hidden,), {}, method="project_on_vocab")
        tree.load_unless_scanning()
        if tree.target_named(tree.root, "lm_head") is None:
            raise PointNotFoundError(f"no lm_head was found in {tree.title}")
        if self.mixes_layers:
            raise InputError(f"the logits of {tree.title} come from several layers, so no layer alone has any")
        hidden = hidden.to(hidden_dtype(tree.root.owner) or hidden.dtype)
        structure = tree.structure
        if structure is not None and not structure.has_plain_tail and structure.layout is not None:
            layers = [owner_of(layer) for layer in self._layers()]
            return run_tail(tree.root.owner, layers, structure.tuples, structure.layout, hidden)
        width = getattr(text_config(tree.root.owner.config, WRITES), "hidden_size", None)
        if isinstance(width, int) and hidden.shape[-1] != width:
            raise InputError(f"project_on_vocab takes hidden states of {width} features, not {hidden.shape[-1]}")
        return norm_and_head([tree.target_named(tree.root, name) for name in ("ln_final", "lm_head")], hidden)

    @property
    def hidden_layout(self) -> HiddenLayout | None:
        """Which dimensions of `layers_output[i]` are the batch and the tokens: the first and second in most models.

        None where the layers do not return one hidden state per token, or are called several times in a pass."""
        structure = self._tree.structure
        if structure is None:
            return HiddenLayout()
        return None if structure.has_cycles else structure.layout

    @property
    def mixes_layers(self) -> bool:
        """Whether the logits are computed from several layers or other parts, so that no layer alone has logits."""
        structure = self._tree.structure
        return structure is not None and structure.has_bypass

    # ---- parts

    def _padding_mask(self) -> torch.Tensor | None:
        """Return the mask of the real tokens that the layers read, `(rows, tokens)`, or None if all are real."""
        run = run_meant_by(self, "steer")
        inputs, part = run.model_inputs, part_of(self)
        if inputs is None or not inputs.is_padded or self._tree.root.owner.config.is_encoder_decoder:
            return None
        if part is None:
            return inputs.mask
        every = inputs.mask.repeat_interleave(part.total // len(inputs.mask), 0)
        return every[part.start : part.stop : part.stride]

    def _logits(self) -> Points:
        return _part_of_value(self, Logits())

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "logits":
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)


class LanguageEnvoy(Accessors, Envoy):
    """The envoy of a language model in one run, or in a row of it."""


def _part_of_value(points: Points, part: Any, inner: Any = None) -> Points:
    """Return the same point, narrowed to `part` of its value. The point of a row is then narrowed to that row, and
    finally to `inner`, if passed."""
    parts = [one for one in (part, part_of(points), inner) if one is not None]
    whole = parts.pop() if parts else None
    while parts:
        whole = Within(parts.pop(), whole)
    return narrowed(points, whole)


# ---- parts of a layer


def _part(layer: Envoy, name: str, path: str) -> Points:
    part = child_of(layer, name)
    if part is None:
        known = ", ".join(tree_of(layer).names_in(target_of(layer)))
        raise PointNotFoundError(
            f"{path}: {layer.path} has no {name}; it has {known}. Name it, as in "
            f"LanguageModel(source, names={{{name!r}: 'path.in.the.layer'}})"
        )
    return part


def _attention(layer: Envoy, path: str) -> Target:
    """Return the target of a layer's attention module, or of the first module if it is a span."""
    target = target_of(_part(layer, "self_attn", path))
    return target.first if isinstance(target, Span) else target


def _of_attention(layer: Envoy, path: str) -> tuple[Points, str, Any]:
    target = attention_value(_attention(layer, path), path.rpartition("[")[0].rpartition(".")[2])
    return handle_on(layer, target), "output", None


def _result(layer: Envoy, path: str) -> tuple[Points, str, Any]:
    return handle_on(layer, heads_result(_attention(layer, path), path)), "output", None


def _factors(factor: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
    """Return a factor that is a tensor. Raise InputError if a vector cannot be multiplied with it."""
    if factor.is_complex():
        raise InputError(f"factor is a real number, not {described(factor)}")
    try:
        torch.broadcast_shapes(factor.shape, vector.shape)
    except RuntimeError:
        raise InputError(
            f"a factor of the shape {tuple(factor.shape)} does not fit a vector of the shape {tuple(vector.shape)}"
        ) from None
    return factor


def _listed(value: Any) -> list:
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return value.flatten().tolist()
    return list(value) if isinstance(value, (Sequence, range)) and not isinstance(value, str) else [value]
