"""The text encoders of a pipeline, and the outputs that the pipeline uses.

    print(model.encoders)                   # everything that was found
    encoder = model.encoders["text_encoder_2"]
    encoder.layers, encoder.ln_final        # paths: "text_encoder_2.text_model.encoder.layers", …
    encoder.tokenizer                       # "tokenizer_2"
    encoder.used_layers                     # (30,): the layers whose output the pipeline uses, of encoder.count
    encoder.uses[0].places                  # ("encode_prompt[0][..., 768:2048]", "unet.encoder_hidden_states[..., …")

Nothing is looked up by the name of a pipeline: `encoder_uses.py` compares the outputs of the encoders with the
tensors that the pipeline uses afterwards. `standard_names.py` finds where the layers of an encoder are.
"""

import html
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from diffsight.errors import InputError, UnknownKeyError, suggest
from diffsight.extending import Model, owner_of, unwrapped
from diffsight.pipelines.diffusion.components import component_names
from diffsight.pipelines.diffusion.encoder_calls import EncoderRecord, PromptCall
from diffsight.pipelines.diffusion.encoder_uses import PossibleUses, Use, find_uses
from diffsight.pipelines.diffusion.encoding import EncodingRecord, record_encoding
from diffsight.pipelines.standard_names import EMBEDDING, Layer


@dataclass(frozen=True)
class Encoder:
    """A text encoder. Attributes that were not found are None.

    Attributes:
        name: The name of the component.
        kind: The name of its class.
        layers: The real path of its list of layers.
        count: The number of layers.
        width: The number of features of a token.
        ln_final: The real path of the norm after the layers.
        tokenizer: The name of the component that produces its tokens.
        uses: The outputs that the pipeline uses.
        prompt_call: Its call that encodes the prompt.
    """

    name: str
    kind: str
    layers: str
    count: int
    width: int
    ln_final: str | None
    tokenizer: str | None
    uses: tuple[Use, ...]
    prompt_call: PromptCall | None = None

    @property
    def used_layers(self) -> tuple[Layer, ...]:
        """The layers whose hidden states the pipeline uses, token by token.

        *i* is the output of `layers[i]`, and "embedding" the input of the first layer."""
        return tuple(use.layer for use in self.uses if use.layer is not None)

    @property
    def unnormed_layers(self) -> tuple[Layer, ...]:
        """The used layers whose output does not pass through the final norm."""
        return tuple(use.layer for use in self.uses if use.layer is not None and not use.normed)

    @property
    def last_used_layer(self) -> Layer:
        """The last layer that the pipeline uses. Later layers have no effect."""
        if self.pooled is not None or not self.used_layers:
            return self.count - 1
        return max(self.used_layers, key=lambda layer: -1 if layer == EMBEDDING else layer)

    @property
    def used_count(self) -> int:
        """The number of layers up to the last one that the pipeline uses. 0 if it only uses the embedding."""
        return 0 if self.last_used_layer == EMBEDDING else self.last_used_layer + 1

    @property
    def pooled(self) -> str | None:
        """The pooled vector that the pipeline uses, by its name in the encoder's output."""
        return next((use.pooled for use in self.uses if use.pooled is not None), None)

    def __str__(self) -> str:
        tokens = f", tokens from {self.tokenizer}" if self.tokenizer else ""
        lines = [f"{self.name}: {self.kind}, {self.count} layers, {self.width} features{tokens}"]
        norm = f", final norm {self.ln_final}" if self.ln_final else ", no final norm"
        lines.append(f"  layers {self.layers}{norm}")
        for use in self.uses:
            lines += [f"  {use.describe(self.count)}", *(f"    -> {place}" for place in use.places)]
        if not self.uses:
            lines.append("  none of its outputs was found unchanged in what the pipeline uses")
        return "\n".join(lines)


class Encoders(Mapping[str, Encoder]):
    """The text encoders of a pipeline, by name. `print` it to see what was found."""

    def __init__(self, pipeline: str, encoders: Mapping[str, Encoder]) -> None:
        self._pipeline, self._encoders = pipeline, dict(encoders)

    def choose(self, name: str | None = None) -> Encoder:
        """Return the encoder called `name`.

        None selects the first encoder whose hidden states the pipeline uses, or else the first encoder.

        Raises:
            InputError: There is no such encoder. The message lists the existing encoders.
        """
        if not self:
            raise InputError(f"{self._pipeline} has no text encoder, so there is nothing to look through")
        if name is None:
            return next((encoder for encoder in self.values() if encoder.used_layers), next(iter(self.values())))
        return self[name]

    def __getitem__(self, name: str) -> Encoder:
        if not isinstance(name, str) or name not in self._encoders:
            known = ", ".join(self) or "none"
            raise UnknownKeyError(
                f"{self._pipeline} has no text encoder {name!r}{suggest(str(name), self)}: it has {known}"
            )
        return self._encoders[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._encoders)

    def __len__(self) -> int:
        return len(self._encoders)

    def __repr__(self) -> str:
        found = "\n".join(map(str, self.values())) or "no text encoder"
        return f"{self._pipeline}\n{found}"

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{name}</th>" for name in ("encoder", "layers", "what is used", "where it ends up"))
        rows = []
        for encoder in self.values():
            for use in encoder.uses or (None,):
                cells = (
                    f"{encoder.name}\n{encoder.kind}",
                    f"{encoder.count} layers of {encoder.width} features",
                    "nothing was found" if use is None else use.describe(encoder.count),
                    "" if use is None else "\n".join(use.places),
                )
                rows.append("".join(f"<td>{html.escape(cell).replace(chr(10), '<br>')}</td>" for cell in cells))
        body = "".join(f"<tr>{row}</tr>" for row in rows)
        return f"<table><caption>{html.escape(self._pipeline)}</caption><tr>{head}</tr>{body}</table>"


def find_encoders(model: Model, prompt: str | None = None, **arguments: Any) -> Encoders:
    """Return the text encoders of a `DiffusionModel`, and the outputs that it uses.

    Args:
        model: The model.
        prompt: The prompt of the observed call. None stands for a call with defaults.
        arguments: Other arguments of the observed call.

    Raises:
        InputError: The pipeline cannot be called with its defaults.
    """
    return encoders_in(model, record_encoding(model, prompt, arguments))


def encoders_in(model: Model, record: EncodingRecord) -> Encoders:
    """Return the text encoders of a `DiffusionModel`, found in a record of an encoding."""
    possible = PossibleUses(record)
    found = {name: _encoder(model, encoder, possible) for name, encoder in record.encoders.items()}
    return Encoders(type(model.pipeline).__name__, found)


def _encoder(model: Model, record: EncoderRecord, possible: PossibleUses) -> Encoder:
    name, call = record.name, record.prompt
    module = owner_of(model[name])
    names = component_names(module)
    return Encoder(
        name,
        type(unwrapped(module)).__name__,
        f"{name}.{names['layers']}",
        len(call.returned),
        call.hidden_states[0].shape[-1],
        f"{name}.{names['ln_final']}" if "ln_final" in names else None,
        record.tokenizer,
        find_uses(record, possible),
        PromptCall.of(record),
    )
