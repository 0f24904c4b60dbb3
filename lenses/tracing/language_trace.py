"""Causal tracing in a language model: the rows of a layer run together, from its stored input where possible."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from tqdm.auto import tqdm

from diffsight.errors import InputError, suggest
from diffsight.lenses.layers import EMBEDDING, Layers, layer_title
from diffsight.lenses.sites.positions import PromptTokens
from diffsight.lenses.tokens.choosing import check_language_model, choose_tokens, layers_to_read
from diffsight.lenses.tokens.token_text import Spelling
from diffsight.lenses.tracing.stored_starts import can_start_from
from diffsight.lenses.tracing.traced import Noise, Traced
from diffsight.pipelines.language.model import LanguageModel, LanguageRun

_POINTS = {"layers": "layers_output", "attentions": "attentions_output", "mlps": "mlps_output"}


@dataclass(frozen=True)
class LanguageTrace:
    """A trace of one prompt.

    Attributes:
        model: The model.
        prompt: The prompt.
        tokens: Its tokens.
        subject: The tokens of the subject.
        kind: "layers", "attentions" or "mlps".
        layers: The layers.
        window: The number of layers that are restored together.
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
    kind: str
    layers: tuple[int, ...]
    window: int
    answer: int | None
    noise: Noise
    batch_size: int
    progress: bool
    inputs: Mapping[str, Any]

    @torch.no_grad()
    def run(self) -> Traced:
        """Restore every layer at every token."""
        clean, answer, probability = self._run_clean()
        noised, corrupted, starts = self._run_noised(answer)
        count, samples = len(self.tokens), self.noise.samples
        size = max(1, self.batch_size // samples)
        found, passes = torch.empty(samples, len(self.layers), count), 3  # the clean run, the noised one, and a trial
        with tqdm(desc="tracing", total=len(self.layers) * count, disable=not self.progress) as bar:
            for i, layer in enumerate(self.layers):
                for start in range(0, count, size):
                    some = range(start, min(start + size, count))
                    found[:, i, start : some.stop] = self._restored(layer, some, clean, noised, starts, answer)
                    passes += 1
                    bar.update(len(some))
        metric = f"probability of {Spelling(self.model)(answer)!r}"
        names = [f"{text}*" if i in self.subject else text for i, text in enumerate(self.tokens.texts)]
        return Traced(metric, tuple(map(layer_title, self.layers)), tuple(names), found, probability, corrupted, passes)

    def _open(self, rows: int) -> LanguageRun:
        cache = {"use_cache": False} if self.model.takes_argument("use_cache") else {}
        return self.model.trace([self.prompt] * rows, **cache, **self.inputs)

    def _run_clean(self) -> tuple[list[torch.Tensor], int, float]:
        """Return the values to restore for each layer, (tokens, features), the answer, and its probability."""
        with self._open(1) as run:
            clean = [self._values(run, layer)[0].clone() for layer in range(len(self.model.layers_output))]
            probabilities = _next(run)[0]
        answer = int(probabilities.argmax()) if self.answer is None else self.answer
        return clean, answer, float(probabilities[answer])

    def _run_noised(self, answer: int) -> tuple[list[torch.Tensor], torch.Tensor, bool]:
        """Return the input of each layer, (samples, tokens, features), the probabilities of the answer, and whether
        layers can start from such an input alone."""
        samples = self.noise.samples
        with self._open(samples) as run:
            self._add_noise(run, 1)
            inputs = [run.layers_input[layer].clone() for layer in range(len(self.model.layers_output))]
            corrupted = _next(run)[:, answer]
        prompts = [self.prompt] * samples
        starts = can_start_from(
            self.model, prompts, inputs[-1], corrupted, lambda logits: logits.softmax(-1)[:, answer], self.inputs
        )
        return inputs, corrupted, starts

    def _restored(
        self,
        layer: int,
        tokens: Sequence[int],
        clean: list[torch.Tensor],
        noised: list[torch.Tensor],
        starts: bool,
        answer: int,
    ) -> torch.Tensor:
        """Return the probability of the answer with one token restored around a layer, (samples, tokens)."""
        first, samples = max(0, layer - self.window // 2), self.noise.samples
        last = min(len(clean), layer + (self.window + 1) // 2)
        rows = torch.arange(samples * len(tokens))
        places = torch.tensor(tokens).repeat(samples)
        with self._open(len(rows)) as run:
            if starts and first > 0:
                run.skip_layers(0, first - 1, noised[first].repeat_interleave(len(tokens), 0))
            else:
                self._add_noise(run, len(tokens))
            for restored in range(first, last):
                values = self._values(run, restored).clone()
                values[rows, places] = clean[restored][places]
                getattr(run, _POINTS[self.kind])[restored] = values
            found = _next(run)[:, answer]
        return found.reshape(samples, len(tokens))

    def _values(self, run: LanguageRun, layer: int) -> torch.Tensor:
        return getattr(run, _POINTS[self.kind])[layer]

    def _add_noise(self, run: LanguageRun, times: int) -> None:
        """Add the noise of each sample to the embeddings of `times` rows."""
        embeddings = run.embed_tokens.output.clone()
        noise = self.noise.draw(run.embed_tokens.weight, len(self.subject), embeddings.shape[-1])
        noise = noise.repeat_interleave(times, 0).to(embeddings)
        embeddings[:, self.subject.start : self.subject.stop] += noise
        run.embed_tokens.output = embeddings


def trace_language(
    model: LanguageModel,
    prompt: str,
    subject: str,
    sites: Any,
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
    if model.is_encoder_decoder:
        raise InputError("causal_tracing takes a decoder, not an encoder-decoder model")
    if sites not in _POINTS:
        raise InputError(f"sites must be one of {', '.join(_POINTS)}{suggest(str(sites), _POINTS)}, not {sites!r}")
    chosen = layers_to_read(model, layers)
    if EMBEDDING in chosen:
        raise InputError('the noise is added to the embedding: choose layers without "embedding"')
    tokens = PromptTokens.of(model, model.trace(prompt, **inputs).tokens[0].tolist())
    token = None if answer is None else choose_tokens(model, answer)
    if token is not None and len(token) != 1:
        raise InputError(f"answer must be one token, not {answer!r}")
    place = tokens.span(subject)
    trace = LanguageTrace(
        model, prompt, tokens, place, sites, chosen, window, token and token[0], noise, batch_size, progress, inputs
    )
    return trace.run()


def _next(run: LanguageRun) -> torch.Tensor:
    """Return the probabilities of the next token, (rows, vocabulary)."""
    return run.next_token_probs.float().cpu()
