"""Hidden states read as predictions: what the lenses for language have in common.

reader = Reader(model, top_k=5, tokens=(7,), keep_logits=False)
reader.add(hidden)                          # (rows, features), layer after layer
reader.take(layers=12)["probabilities"]     # (layers, rows a layer, 5)
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from diffsight.lenses.tokens.batches import Batch
from diffsight.lenses.tokens.predictions import LensPredictions
from diffsight.pipelines.language.model import LanguageModel
from diffsight.pipelines.standard_names import embeddings

_CHUNK = 2**23  # numbers over the vocabulary that are held at a time


class Reader:
    """Reads hidden states (or logits) as predictions, without holding them over the whole vocabulary for longer than
    a chunk."""

    def __init__(self, model: LanguageModel, top_k: int, tokens: tuple[int, ...], keep_logits: bool) -> None:
        self._model, self._top_k, self._tokens, self._keep_logits = model, top_k, list(tokens), keep_logits
        words = getattr(embeddings(model._owner), "num_embeddings", None) or 2**16
        self._limit = max(1, _CHUNK // words)
        self._waiting: list[torch.Tensor] = []
        self._read: dict[str, list[torch.Tensor]] = {}

    def add(self, hidden: torch.Tensor) -> None:
        """Hidden states as a layer gives them, one a row, (rows, features)."""
        self._waiting.append(hidden)
        if sum(map(len, self._waiting)) >= self._limit:
            self._flush()

    def add_logits(self, logits: torch.Tensor) -> None:
        """Logits, (rows, vocabulary)."""
        logits = logits.float()
        top = logits.topk(self._top_k)
        total = logits.logsumexp(-1, keepdim=True)
        self._keep("ids", top.indices)
        self._keep("probabilities", (top.values - total).exp())
        if self._tokens:
            self._keep("token_probabilities", (logits[:, self._tokens] - total).exp())
        if self._keep_logits:
            self._keep("logits", logits)

    def take(self, layers: int) -> dict[str, torch.Tensor]:
        """What was read since the last time, each (layers, rows a layer, ...), on the CPU."""
        self._flush()
        found = {name: torch.cat(parts).unflatten(0, (layers, -1)) for name, parts in self._read.items()}
        self._read.clear()
        return found

    def _flush(self) -> None:
        if not self._waiting:
            return
        rows = torch.cat(self._waiting) if len(self._waiting) > 1 else self._waiting[0]
        self._waiting.clear()
        layout = self._model.hidden_layout
        for chunk in rows.split(self._limit):
            self.add_logits(self._model.project_on_vocab(layout.as_given(chunk[:, None]))[:, 0])

    def _keep(self, name: str, values: torch.Tensor) -> None:
        self._read.setdefault(name, []).append(values.cpu())


@dataclass(frozen=True)
class Sources:
    """What a lens looks at: prompts, and of their tokens the chosen positions, as `LensPredictions` has them."""

    prompts: tuple[str, ...]
    positions: torch.Tensor
    inputs: tuple[tuple[str, ...], ...]

    @classmethod
    def of(cls, model: LanguageModel, batches: list[Batch]) -> "Sources":
        spell = Spelling(model)
        prompts, inputs = [], []
        for batch in batches:
            tokens = batch.run.tokens.cpu()
            mask = torch.ones_like(tokens) if batch.run.mask is None else batch.run.mask.cpu()
            for row, real, read, where, chosen in zip(
                tokens, mask.bool(), batch.tokens.cpu(), batch.where, batch.chosen
            ):
                prompts.append(spell.text(row[real].tolist()))
                inputs.append(tuple(map(spell, read[where[chosen]].tolist())))
        return cls(tuple(prompts), joined([batch.positions for batch in batches], 1), tuple(inputs))


def predictions(
    lens: str,
    model: LanguageModel,
    layers: tuple[int, ...],
    tokens: tuple[int, ...],
    sources: Sources,
    read: Mapping[str, torch.Tensor],
) -> LensPredictions:
    """The result, of what a reader has read: each (prompts, layers, positions, ...)."""
    spell = Spelling(model)
    ids = {*read["ids"].flatten().tolist(), *tokens} - {-1}
    texts = {token: spell(token) for token in sorted(ids)}
    return LensPredictions(lens, name_of(model), layers=layers, tokens=tokens, texts=texts, **vars(sources), **read)


def joined(parts: list[torch.Tensor], dim: int) -> torch.Tensor:
    """Parts of different length along `dim`, one below the other: padded with NaN, or -1."""
    longest = max(part.shape[dim] for part in parts)
    padded = []
    for part in parts:
        shape = [*part.shape]
        shape[dim] = longest - shape[dim]
        fill: Any = torch.nan if part.is_floating_point() else -1
        padded.append(torch.cat([part, torch.full(shape, fill, dtype=part.dtype)], dim) if shape[dim] else part)
    return torch.cat(padded)


class Spelling:
    """Token ids as text; their numbers, where the model has no tokenizer."""

    def __init__(self, model: LanguageModel) -> None:
        self._tokenizer = model.tokenizer
        self._known: dict[int, str] = {}

    def __call__(self, token: int) -> str:
        if token not in self._known:
            self._known[token] = self._spelt(token)
        return self._known[token]

    def text(self, ids: list[int]) -> str:
        if self._tokenizer is None:
            return " ".join(map(str, ids))
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def _spelt(self, token: int) -> str:
        if self._tokenizer is None:
            return str(token)
        text = self._tokenizer.decode([token])
        piece = self._tokenizer.convert_ids_to_tokens(token) or ""
        return f" {text}" if piece.startswith("▁") and not text.startswith(" ") else text  # a space that decode drops


def name_of(model: LanguageModel) -> str:
    """What a model is called in a record."""
    source = getattr(model._owner.config, "name_or_path", "")
    return f"{type(model._owner).__name__}{f' ({Path(source).name})' if source else ''}"
