"""Causal tracing in a language model: the rows of a layer run together, from its stored input where possible.

In an encoder-decoder model, the subject is noised in the encoder, and its output is stored for sites in the decoder.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers.modeling_outputs import BaseModelOutput

from diffsight.errors import InputError
from diffsight.lenses.layers import EMBEDDING, Layers, layer_title
from diffsight.lenses.patching.language_pair import check_reached_once, in_encoder
from diffsight.lenses.sites.find_sites import Sites, find_sites, layer_of
from diffsight.lenses.sites.prompt_tokens import PromptTokens
from diffsight.lenses.sites.site import Site
from diffsight.lenses.tokens.batches import open_batches
from diffsight.lenses.tokens.choosing import check_language_model, choose_tokens, layers_to_read
from diffsight.lenses.tokens.token_text import Spelling
from diffsight.lenses.tracing.stored_starts import can_start_from
from diffsight.lenses.tracing.subject_noise import Noise
from diffsight.lenses.tracing.traced import Traced
from diffsight.pipelines.language.model import LanguageModel, LanguageRun
from diffsight.pipelines.standard_names import path_of, word_embeddings

_POINTS = {"layers": "layers_output", "attentions": "attentions_output", "mlps": "mlps_output"}


@dataclass(frozen=True)
class _NoisedRun:
    """The run with noise and nothing restored, a row for each sample.

    Attributes:
        probabilities: The probability of the answer, (samples,).
        inputs: The input of each layer, (samples, tokens, features); empty if layers cannot start from one.
        encoded: The output of the encoder, (samples, tokens, features), if the sites are in the decoder behind it.
    """

    probabilities: torch.Tensor
    inputs: list[torch.Tensor] = field(repr=False)
    encoded: torch.Tensor | None = field(repr=False)


@dataclass(frozen=True)
class LanguageTrace:
    """A trace of one prompt.

    Attributes:
        model: The model.
        prompt: The prompt.
        tokens: The tokens that the sites see.
        subject: The tokens of the subject among those of the prompt.
        sees_subject: Whether the sites see the tokens of the prompt. A decoder behind an encoder does not.
        embedding: The path of the embedding that is noised.
        sites: "layers", "attentions" or "mlps" of all layers, or points.
        chosen: The numbers of the layers or points to restore.
        window: The number of layers or points that are restored together.
        answer: The token whose probability is measured. None: the most likely token of the clean run.
        noise: The noise.
        batch_size: The number of rows in a pass.
        progress: Whether to show a progress bar.
        inputs: Further inputs of the model.
    """

    model: LanguageModel
    prompt: str
    tokens: PromptTokens = field(repr=False)
    subject: range
    sees_subject: bool
    embedding: str
    sites: str | tuple[Site, ...]
    chosen: tuple[int, ...]
    window: int
    answer: int | None
    noise: Noise
    batch_size: int
    progress: bool
    inputs: Mapping[str, Any]

    @torch.no_grad()
    def run(self) -> Traced:
        """Restore every site at every token."""
        clean, answer, probability = self._run_clean()
        noised, passes = self._run_noised(answer)
        count, samples = len(self.tokens), self.noise.samples
        size = max(1, self.batch_size // samples)
        found, passes = torch.empty(samples, len(self.chosen), count), passes + 1
        with tqdm(desc="tracing", total=len(self.chosen) * count, disable=not self.progress) as bar:
            for i, number in enumerate(self.chosen):
                for start in range(0, count, size):
                    some = range(start, min(start + size, count))
                    found[:, i, start : some.stop] = self._restored(number, some, clean, noised, answer)
                    passes += 1
                    bar.update(len(some))
        metric = f"probability of {Spelling(self.model)(answer)!r}"
        marked = self.subject if self.sees_subject else ()
        names = [f"{text}*" if i in marked else text for i, text in enumerate(self.tokens.texts)]
        return Traced(metric, self._titles(), tuple(names), found, probability, noised.probabilities, passes)

    def _titles(self) -> tuple[str, ...]:
        if isinstance(self.sites, str):
            return tuple(map(layer_title, self.chosen))
        return tuple(self.sites[number].name for number in self.chosen)

    @cached_property
    def _starts(self) -> list[int | None]:
        """The layer that each site is in; None for a site outside the layers."""
        if isinstance(self.sites, str):
            return list(range(len(self.model.layers_output)))
        return [layer_of(self.model, site) for site in self.sites]

    def _open(self, rows: int, encoded: torch.Tensor | None = None) -> LanguageRun:
        given = {} if encoded is None else {"encoder_outputs": BaseModelOutput(encoded)}
        (batch,) = open_batches(self.model, [self.prompt] * rows, -1, rows, **self.inputs, **given)
        return batch.run

    def _run_clean(self) -> tuple[dict[int, torch.Tensor], int, float]:
        """Return the values to restore by the number of the site, (tokens, ...), in the order in which the model
        reaches the sites, the answer, and its probability.

        Raises:
            InputError: A site is not reached once, or does not have one value for each token.
        """
        clean: dict[int, torch.Tensor] = {}
        passages: Counter[str] = Counter()
        points = () if isinstance(self.sites, str) else self.sites

        def keep(number: int, site: Site, value: Any) -> None:
            passages[site.point] += 1
            clean.setdefault(number, site.tensor(value).clone())

        with self._open(1) as run:
            if isinstance(self.sites, str):
                clean = {layer: self._read(run, layer).clone() for layer in range(len(self.model.layers_output))}
            for number, site in enumerate(points):
                run.follow(site.path, partial(keep, number, site))
            probabilities = _next(run)[0]
        check_reached_once([site.point for site in points], passages)
        for number, site in enumerate(points):
            if clean[number].shape[:2] != (1, len(self.tokens)):
                raise InputError(
                    f"{site.point} has the shape {tuple(clean[number].shape)}, without one value for each of the "
                    f"{len(self.tokens)} tokens: choose another site"
                )
        answer = int(probabilities.argmax()) if self.answer is None else self.answer
        return {number: value[0] for number, value in clean.items()}, answer, float(probabilities[answer])

    def _run_noised(self, answer: int) -> tuple[_NoisedRun, int]:
        """Return the run with noise and nothing restored, and the number of passes."""
        samples, may_start = self.noise.samples, any(self._starts)  # at layer 0, there is nothing to share
        with self._open(samples) as run:
            self._add_noise(run, 1)
            inputs = [run.layers_input[layer].clone() for layer in range(len(self.model.layers_output) * may_start)]
            logits = run.logits[:, -1].clone()
            probabilities = _next(run)[:, answer]
            encoded = None if self.sees_subject else run.result.encoder_last_hidden_state
        if not may_start:
            return _NoisedRun(probabilities, [], encoded), 1
        given = {**self.inputs} if encoded is None else {**self.inputs, "encoder_outputs": BaseModelOutput(encoded)}
        starts = can_start_from(self.model, [self.prompt] * samples, inputs[-1], logits, given)
        return _NoisedRun(probabilities, inputs if starts else [], encoded), 2

    def _restored(
        self,
        number: int,
        tokens: Sequence[int],
        clean: dict[int, torch.Tensor],
        noised: _NoisedRun,
        answer: int,
    ) -> torch.Tensor:
        """Return the probability of the answer with one token restored around a site, (samples, tokens)."""
        first, samples = max(0, number - self.window // 2), self.noise.samples
        last = min(len(clean), number + (self.window + 1) // 2)
        rows = torch.arange(samples * len(tokens))
        places = torch.tensor(tokens).repeat(samples)
        starts = self._starts[first:last]
        start = min(starts) if noised.inputs and None not in starts else 0
        encoded = None if noised.encoded is None else noised.encoded.repeat_interleave(len(tokens), 0)
        with self._open(len(rows), encoded) as run:
            if start:
                run.skip_layers(0, start - 1, noised.inputs[start].repeat_interleave(len(tokens), 0))
            elif encoded is None:
                self._add_noise(run, len(tokens))
            for restored in (other for other in clean if first <= other < last):
                values = self._read(run, restored).clone()
                values[rows, places] = clean[restored][places]
                self._write(run, restored, values)
            found = _next(run)[:, answer]
        return found.reshape(samples, len(tokens))

    def _read(self, run: LanguageRun, number: int) -> torch.Tensor:
        if isinstance(self.sites, str):
            return getattr(run, _POINTS[self.sites])[number]
        return self.sites[number].read(run)

    def _write(self, run: LanguageRun, number: int, values: torch.Tensor) -> None:
        if isinstance(self.sites, str):
            getattr(run, _POINTS[self.sites])[number] = values
        else:
            self.sites[number].write(run, values)

    def _add_noise(self, run: LanguageRun, times: int) -> None:
        """Add the noise of each sample to the embeddings of `times` rows."""
        embedding = run[self.embedding]
        embeddings = embedding.output.clone()
        noise = self.noise.draw(embedding.weight, len(self.subject), embeddings.shape[-1])
        noise = noise.repeat_interleave(times, 0).to(embeddings)
        embeddings[:, self.subject.start : self.subject.stop] += noise
        embedding.output = embeddings


def trace_language(
    model: LanguageModel,
    prompt: str,
    subject: str,
    sites: Sites,
    layers: Layers,
    window: int,
    answer: str | int | None,
    noise: Noise,
    batch_size: int,
    progress: bool,
    inputs: Mapping[str, Any],
) -> Traced:
    """Trace a prompt of a language model, see `causal_tracing`."""
    check_language_model("causal_tracing", model)
    places, chosen = _sites_to_restore(model, sites, layers)
    run = model.trace(prompt, **inputs)
    read = PromptTokens.of(model, run.tokens[0].tolist())
    sees_subject = not model.is_encoder_decoder or (isinstance(places, tuple) and in_encoder(places))
    tokens = read if sees_subject else PromptTokens.of(model, run.decoder_tokens[0].tolist())
    token = None if answer is None else choose_tokens(model, answer)
    if token is not None and len(token) != 1:
        raise InputError(f"answer must be one token, not {answer!r}")
    noised = (read.span(subject), sees_subject, _embedding(model))
    how = (window, token and token[0], noise, batch_size, progress, inputs)
    return LanguageTrace(model, prompt, tokens, *noised, places, chosen, *how).run()


def _sites_to_restore(
    model: LanguageModel, sites: Sites, layers: Layers
) -> tuple[str | tuple[Site, ...], tuple[int, ...]]:
    """Return the kind of sites and the layers, or points and their numbers."""
    if isinstance(sites, str) and sites in _POINTS:
        chosen = layers_to_read(model, layers)
        if EMBEDDING in chosen:
            raise InputError('the noise is added to the embedding: choose layers without "embedding"')
        return sites, chosen
    found = tuple(find_sites(model, sites, layers))
    if any(site.head_dim is not None for site in found):
        raise InputError(
            'causal_tracing does not restore single heads: choose "layers", "attentions" or "mlps", or paths of modules'
        )
    return found, tuple(range(len(found)))


def _embedding(model: LanguageModel) -> str:
    """Return the path of the word embedding that reads the prompt."""
    if not model.is_encoder_decoder:
        return "embed_tokens"
    encoder = model.module.get_encoder()
    return f"{path_of(model.module, encoder)}.{word_embeddings(encoder)[0]}"


def _next(run: LanguageRun) -> torch.Tensor:
    """Return the probabilities of the next token, (rows, vocabulary)."""
    return run.next_token_probs.float().cpu()
