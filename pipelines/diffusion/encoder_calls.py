"""Record the calls of one text encoder while a pipeline encodes a prompt.

record = follow_encoder(run, "text_encoder", tokenized)     # before the run starts; filled while it runs
call = record.prompt                    # the call that encodes the prompt; others encode the negative prompt
call.hidden(4)[call.rows[0]]            # the output of layers[4] for it, (tokens, features)
call.hidden("embedding")                # the input of the first layer, (rows, tokens, features)
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from diffsight.extending import Run, first_input, flow_of, model_of, owner_of
from diffsight.pipelines.diffusion.batch_layouts import COND
from diffsight.pipelines.diffusion.components import component_names
from diffsight.pipelines.standard_names import EMBEDDING, Layer, word_embeddings


@dataclass(eq=False)
class EncoderCall:
    """One call of a text encoder.

    Attributes:
        ids: Token ids as the word embedding receives them, `(rows, tokens)`.
        rows: The rows that are known to hold the prompt.
        hidden_states: The input of the first layer, then the output of each layer, `(rows, tokens, features)`, numbered
            as in transformers. `hidden` takes layer numbers.
        returned: The return value of each layer, a tensor or a tuple that contains tensors.
        norms: The input and the output of each call of the final norm.
        output: The return value of the whole encoder.
        pooled: Pooled vectors, `(rows, features)`, by name.
    """

    ids: torch.Tensor
    rows: list[int] = field(default_factory=list)
    hidden_states: list[torch.Tensor] = field(default_factory=list, repr=False)
    returned: list[Any] = field(default_factory=list, repr=False)
    norms: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list, repr=False)
    output: Any = field(default=None, repr=False)
    pooled: dict[str, torch.Tensor] = field(default_factory=dict, repr=False)

    def hidden(self, layer: Layer) -> torch.Tensor:
        """Return the output of `layers[layer]`, or for "embedding" the input of the first layer.

        The shape is `(rows, tokens, features)`."""
        return self.hidden_states[0] if layer == EMBEDDING else self.hidden_states[1:][layer]


@dataclass(eq=False)
class EncoderRecord:
    """The calls of one text encoder.

    Attributes:
        name: The name of the component.
        words: The path of its word embedding.
        tokenizer: The name of the component that produces its tokens.
        calls: Its calls, in order.
    """

    name: str
    words: str | None = None
    tokenizer: str | None = None
    calls: list[EncoderCall] = field(default_factory=list)

    @property
    def prompt(self) -> EncoderCall:
        """The first call that holds the prompt."""
        return next((call for call in self.calls if call.rows), self.calls[0])


@dataclass(frozen=True)
class PromptCall:
    """Where in a run a text encoder encodes the prompt.

    Attributes:
        words: The path of the word embedding that receives the token ids.
        number: The number of the call, of the word embedding and of everything after it.
        row: The first row that holds the prompt.
        shape: The shape of the token ids, `(rows, tokens)`.
    """

    words: str
    number: int
    row: int
    shape: tuple[int, int]

    @classmethod
    def of(cls, record: EncoderRecord) -> "PromptCall | None":
        """Return the call for the prompt in a record.

        Return None if the record does not show it, or if the calls of the layers are numbered differently."""
        call, number = record.prompt, record.calls.index(record.prompt)
        states = {len(other.hidden_states) for other in record.calls[: number + 1]}
        if record.words is None or not call.rows or len(states) > 1:
            return None
        return cls(record.words, number, call.rows[0], tuple(call.ids.shape))


def follow_tokens(run: Run, name: str, tokenized: list[tuple[str, list | None]]) -> EncoderRecord:
    """Record only the token ids of the calls of a text encoder in a run that has not started, see `follow_encoder`."""
    return _following_tokens(run, name, tokenized).record


def follow_encoder(run: Run, name: str, tokenized: list[tuple[str, list | None]]) -> EncoderRecord:
    """Record the calls of a text encoder in a run that has not started.

    Args:
        run: The run of a pipeline.
        name: The name of the component.
        tokenized: The names of the tokenizers called so far, with the token ids that they returned. It is filled during
            the run.
    """
    recorder = _following_tokens(run, name, tokenized)
    encoder = owner_of(model_of(run)[name])
    names = component_names(encoder)
    layers = run[name].layers
    run.follow(f"{name}.{names['layers']}.0.inputs", recorder.enter_first_layer)
    for layer in layers:
        run.follow(f"{layer.path}.output", recorder.leave_layer)
    if "ln_final" in names:
        run.follow(f"{name}.ln_final.inputs", recorder.enter_norm)
        run.follow(f"{name}.ln_final.output", recorder.leave_norm)
    for child, part in encoder.named_children():
        if type(part).forward is not nn.Module.forward:
            run.follow(f"{name}.{child}.output", partial(recorder.leave_child, child))
    run.follow(f"{name}.output", recorder.end)
    return recorder.record


def _following_tokens(run: Run, name: str, tokenized: list[tuple[str, list | None]]) -> "_Recorder":
    encoder = owner_of(model_of(run)[name])
    recorder = _Recorder(run, name, encoder, tokenized)
    for words in word_embeddings(encoder):
        path = f"{name}.{words}"
        run.follow(f"{path}.inputs", partial(recorder.begin, path))
    return recorder


class _Recorder:
    """Fills the record of one text encoder."""

    def __init__(self, run: Run, name: str, encoder: nn.Module, tokenized: list[tuple[str, list | None]]) -> None:
        self.record = EncoderRecord(name)
        self._layouts, self._encoder, self._tokenized = flow_of(run).observer, encoder, tokenized
        self._into_norm: list[torch.Tensor] = []

    @property
    def _call(self) -> EncoderCall | None:
        return self.record.calls[-1] if self.record.calls else None

    def begin(self, words: str, inputs: tuple) -> None:
        record, ids = self.record, first_input(inputs, self.record.name)
        if not isinstance(ids, torch.Tensor) or ids.is_floating_point() or ids.ndim != 2:
            return
        record.words = words
        call = EncoderCall(ids.detach().clone())
        known = self._layouts.entries(self._encoder, COND) if self._layouts is not None else None
        call.rows = known if known is not None else [] if record.calls else list(range(len(ids)))
        record.calls.append(call)
        if record.tokenizer is None:
            record.tokenizer = next((name for name, rows in self._tokenized if rows == ids.tolist()), None)

    def enter_first_layer(self, inputs: tuple) -> None:
        if self._call:
            self._call.hidden_states.append(_copied(first_input(inputs, self.record.name)))

    def leave_layer(self, output: Any) -> None:
        if self._call:
            self._call.returned.append(_copied(output))
            self._call.hidden_states.append(hidden_in(self._call.returned[-1]))

    def enter_norm(self, inputs: tuple) -> None:
        self._into_norm.append(_copied(first_input(inputs, self.record.name)))

    def leave_norm(self, output: torch.Tensor) -> None:
        if self._call:
            self._call.norms.append((self._into_norm.pop(), _copied(output)))

    def leave_child(self, child: str, output: Any) -> None:
        if self._call:
            vectors = [v for v in _vectors(output).values() if len(v) == len(self._call.ids)]
            self._call.pooled |= {child: vectors[0]} if vectors else {}

    def end(self, output: Any) -> None:
        if self._call:
            self._call.output = _copied(output)
            self._call.pooled = _vectors(output) | self._call.pooled


def hidden_in(returned: Any) -> torch.Tensor:
    """Return the hidden state in the return value of a layer."""
    return returned[0] if isinstance(returned, tuple) else returned


def _copied(value: Any) -> Any:
    """Return a copy, because the model may change its own tensors in place later."""
    return tree_map_only(torch.Tensor, lambda tensor: tensor.detach().clone(), value)


def _vectors(output: Any) -> dict[str, torch.Tensor]:
    """Return the tensors in the output of a module that have one vector per row, by name."""
    if isinstance(output, torch.Tensor):
        output = {"": output}
    named = output if isinstance(output, Mapping) else dict(enumerate(output if isinstance(output, tuple) else ()))
    vectors = {str(n): v for n, v in named.items() if isinstance(v, torch.Tensor) and v.ndim == 2}
    return {n: v.detach().clone() for n, v in vectors.items() if v.is_floating_point()}
