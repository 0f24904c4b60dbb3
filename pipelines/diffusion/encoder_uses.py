"""Find out, by comparison, which outputs of a text encoder a pipeline uses.

The pipeline encodes a prompt. Every hidden state, before and after the final norm, and every pooled vector is then
looked for in the output of `encode_prompt` and in the inputs of the denoiser and other components. Matches must be
exact, on a slice of the features and of the tokens: pipelines concatenate encoders, cut templates off, and cut or zero
padding. An output that reaches none of these places unchanged is not found.
"""

from dataclasses import dataclass
from itertools import chain, combinations

import torch
from torch.nn import functional

from diffsight.pipelines.diffusion.encoder_calls import EncoderCall, EncoderRecord
from diffsight.pipelines.diffusion.encoding import EncodingRecord, is_same
from diffsight.pipelines.standard_names import EMBEDDING, Layer

_TOKENS = 48  # how many tokens of a prompt are looked for


@dataclass(frozen=True)
class Use:
    """An output of an encoder that the pipeline uses: the hidden states of a layer, or a pooled vector.

    Attributes:
        layer: The number of the layer, where *i* is the output of `layers[i]` and "embedding" the input of the first.
            None for a pooled vector.
        normed: Whether the hidden states pass through the final norm.
        pooled: The name of a pooled vector in the encoder's output, or None.
        places: Where the output ends up, in the output of `encode_prompt` and in the inputs of components.
    """

    layer: Layer | None
    normed: bool
    pooled: str | None
    places: tuple[str, ...]

    def describe(self, count: int) -> str:
        """Return a description in words, for an encoder with `count` layers."""
        if self.layer is None:
            return f"pooled vector, {self.pooled}"
        which = {count - 1: " (the last)", count - 2: " (the last but one)"}.get(self.layer, "")
        which = "embedding" if self.layer == EMBEDDING else f"layer {self.layer}{which}"
        return f"{which}, {'through' if self.normed else 'without'} the final norm"


def find_uses(encoder: EncoderRecord, possible: "PossibleUses") -> tuple[Use, ...]:
    """Return the outputs of one encoder that the pipeline uses."""
    call = encoder.prompt
    row, uses, taken = call.rows[0], [], set()
    tokens = _telling_tokens(encoder)
    layers: list[Layer] = [EMBEDDING, *range(len(call.hidden_states) - 1)]
    states = [(layer, False, state) for layer, state in zip(layers, call.hidden_states)]
    for into, out in call.norms:
        found = [layer for layer, state in zip(layers, call.hidden_states) if is_same(into, state)]
        states += [(found[-1], True, out)] if found else []
    for layer, normed, state in states:
        found = possible.of_tokens(state[row], tokens)
        taken |= found.keys()
        uses += [Use(layer, normed, None, tuple(found.values()))] if found else []
    known: set[str] = set()
    vectors = [(name, made) for name, made in call.pooled.items()]
    vectors += [(name, functional.normalize(made, dim=-1)) for name, made in vectors]
    for name, made in vectors:
        found = {path: place for path, place in possible.of_vector(made[row]).items() if path not in taken | known}
        known |= found.keys()
        uses += [Use(None, True, name, tuple(found.values()))] if found else []
    return tuple(uses)


def _telling_tokens(encoder: EncoderRecord) -> list[int]:
    """Return the positions of the tokens to look for.

    Padding is left out, since it may be cut or zeroed, and so are the tokens at the start of a template, which are the
    same for the negative prompt."""
    call = encoder.prompt
    row = call.rows[0]
    ids = call.ids[row].tolist()
    start, stop = _padding(ids), len(ids) - _padding(ids[::-1])
    positions = range(start, stop)[-_TOKENS:]
    last = call.hidden(-1)
    others = [other.hidden(-1) for other in encoder.calls if not other.rows and other.ids.shape[1] == len(ids)]
    changed = [t for t in positions if not any(torch.equal(other[0, t], last[row, t]) for other in others)]
    return changed or list(positions)  # the negative prompt may be the prompt


def _padding(ids: list[int]) -> int:
    """Return the length of the padding at the start of some tokens: more than one of the same token."""
    length = next((place for place, token in enumerate(ids) if token != ids[0]), len(ids))
    return length if length > 1 else 0


class PossibleUses:
    """The tensors in which the outputs of encoders may end up, by path."""

    def __init__(self, record: EncodingRecord) -> None:
        self.tensors = {path: tensor for path, tensor in record.tensors.items() if tensor.ndim}
        calls = [encoder.prompt for encoder in record.encoders.values()]
        widths = list(chain(*map(_widths, calls)))
        self._sums = {sum(some) for n in range(len(widths) + 1) for some in combinations(widths, n)}

    def of_tokens(self, state: torch.Tensor, tokens: list[int]) -> dict[str, str]:
        """Return where a hidden state, `(tokens, features)`, is found: path to a description of the place.

        At least two tokens must be found there, since a single match may be a pooled vector."""
        found = {}
        for path, tensor in self.tensors.items():
            for start in self._starts(tensor, state.shape[-1]):
                hits = {tokens[number]: row for number, row in _find(state[tokens], tensor, start).items()}
                if len(hits) > 1:
                    last = max(hits)
                    shift = hits[last] % tensor.shape[-2] - last if tensor.ndim > 1 else 0
                    place = path + _sliced(tensor, start, state.shape[-1])
                    found[path] = f"{found[path]}, {place}" if path in found else place + _shifted(shift)
        return found

    def of_vector(self, vector: torch.Tensor) -> dict[str, str]:
        """Return where a vector, `(features,)`, is found."""
        found = {}
        for path, tensor in self.tensors.items():
            for start in self._starts(tensor, len(vector)):
                if _find(vector[None], tensor, start):
                    found[path] = path + _sliced(tensor, start, len(vector))
        return found

    def _starts(self, tensor: torch.Tensor, width: int) -> list[int]:
        """Return the features at which a hidden state may begin, next to other encoders or layers."""
        room = tensor.shape[-1] - width
        return sorted({start for start in self._sums | {*range(0, room + 1, width)} if start <= room})


def _widths(call: EncoderCall) -> set[int]:
    return {tensor.shape[-1] for tensor in (*call.hidden_states[:1], *call.pooled.values())}


def _find(vectors: torch.Tensor, tensor: torch.Tensor, start: int) -> dict[int, int]:
    """Return for each vector that is found the index of the first row of `tensor` that holds it from feature `start`
    on. Zeros are not looked for."""
    rows = tensor.reshape(-1, tensor.shape[-1])[:, start : start + vectors.shape[-1]]
    vectors, found = vectors.to(rows), {}
    near = rows[:, 0] == vectors[:, :1]  # (vectors, rows)
    for number in near.any(1).nonzero().flatten().tolist():
        here = near[number].nonzero().flatten()
        here = here[(rows[here] == vectors[number]).all(-1)]
        if len(here) and bool(vectors[number].any()):
            found[number] = int(here[0])
    return found


def _sliced(tensor: torch.Tensor, start: int, width: int) -> str:
    return "" if tensor.shape[-1] == width else f"[..., {start}:{start + width}]"


def _shifted(shift: int) -> str:
    if shift == 0:
        return ""
    return f" from token {shift} on" if shift > 0 else f" without the first {-shift} tokens"
