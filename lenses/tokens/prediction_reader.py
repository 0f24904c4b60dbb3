"""Reads hidden states as predictions of the next token.

reader = PredictionReader(model, top_k=5, tokens=(7,), keep_logits=False)
reader.add(hidden)                          # (rows, features), layer after layer
reader.take(layers=12)["probabilities"]     # (layers, rows of a layer, 5)
"""

import torch

from diffsight.pipelines.language.model import LanguageModel

_CHUNK = 2**23  # the number of logits that are held at a time


class PredictionReader:
    """Reads hidden states or logits as predictions. It holds logits over the whole vocabulary only chunk by chunk.

    Args:
        model: The model.
        top_k: The number of most likely tokens to keep.
        tokens: The ids of tokens whose probabilities to keep.
        keep_logits: Whether to keep all logits.
    """

    def __init__(self, model: LanguageModel, top_k: int, tokens: tuple[int, ...], keep_logits: bool) -> None:
        self._model, self._top_k, self._tokens, self._keep_logits = model, top_k, list(tokens), keep_logits
        self._limit = max(1, _CHUNK // (model.vocabulary_size or 2**16))
        self._waiting: list[torch.Tensor] = []
        self._read: dict[str, list[torch.Tensor]] = {}

    def add(self, hidden: torch.Tensor) -> None:
        """Add hidden states as a layer returns them, (rows, features). They are read when no more rows fit."""
        self._waiting.append(hidden)
        if sum(map(len, self._waiting)) + len(hidden) > self._limit:
            self._flush()

    def add_logits(self, logits: torch.Tensor) -> None:
        """Add logits, (rows, vocabulary)."""
        self._add(logits.float(), is_own=False)

    def _add(self, logits: torch.Tensor, is_own: bool) -> None:
        """Add logits. The reader's own logits are overwritten, since every pass over the vocabulary takes long."""
        top = logits.topk(self._top_k)
        chosen = logits[:, self._tokens]
        if self._keep_logits:
            self._keep("logits", logits)
        most = top.values[:, :1]
        shares = logits.sub_(most).exp_() if is_own and not self._keep_logits else (logits - most).exp_()
        total = most + shares.sum(-1, keepdim=True).log()
        self._keep("ids", top.indices)
        self._keep("probabilities", (top.values - total).exp())
        if self._tokens:
            self._keep("token_probabilities", (chosen - total).exp())

    def take(self, layers: int) -> dict[str, torch.Tensor]:
        """Return what was read since the last call, on the CPU: tensors (layers, rows of a layer, ...) by name."""
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
        for chunk in rows.chunk(-(-len(rows) // self._limit)):  # of equal size, since the head is slow on a few rows
            logits = self._model.project_on_vocab(layout.as_given(chunk[:, None]))[:, 0]
            self._add(logits.float(), is_own=True)

    def _keep(self, name: str, values: torch.Tensor) -> None:
        self._read.setdefault(name, []).append(values.cpu())
