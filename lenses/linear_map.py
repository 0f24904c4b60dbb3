"""A linear map from the hidden states of one text encoder to those of another, fitted by least squares.

    mapping = LinearMap().fit(model, prompts, encoder="text_encoder", source_encoder="text_encoder_2", layers=[2, 4])
    mapping.error                   # {(2, 2): 0.11, (4, 4): 0.18}: the share that the map does not explain
    mapping.error_unseen            # the same for prompts that the map was not fitted on
    mapping(state, 2, 2)            # (..., source features) -> (..., target features)

Let x be a word's hidden state in the source and y its hidden state in the target, each the mean over the word's tokens.
The fit minimizes the sum over all words of |xW + b - y|²; among all solutions it takes the smallest W. The error is the
root of this sum, divided by the root of the sum of |y - mean y|²: 0 is exact, 1 is no better than the mean word.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tqdm.auto import tqdm

from diffsight.errors import InputError
from diffsight.lenses.encoders.checks import check_diffusion_model, check_prompt, check_whole
from diffsight.lenses.encoders.pairing import choose_pairs, choose_source, known_to, words_read
from diffsight.lenses.layers import Layer, Layers, choose_layer, layer_title
from diffsight.lenses.options import check_options
from diffsight.lenses.results.call_values import FittedWith
from diffsight.pipelines.diffusion.encoder_calls import EncoderCall
from diffsight.pipelines.diffusion.encoding import record_encoding
from diffsight.pipelines.diffusion.model import DiffusionModel
from diffsight.pipelines.diffusion.run import is_silenced
from diffsight.pipelines.diffusion.text_encoders import encoders_in

_UNSEEN = 5  # every fifth prompt is left out to measure the error on unseen prompts
Pair = tuple[Layer, Layer]  # a layer of the source, a layer of the target


@dataclass(frozen=True)
class _Fit:
    """The map xW + b."""

    weight: torch.Tensor  # (source features, target features)
    bias: torch.Tensor
    mean: torch.Tensor  # the mean of y

    def error(self, x: torch.Tensor, y: torch.Tensor) -> float:
        return float((x @ self.weight + self.bias - y).norm() / (y - self.mean).norm())


class LinearMap:
    """A map of hidden states from one text encoder to another, for each pair of layers that it was fitted for.

    `source` and `target` name the two text encoders: the model and the encoder, or None before the fit.
    """

    def __init__(self) -> None:
        self.source: tuple[str, str] | None = None
        self.target: tuple[str, str] | None = None
        self.fitted_with: FittedWith | None = None  # for the records of lenses
        self._counts = (0, 0)  # the numbers of layers of source and target
        self._fits: dict[Pair, _Fit] = {}
        self._error: dict[Pair, float] = {}
        self._unseen: dict[Pair, float] = {}
        self._words = 0

    def fit(
        self,
        model: DiffusionModel,
        prompts: Sequence[str],
        *,
        encoder: str | None = None,
        source_encoder: str | None = None,
        source_model: DiffusionModel | None = None,
        layers: Layers = None,
        source_layers: int | str | Sequence[int | str] | None = None,
        progress: bool = True,
        **arguments: Any,
    ) -> "LinearMap":
        """Fit the map on the words of `prompts`, and return it.

        A map from n features is exact on n words, whatever they are. Use many more words, and look at `error_unseen`.

        Args:
            model: The pipeline with the target encoder.
            prompts: The prompts. A word is used if both text encoders read it.
            progress: Whether to show a progress bar.

        The other arguments are those of `encoder_patching`.

        Raises:
            InputError: There is no prompt, an encoder truncates one, or a layer does not exist.
        """
        origin = model if source_model is None else source_model
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        for pipeline in (model, origin):
            check_diffusion_model("LinearMap", pipeline)
        for prompt in prompts:
            check_prompt("LinearMap", prompt)
        check_options(self.fit, model, arguments)
        if not prompts:
            raise InputError("LinearMap needs prompts to be fitted on, but the list is empty")
        taken: dict[Pair, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        for prompt in tqdm(prompts, desc="prompts", disable=not progress or is_silenced(model.pipeline)):
            reading = record_encoding(model, prompt, arguments)
            origin_reading = (
                reading if origin is model else record_encoding(origin, prompt, known_to(origin, arguments))
            )
            found = encoders_in(model, reading).choose(encoder)
            source = choose_source(origin, origin_reading, found, source_encoder)
            both = (origin, origin_reading.encoders[source.name]), (model, reading.encoders[found.name])
            for pipeline, encoded in both:
                check_whole(pipeline, encoded, prompt)
            spans = zip(*(words_read(pipeline, encoded, prompt).spans for pipeline, encoded in both))
            spans = [span for span in spans if None not in span]
            for layer, source_layer in choose_pairs(layers, source_layers, found, source):
                chosen = zip(both, (source_layer, layer), zip(*spans))
                taken.setdefault((source_layer, layer), []).append(
                    tuple(_means(encoded.prompt, number, of) for (_, encoded), number, of in chosen)
                )
        self.fitted_with = FittedWith.of(
            model=model, prompts=prompts, encoder=encoder, source_encoder=source_encoder, source_model=source_model,
            layers=layers, source_layers=source_layers, **arguments,
        )  # fmt: skip
        self.source, self.target = (origin.source, source.name), (model.source, found.name)
        self._counts = source.count, found.count
        for pair, states in taken.items():
            self._fit(pair, states)
        return self

    def _fit(self, pair: Pair, states: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Fit the map of one pair of layers to the states of the words of each prompt, in both encoders."""
        x, y = (torch.cat(side) for side in zip(*states))
        self._words = len(x)
        self._fits[pair] = _least_squares(x, y)
        self._error[pair] = self._fits[pair].error(x, y)
        if len(states) >= _UNSEEN:
            is_seen = [i % _UNSEEN > 0 for i in range(len(states))]
            seen, unseen = (
                [torch.cat(side) for side in zip(*(s for s, was_seen in zip(states, is_seen) if was_seen is kind))]
                for kind in (True, False)
            )
            self._unseen[pair] = _least_squares(*seen).error(*unseen)

    @property
    def error(self) -> Mapping[Pair, float]:
        """The error by source layer and layer, on the words that the map was fitted on."""
        self._check_fitted()
        return dict(self._error)

    @property
    def error_unseen(self) -> Mapping[Pair, float]:
        """The error by source layer and layer on every fifth prompt, of a map that was fitted on the other prompts.

        It is empty if the map was fitted on fewer than five prompts."""
        self._check_fitted()
        return dict(self._unseen)

    def __call__(self, states: torch.Tensor, source_layer: int | str, layer: int | str) -> torch.Tensor:
        """Map hidden states of the source at `source_layer` to hidden states of the target at `layer`.

        Args:
            states: (..., source features).
            source_layer: The layer of the source.
            layer: The layer of the target.

        Returns:
            The mapped states, (..., target features), with the type and device of `states`.

        Raises:
            InputError: The map was not fitted for these layers.
        """
        fit = self._fitted(source_layer, layer)
        if states.shape[-1] != len(fit.weight):
            raise InputError(f"the map takes states with {len(fit.weight)} features, not {states.shape[-1]}")
        mapped = states.detach().to("cpu", torch.float64) @ fit.weight + fit.bias
        return mapped.to(states)

    def check(self, source: tuple[str, str], target: tuple[str, str], pairs: Iterable[Pair]) -> None:
        """Check that the map was fitted between these text encoders, at all these pairs of layers.

        Args:
            source: The source encoder, in the form of the attribute `source`.
            target: The target encoder, in the form of the attribute `target`.
            pairs: Pairs of a source layer and a layer.

        Raises:
            InputError: The map was not fitted for them.
        """
        self._check_fitted()
        if (source, target) != (self.source, self.target):
            names = [", ".join(end) for end in (self.source, self.target, source, target)]
            raise InputError("the map was fitted from {} to {}, not from {} to {}".format(*names))
        for pair in pairs:
            self._fitted(*pair)

    def _fitted(self, source_layer: int | str, layer: int | str) -> _Fit:
        self._check_fitted()
        pair = choose_layer(source_layer, self._counts[0]), choose_layer(layer, self._counts[1])
        if pair not in self._fits:
            known = ", ".join(f"{a} → {b}" for a, b in self._fits)
            raise InputError(f"the map was fitted for the layers {known}, not {pair[0]} → {pair[1]}")
        return self._fits[pair]

    def _check_fitted(self) -> None:
        if not self._fits:
            raise InputError(
                "this LinearMap was never fitted: call map.fit(model, prompts, encoder=…, source_encoder=…)"
            )

    def __repr__(self) -> str:
        if not self._fits:
            return "<LinearMap, not fitted>"
        source, target = map(", ".join, (self.source, self.target))
        lines = [f"<LinearMap from {source} to {target}, fitted on {self._words} words>"]
        for (source_layer, layer), error in self._error.items():
            unseen = self._unseen.get((source_layer, layer))
            unseen = "" if unseen is None else f", {unseen:.3f} on unseen prompts"
            lines.append(f"  {layer_title(source_layer)} → {layer}: error {error:.3f}{unseen}")
        return "\n".join(lines)


def _means(call: EncoderCall, layer: Layer, spans: Sequence[range]) -> torch.Tensor:
    """Return the mean hidden state of each word at a layer, (words, features)."""
    state = call.hidden(layer)[call.rows[0]].to("cpu", torch.float64)
    return torch.stack([state[span.start : span.stop].mean(0) for span in spans])


def _least_squares(x: torch.Tensor, y: torch.Tensor) -> _Fit:
    """Fit a map from x to y: of the maps with the least error, the smallest. There may be fewer words than features."""
    at, mean = x.mean(0), y.mean(0)
    weight = torch.linalg.lstsq(x - at, y - mean, driver="gelsd").solution
    return _Fit(weight, mean - at @ weight, mean)
