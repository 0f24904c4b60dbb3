"""The text encoders of a pipeline: which encode the prompt, where their layers are, what the pipeline takes from them.

    print(model.encoders)                   # all that was found
    encoder = model.encoders["text_encoder_2"]      # an Encoder; model.encoders.choose(name) explains a wrong name
    encoder.layers, encoder.ln_final        # paths: "text_encoder_2.text_model.encoder.layers", …
    encoder.tokenizer                       # "tokenizer_2"
    encoder.states                          # (31,): the hidden states that the pipeline takes, of 0 to encoder.count
    encoder.uses[0].places                  # ("encode_prompt[0][..., 768:2048]", "unet.encoder_hidden_states[..., …")

    encoded = encode(model, "a red circle")["text_encoder"]
    encoded.states[4]                       # (tokens, features), what layer 4 gives for the prompt; 0: the embedding
    encoded.ids, encoded.words              # (tokens,), and each as text
    encoded.pooled                          # {"pooler_output": (features,)}

Nothing is looked up by the name of a pipeline. The pipeline encodes a prompt, and every hidden state, with and without
the final norm, and every pooled vector is looked for in what `encode_prompt` returned and in what the denoiser and
other components are given: exactly, as a slice of the features and of the tokens, since pipelines put encoders side by
side, cut templates off, and cut or blank padding. What reaches none of them as it is was not found.
"""

import html
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain, combinations
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from diffsight.errors import InputError, suggest
from diffsight.extending import owner_of, tree_of
from diffsight.pipelines.diffusion.encoding import Call, EncoderReading, Reading, read

if TYPE_CHECKING:
    from diffsight.pipelines.diffusion.model import DiffusionModel

_TOKENS = 48  # of a prompt are looked for


@dataclass(frozen=True)
class Use:
    """Something of an encoder that the pipeline takes: a hidden state, or a pooled vector.

    `state` is its number, where 0 is the embedding, k what layer k gives; None for a pooled vector, whose name in the
    encoder's output `pooled` is. `normed` says whether it comes through the final norm. `places` are where it ends up:
    in what `encode_prompt` returns, and in what components are given."""

    state: int | None
    normed: bool
    pooled: str | None
    places: tuple[str, ...]

    def describe(self, count: int) -> str:
        """In words, for an encoder of `count` layers."""
        if self.state is None:
            return f"pooled vector, {self.pooled}"
        which = {0: "the embedding", count: "the last", count - 1: "the last but one"}.get(self.state)
        which = f"hidden state {self.state} of {count}" + (f" ({which})" if which else "")
        return f"{which}, {'through' if self.normed else 'without'} the final norm"


@dataclass(frozen=True)
class Encoder:
    """A text encoder. `layers` and `ln_final` are the real paths of its list of layers and of the norm behind them,
    `count` is the number of layers, `width` that of a token's features; `tokenizer` names the component that gives it
    its tokens. None is what was not found."""

    name: str
    kind: str
    layers: str
    count: int
    width: int
    ln_final: str | None
    tokenizer: str | None
    uses: tuple[Use, ...]

    @property
    def states(self) -> tuple[int, ...]:
        """The numbers of the hidden states that the pipeline takes, token by token."""
        return tuple(use.state for use in self.uses if use.state is not None)

    @property
    def raw_states(self) -> tuple[int, ...]:
        """Those of them that do not come through the final norm."""
        return tuple(use.state for use in self.uses if use.state is not None and not use.normed)

    @property
    def pooled(self) -> str | None:
        """The pooled vector that it takes, by its name in the encoder's output."""
        return next((use.pooled for use in self.uses if use.pooled is not None), None)

    @property
    def last(self) -> int:
        """The number of the last layer that the pipeline makes use of: what comes behind is never seen."""
        return self.count if self.pooled is not None or not self.states else max(self.states)

    def __str__(self) -> str:
        tokens = f", tokens from {self.tokenizer}" if self.tokenizer else ""
        lines = [f"{self.name}: {self.kind}, {self.count} layers, {self.width} features{tokens}"]
        norm = f", final norm {self.ln_final}" if self.ln_final else ", no final norm"
        lines.append(f"  layers {self.layers}{norm}")
        for use in self.uses:
            lines += [f"  {use.describe(self.count)}", *(f"    -> {place}" for place in use.places)]
        if not self.uses:
            lines.append("  nothing of it was found as it is in what the pipeline goes on with")
        return "\n".join(lines)


class Encoders(Mapping[str, Encoder]):
    """The text encoders of a pipeline, by name; `print` it to read what was found."""

    def __init__(self, pipeline: str, encoders: Mapping[str, Encoder]) -> None:
        self._pipeline, self._encoders = pipeline, dict(encoders)

    def choose(self, name: str | None = None) -> Encoder:
        """The encoder called `name`; for None the first whose hidden states the pipeline takes, else the first.

        Raises InputError where there is no such encoder, with those that there are."""
        if not self:
            raise InputError(f"{self._pipeline} has no text encoder, so there is nothing to look through")
        if name is None:
            return next((encoder for encoder in self.values() if encoder.states), next(iter(self.values())))
        if name not in self:
            raise InputError(
                f"{self._pipeline} has no text encoder {name!r}{suggest(str(name), self)}: it has {', '.join(self)}"
            )
        return self[name]

    def __getitem__(self, name: str) -> Encoder:
        return self._encoders[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._encoders)

    def __len__(self) -> int:
        return len(self._encoders)

    def __repr__(self) -> str:
        found = "\n".join(map(str, self.values())) or "no text encoder"
        return f"{self._pipeline}\n{found}"

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{name}</th>" for name in ("encoder", "layers", "takes", "which ends up in"))
        rows = []
        for encoder in self.values():
            for use in encoder.uses or (None,):
                takes = "nothing that was found" if use is None else use.describe(encoder.count)
                places = () if use is None else use.places
                cells = (
                    f"{encoder.name}\n{encoder.kind}",
                    f"{encoder.count} layers of {encoder.width} features",
                    takes,
                    "\n".join(places),
                )
                rows.append("".join(f"<td>{html.escape(cell).replace(chr(10), '<br>')}</td>" for cell in cells))
        body = "".join(f"<tr>{row}</tr>" for row in rows)
        return f"<table><caption>{html.escape(self._pipeline)}</caption><tr>{head}</tr>{body}</table>"


@dataclass(frozen=True)
class Encoded:
    """A prompt as one text encoder encodes it.

    `ids` are its tokens, (tokens,); `states[k]` its hidden states, (tokens, features), where 0 is the embedding, k what
    layer k gives; `normed` what the final norm makes of the last, if it has one; `pooled` the vectors it returns."""

    encoder: str
    prompt: str
    ids: torch.Tensor
    words: tuple[str, ...]
    states: tuple[torch.Tensor, ...] = field(repr=False)
    normed: torch.Tensor | None = field(repr=False)
    pooled: Mapping[str, torch.Tensor] = field(repr=False)


def find_encoders(model: "DiffusionModel", prompt: str | None = None, **arguments: Any) -> Encoders:
    """The text encoders of `model`, and what it takes of them in a call with these arguments; without a prompt, in a
    call with its defaults.

    Raises InputError where a pipeline cannot be called with its defaults."""
    return encoders_in(model, read(model, prompt, arguments))


def encoders_in(model: "DiffusionModel", reading: Reading) -> Encoders:
    """The text encoders of `model`, from what was read of them."""
    places = _Places(reading)
    found = {name: _describe(model, encoder, places) for name, encoder in reading.encoders.items()}
    return Encoders(type(model.pipeline).__name__, found)


def encode(model: "DiffusionModel", prompt: str, **arguments: Any) -> dict[str, Encoded]:
    """`prompt` as every text encoder of `model` encodes it, by the encoder's name. `arguments` are those of the
    pipeline, which runs up to its denoiser.

    Raises InputError for an empty prompt and one that is too long for every tokenizer."""
    return encoded_in(model, prompt, read(model, prompt, arguments))


def encoded_in(model: "DiffusionModel", prompt: str, reading: Reading) -> dict[str, Encoded]:
    """The same, from what was read of the prompt."""
    encoded = {}
    for name, encoder in reading.encoders.items():
        call = encoder.prompt
        row = call.rows[0]
        normed = next((out[row] for into, out in call.norms if _is_same(into, call.states[-1])), None)
        encoded[name] = Encoded(
            name,
            prompt,
            call.ids[row],
            _words(model, encoder, call.ids[row]),
            tuple(state[row] for state in call.states),
            normed,
            {key: vectors[row] for key, vectors in call.pooled.items()},
        )
    return encoded


def _words(model: "DiffusionModel", encoder: EncoderReading, ids: torch.Tensor) -> tuple[str, ...]:
    """Each token as text."""
    tokenizer = getattr(model.pipeline, encoder.tokenizer) if encoder.tokenizer else None
    return () if tokenizer is None else tuple(tokenizer.decode([i]) for i in ids.tolist())


def cut_off(model: "DiffusionModel", encoder: EncoderReading, prompt: str) -> str | None:
    """What the encoder's tokenizer cuts off the end of the prompt, as text; None where it takes all of it."""
    if encoder.tokenizer is None:
        return None
    tokenizer = getattr(model.pipeline, encoder.tokenizer)
    ids = encoder.prompt.ids[encoder.prompt.rows[0]].tolist()
    texts = dict.fromkeys((prompt, prompt.lower().strip()))  # some pipelines clean it
    contents = [tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in texts]
    if any(ids[at : at + len(content)] == content for content in contents for at in range(len(ids))):
        return None
    # What was read ends with the first tokens of the prompt, and one or two of the tokenizer's own: there was no room
    # for more. A few tokens may be alike by chance.
    special, enough = set(tokenizer.all_special_ids), min(8, len(ids) // 2)
    for content in contents:
        for end in (len(ids), len(ids) - 1, len(ids) - 2):
            for taken in range(min(len(content), end), enough - 1, -1):
                if ids[end - taken : end] == content[:taken] and special.issuperset(ids[end:]):
                    return tokenizer.decode(content[taken:])
    return None


# ---- what the pipeline takes


def _describe(model: "DiffusionModel", encoder: EncoderReading, places: "_Places") -> Encoder:
    name, call = encoder.name, encoder.prompt
    module = owner_of(model[name])
    names = tree_of(model).names_of(module)
    return Encoder(
        name,
        type(module).__name__,
        f"{name}.{names['layers']}",
        len(call.states) - 1,
        call.states[0].shape[-1],
        f"{name}.{names['ln_final']}" if "ln_final" in names else None,
        encoder.tokenizer,
        _uses(encoder, places),
    )


def _uses(encoder: EncoderReading, places: "_Places") -> tuple[Use, ...]:
    call = encoder.prompt
    row, uses, taken = call.rows[0], [], set()
    tokens = _telling(encoder)
    states = [(number, False, state) for number, state in enumerate(call.states)]
    for into, out in call.norms:
        number = next((n for n, state in reversed(list(enumerate(call.states))) if _is_same(into, state)), None)
        states += [] if number is None else [(number, True, out)]
    for number, normed, state in states:
        found = places.of_tokens(state[row], tokens)
        taken |= found.keys()
        uses += [Use(number, normed, None, tuple(found.values()))] if found else []
    known: set[str] = set()
    vectors = [(name, made) for name, made in call.pooled.items()]
    vectors += [(name, functional.normalize(made, dim=-1)) for name, made in vectors]
    for name, made in vectors:
        found = {path: place for path, place in places.of_vector(made[row]).items() if path not in taken | known}
        known |= found.keys()
        uses += [Use(None, True, name, tuple(found.values()))] if found else []
    return tuple(uses)


def _telling(encoder: EncoderReading) -> list[int]:
    """The places of tokens to look for: no padding, which may be cut off or blanked, nor what a template begins with,
    which is the same for the negative prompt."""
    call = encoder.prompt
    row = call.rows[0]
    ids = call.ids[row].tolist()
    start, stop = _run(ids), len(ids) - _run(ids[::-1])
    places = range(start, stop)[-_TOKENS:]
    last = call.states[-1]
    others = [other.states[-1] for other in encoder.calls if not other.rows and other.ids.shape[1] == len(ids)]
    changed = [t for t in places if not any(torch.equal(other[0, t], last[row, t]) for other in others)]
    return changed or list(places)  # the negative prompt may be the prompt


def _run(ids: list[int]) -> int:
    """The length of the padding that some tokens begin with: more than one of the same."""
    length = next((place for place, token in enumerate(ids) if token != ids[0]), len(ids))
    return length if length > 1 else 0


def _is_same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a, b)


class _Places:
    """What becomes of the states: the tensors to look for them in, by path, each as rows of features."""

    def __init__(self, reading: Reading) -> None:
        self.parts = {path: tensor for path, tensor in reading.parts.items() if tensor.ndim}
        widths = [{s.shape[-1] for s in (*c.states[:1], *c.pooled.values())} for c in _prompt_calls(reading)]
        widths = list(chain(*widths))
        self._sums = {sum(some) for n in range(len(widths) + 1) for some in combinations(widths, n)}

    def of_tokens(self, state: torch.Tensor, tokens: list[int]) -> dict[str, str]:
        """Where a hidden state, (tokens, features), is found: path to place in words. At least two tokens must be
        there, since a pooled vector is one."""
        found = {}
        for path, part in self.parts.items():
            for start in self._starts(part, state.shape[-1]):
                hits = {t: at for t in tokens if (at := _find(state[t], part, start)) is not None}
                if len(hits) > 1:
                    last = max(hits)
                    shift = hits[last] % part.shape[-2] - last if part.ndim > 1 else 0
                    place = path + _sliced(part, start, state.shape[-1])
                    found[path] = f"{found[path]}, {place}" if path in found else place + _shifted(shift)
        return found

    def of_vector(self, vector: torch.Tensor) -> dict[str, str]:
        """The same for a vector, (features,)."""
        found = {}
        for path, part in self.parts.items():
            for start in self._starts(part, len(vector)):
                if _find(vector, part, start) is not None:
                    found[path] = path + _sliced(part, start, len(vector))
        return found

    def _starts(self, part: torch.Tensor, width: int) -> list[int]:
        """The features at which a state may begin: beside other encoders, or other layers."""
        room = part.shape[-1] - width
        return sorted({start for start in self._sums | {*range(0, room + 1, width)} if start <= room})


def _prompt_calls(reading: Reading) -> list[Call]:
    return [encoder.prompt for encoder in reading.encoders.values()]


def _find(vector: torch.Tensor, part: torch.Tensor, start: int) -> int | None:
    """The number of the first row of `part` that holds `vector` from feature `start` on."""
    rows = part.reshape(-1, part.shape[-1])[:, start : start + len(vector)]
    vector = vector.to(rows)
    here = (rows[:, 0] == vector[0]).nonzero().flatten()
    here = here[(rows[here] == vector).all(-1)]
    return int(here[0]) if len(here) and bool(vector.any()) else None


def _sliced(part: torch.Tensor, start: int, width: int) -> str:
    return "" if part.shape[-1] == width else f"[..., {start}:{start + width}]"


def _shifted(shift: int) -> str:
    if shift == 0:
        return ""
    return f" from token {shift} on" if shift > 0 else f" without the first {-shift} tokens"
