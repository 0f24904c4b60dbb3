"""What the lenses for language share: which layers, positions and tokens are meant, and the prompts in batches.

    layers = choose_layers(model, range(0, 12, 3))
    for batch in open_batches(model, ["The cat", "The Eiffel Tower is in"], positions=-1, size=32):
        with batch.run as run:
            hidden = batch.pick(run.layers_output[5])       # (2, features): the last token of each prompt

Everything is checked before the first of them runs.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import index
from typing import Any

import torch

from diffsight.errors import InputError
from diffsight.pipelines.language.model import LanguageModel, LanguageRun
from diffsight.pipelines.standard_names import embeddings

Layers = int | slice | Iterable[int] | None
Positions = int | slice | Sequence[int] | Sequence[Sequence[int]] | torch.Tensor | None
Tokens = str | int | Iterable[str | int] | None
_BY_PROMPT = ("images", "decoder_input_ids")


def choose(
    lens: str, model: Any, layers: Layers, tokens: Tokens, top_k: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The layers and the token ids that a lens reads; whether it can, and there are `top_k` tokens."""
    check_model(model, lens)
    check_count("top_k", top_k, getattr(embeddings(model._owner), "num_embeddings", None))
    return choose_layers(model, layers), () if tokens is None else choose_tokens(model, tokens)


def check_model(model: Any, lens: str) -> None:
    """Whether a lens can look into a model: a language model with a head, whose tokens each have a hidden state."""
    if not isinstance(model, LanguageModel):
        raise InputError(f"{lens} takes a LanguageModel, not {type(model).__name__}")
    name = type(model._owner).__name__
    if not hasattr(model, "lm_head"):
        raise InputError(f"{lens}: {name} has no lm_head that was found, so layers cannot be read as words")
    if model.hidden_layout is None:
        raise InputError(f"{lens}: the layers of {name} do not give one hidden state a token")


def choose_layers(model: LanguageModel, layers: Layers) -> tuple[int, ...]:
    """The numbers of the chosen layers, from 0 on and in the order of the model; None is all, and -1 the last."""
    count = len(model.layers_output)
    if layers is None or isinstance(layers, slice):
        chosen = list(range(count)[layers or slice(None)])
    else:
        chosen = list(layers) if isinstance(layers, Iterable) else [layers]
    if not chosen:
        raise InputError(f"no layers are chosen: the model has {count} (0 to {count - 1})")
    for layer in chosen:
        if isinstance(layer, bool) or not hasattr(layer, "__index__") or not -count <= layer < count:
            raise InputError(f"there is no layer {layer!r}: the model has {count} (0 to {count - 1})")
    return tuple(sorted({index(layer) % count for layer in chosen}))


def choose_tokens(model: LanguageModel, tokens: Tokens) -> tuple[int, ...]:
    """The ids of the chosen tokens: ids, or texts that are one token each, such as " Paris"."""
    chosen = [tokens] if isinstance(tokens, str) or not isinstance(tokens, Iterable) else list(tokens)
    if not chosen:
        raise InputError("no tokens are chosen: give some, or leave `tokens` out")
    known = getattr(embeddings(model._owner), "num_embeddings", None)
    for token in chosen:
        if isinstance(token, str):
            continue
        if isinstance(token, bool) or not hasattr(token, "__index__"):
            raise InputError(f"a token is a text such as ' Paris', or an id, not {token!r}")
        if token < 0 or (known is not None and token >= known):
            raise InputError(f"there is no token {token}: the model knows 0 to {(known or 1) - 1}")
    return tuple(model.token_id(token) if isinstance(token, str) else index(token) for token in chosen)


def check_count(name: str, value: Any, most: int | None = None) -> int:
    """A whole number from 1 on (up to `most`)."""
    if isinstance(value, bool) or not hasattr(value, "__index__") or value < 1 or (most and value > most):
        raise InputError(f"{name} is a whole number from 1{f' to {most}' if most else ' on'}, not {value!r}")
    return index(value)


@dataclass(frozen=True)
class Batch:
    """Some of the prompts: a run over them that has not begun, and the chosen positions of their tokens."""

    model: LanguageModel
    run: LanguageRun
    start: int  # the number of its first prompt
    tokens: torch.Tensor  # (rows, tokens): what the layers read; behind an encoder, the decoder's
    where: torch.Tensor  # (rows, positions): where they stand among the tokens of the padded batch
    chosen: torch.Tensor  # (rows, positions): whether there is one; shorter prompts may have fewer
    positions: torch.Tensor  # (rows, positions): which they are of the prompt's own tokens, from 0 on; -1 for none

    @property
    def places(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The row and the token of every chosen position."""
        rows, columns = self.chosen.nonzero(as_tuple=True)
        return rows, self.where[rows, columns]

    def pick(self, values: torch.Tensor) -> torch.Tensor:
        """The hidden states at the chosen positions, (all of them, features), of what a layer gives."""
        values = self.model.hidden_layout.tokens_first(values)
        if values.shape[:2] != self.tokens.shape:
            raise InputError(
                f"{tuple(values.shape)} is not one value a token, for {tuple(self.tokens.shape)} tokens: choose "
                "another point of the layer"
            )
        return values[*(place.to(values.device) for place in self.places)]

    def spread(self, values: torch.Tensor) -> torch.Tensor:
        """Values of the chosen positions, (layers, all of them, ...), as (rows, layers, positions, ...); NaN, or -1,
        where there are none."""
        rows, columns = self.chosen.nonzero(as_tuple=True)
        shape = (len(self.chosen), len(values), self.chosen.shape[1], *values.shape[2:])
        whole = torch.full(shape, torch.nan if values.is_floating_point() else -1, dtype=values.dtype)
        whole[rows, :, columns] = values.transpose(0, 1)
        return whole


def as_prompts(prompts: Any) -> list[Any]:
    """The single prompts: texts, token ids, or chats."""
    if isinstance(prompts, torch.Tensor):
        return list(prompts) if prompts.ndim > 1 else [prompts]
    if isinstance(prompts, (str, Mapping)) or not isinstance(prompts, Iterable):
        return [prompts]
    prompts = list(prompts)
    if not prompts:
        raise InputError("there is no prompt: the list is empty")
    one = isinstance(prompts[0], Mapping) or (
        hasattr(prompts[0], "__index__") and not (isinstance(prompts[0], torch.Tensor) and prompts[0].ndim)
    )
    return [prompts] if one else prompts


def open_batches(
    model: LanguageModel,
    prompts: Any,
    positions: Positions,
    size: int,
    opens: Callable[..., LanguageRun] | None = None,
    **inputs: Any,
) -> list[Batch]:
    """The prompts in batches of `size`, each a run (of `opens`, else a forward pass) that nothing was asked of yet,
    without gradients. `inputs` go to the model along with them; pictures and a decoder's tokens by the prompt.

    Positions count from the first token of each prompt, whatever padding stands before it; -1 is its last. A list of
    lists gives each prompt its own; None is all. Behind an encoder they are those of the decoder's tokens."""
    prompts, size = as_prompts(prompts), check_count("batch_size", size)
    if opens is None and "use_cache" in inspect.signature(model._owner.forward).parameters:
        inputs = {"use_cache": False, **inputs}  # keys and values for tokens to come, which do not
    each = _positions_of_each(positions, len(prompts))
    batches = []
    with torch.no_grad():
        for start in range(0, len(prompts), size):
            some = prompts[start : start + size]
            own = {name: _of_batch(name, value, start, len(some), len(prompts)) for name, value in inputs.items()}
            run = (opens or model.trace)(some[0] if len(some) == 1 else some, **own)
            batches.append(_batch(model, run, start, each[start : start + size]))
    return batches


def _of_batch(name: str, value: Any, start: int, size: int, count: int) -> Any:
    """Of an argument that has a part for each of `count` prompts, the parts of a batch; any other as it is."""
    if count == 1 or name not in _BY_PROMPT:
        return value
    if isinstance(value, (list, tuple)) and len(value) == count:
        return value[start] if size == 1 else value[start : start + size]
    if name != "images" and isinstance(value, torch.Tensor):
        return value.expand(count, -1)[start : start + size]
    return value


def batch_of(model: LanguageModel, run: LanguageRun, positions: Positions) -> Batch:
    """A run as a batch, with these positions."""
    return _batch(model, run, 0, _positions_of_each(positions, len(run.rows)))


def _positions_of_each(positions: Positions, count: int) -> list[Any]:
    if isinstance(positions, torch.Tensor):
        positions = positions.tolist()
    if not isinstance(positions, Iterable):
        return [positions] * count
    positions = list(positions)
    if not positions:
        raise InputError("no positions are chosen: give some, or None for all")
    if all(isinstance(place, (list, tuple, torch.Tensor, range)) for place in positions):
        if len(positions) != count:
            raise InputError(f"positions are given for {len(positions)} prompts, and there are {count}")
        return [place.tolist() if isinstance(place, torch.Tensor) else list(place) for place in positions]
    return [positions] * count


def _batch(model: LanguageModel, run: LanguageRun, start: int, each: list[Any]) -> Batch:
    decodes = model._owner.config.is_encoder_decoder
    tokens = run.decoder_tokens if decodes else run.tokens
    if tokens is None:
        raise InputError("the lens needs to know the tokens: give texts or token ids, not embeddings or labels")
    mask = torch.ones_like(tokens) if decodes or run.mask is None else run.mask
    real = [row.nonzero().flatten().cpu() for row in mask.cpu()]
    own = [_own_positions(places, len(row), start + i) for i, (places, row) in enumerate(zip(each, real))]
    longest = max(len(places) for places in own)
    where = torch.zeros(len(own), longest, dtype=torch.long)
    positions, chosen = torch.full_like(where, -1), torch.zeros_like(where, dtype=torch.bool)
    for i, (places, row) in enumerate(zip(own, real)):
        positions[i, : len(places)] = torch.tensor(places)
        where[i, : len(places)], chosen[i, : len(places)] = row[places], True
    return Batch(model, run, start, tokens, where, chosen, positions)


def _own_positions(places: Any, length: int, prompt: int) -> list[int]:
    """The positions that are meant in a prompt of so many tokens."""
    if places is None or isinstance(places, slice):
        found = list(range(length)[places or slice(None)])
    else:
        found = list(places) if isinstance(places, Iterable) else [places]
    for place in found:
        if isinstance(place, bool) or not hasattr(place, "__index__") or not -length <= place < length:
            raise InputError(
                f"there is no position {place!r} in prompt {prompt}: it has {length} tokens (0 to {length - 1})"
            )
    if not found:
        raise InputError(f"no positions are chosen in prompt {prompt}, which has {length} tokens")
    return [index(place) % length for place in found]
