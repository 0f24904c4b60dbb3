"""The inputs of a language model: one text or several, token ids, tensors, dictionaries, chat messages.

    inputs = prepare_inputs(model, tokenizer, ["The cat", "The Eiffel Tower is"], left=True)
    inputs.values       # {"input_ids": …, "attention_mask": …, "position_ids": …}
    inputs.rows         # 2

Texts of different lengths are padded, see `padding`. With padding on the left, positions start at the first real token,
so that a row is computed as it would be alone.
"""

import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import nn

from diffsight.errors import InputError, suggest
from diffsight.extending import unwrapped
from diffsight.pipelines.language.padding import pad, padding_token
from diffsight.pipelines.language.text_configs import READS, text_config
from diffsight.pipelines.loading_errors import reason_of
from diffsight.pipelines.numbers import as_integer
from diffsight.pipelines.standard_names import embeddings
from diffsight.pipelines.valid_text import check_text

_OF_POSITIONS = re.compile("pos|wpe")  # in the name of a table of positions: embed_positions, pos_encoding
_first_positions: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()


@dataclass(frozen=True)
class Inputs:
    """The arguments of a model's forward pass. `rows` is the number of inputs, or None if it is unknown."""

    values: dict[str, Any]
    rows: int | None

    @property
    def tokens(self) -> torch.Tensor | None:
        """The token ids, `(rows, tokens)`."""
        return self.values.get("input_ids")

    @property
    def mask(self) -> torch.Tensor | None:
        """1 for real tokens and 0 for padding, `(rows, tokens)`; None for a mask of another shape, such as one that
        includes tokens of a cache."""
        mask, tokens = self.values.get("attention_mask"), self.tokens
        fits = isinstance(mask, torch.Tensor) and (not isinstance(tokens, torch.Tensor) or mask.shape == tokens.shape)
        return mask if fits else None

    @property
    def is_padded(self) -> bool:
        """Whether some rows are shorter than others."""
        return isinstance(self.mask, torch.Tensor) and self.mask.ndim == 2 and not self.mask.bool().all()

    @property
    def last(self) -> torch.Tensor | None:
        """The position of the last real token of each row, `(rows,)`, or None if no row ends with padding."""
        mask = self.mask
        if not isinstance(mask, torch.Tensor) or mask.ndim != 2 or mask[:, -1].all():
            return None
        return (mask * torch.arange(mask.shape[1], device=mask.device)).argmax(-1)

    @property
    def device(self) -> torch.device | None:
        """The device of the tensors."""
        return next((v.device for v in self.values.values() if isinstance(v, torch.Tensor)), None)

    def to(self, device: torch.device | None) -> "Inputs":
        """Return the inputs on a device. None and the meta device change nothing."""
        if device is None or device.type == "meta":
            return self
        values = {name: v.to(device) if isinstance(v, torch.Tensor) else v for name, v in self.values.items()}
        return Inputs(values, self.rows)

    def with_mask(self, mask: torch.Tensor | None) -> "Inputs":
        """Return the inputs with the mask that the model infers for them, if any."""
        return self if mask is None else Inputs({**self.values, "attention_mask": mask}, self.rows)


PER_TOKEN = ("attention_mask", "position_ids", "token_type_ids")  # arguments that describe the token ids
OF_TOKENIZERS = {  # what a tokenizer can return beside a model's arguments
    "token_type_ids",
    "special_tokens_mask",
    "offset_mapping",
    "overflow_to_sample_mapping",
    "overflowing_tokens",
    "num_truncated_tokens",
    "length",
}


def prepare_inputs(
    model: nn.Module,
    tokenizer: Any,
    given: Any,
    left: bool,
    known: set[str],
    beside: Mapping[str, Any] | None = None,
    writes: bool = False,
) -> Inputs:
    """Return a user's input as arguments for the model's forward pass.

    Args:
        model: The model.
        tokenizer: Its tokenizer, or None.
        given: A text, a list of texts, token ids, a tensor, a dictionary or chat messages.
        left: Whether padding goes to the left.
        known: The arguments that a dictionary may hold.
        beside: Arguments passed beside the input. Those that describe the tokens (`PER_TOKEN`) belong to it.
        writes: Whether they are for `generate`, which infers the mask of token ids of the same length itself.

    Raises:
        InputError: The input is empty, longer than the model can take, or of a kind that models do not take.
    """
    if isinstance(given, Mapping) and not _is_message(given):
        values = _of_dictionary(type(model).__name__, given, known)
    else:
        values = _values(tokenizer, given, left, writes)
    for name in PER_TOKEN:
        value = None if beside is None else beside.get(name)
        if value is not None:
            value = _as_tensor(name, value)
            values[name] = value[None] if isinstance(value, torch.Tensor) and value.ndim == 1 else value
    tokens = values.get("input_ids")
    if not isinstance(tokens, torch.Tensor):
        first = next((v for v in values.values() if isinstance(v, torch.Tensor) and v.ndim), None)
        return Inputs(values, None if first is None else len(first))
    _check_tokens(model, tokens)
    inputs = Inputs(values, len(tokens))
    if left and inputs.is_padded and "position_ids" not in values and _takes(model, "position_ids"):
        values |= _positions(model, inputs.mask.long())
    return inputs


def _positions(model: nn.Module, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return position ids that do not count padding on the left, if any row has such padding.

    Rows with other masks, such as a gap between tokens, get the positions that the model counts itself."""
    is_left = (mask.diff(dim=-1) >= 0).all(-1, keepdim=True)
    if mask[is_left[:, 0]].all():
        return {}
    counted = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
    return {"position_ids": torch.where(is_left, (mask.cumsum(-1) - 1).clamp(min=0), counted) + _first_position(model)}


# ---- one function per kind of input


def _values(tokenizer: Any, given: Any, left: bool, writes: bool) -> dict[str, Any]:
    if isinstance(given, str):
        return _of_texts(tokenizer, [given], left)
    if isinstance(given, torch.Tensor):
        return {"input_ids": _ids(given)}
    if isinstance(given, Mapping):
        return _of_chats(tokenizer, [[given]], left)
    if (isinstance(given, Sequence) and not isinstance(given, bytes)) or hasattr(given, "__array__"):
        return _of_list(tokenizer, list(given), left, writes)
    raise InputError(
        f"a language model takes a string, a list of strings, token ids, a tensor, a dictionary or chat messages, not "
        f"{type(given).__name__}"
    )


def _is_message(given: Mapping) -> bool:
    return "role" in given and "content" in given


def _of_dictionary(title: str, given: Mapping[str, Any], known: set[str]) -> dict[str, Any]:
    """Return the arguments in a dictionary, without those that tokenizers return for the user alone."""
    if not given:
        raise InputError("there is no input, because the dictionary is empty")
    for name in given:
        if name not in known | OF_TOKENIZERS:
            raise InputError(f"{title} takes no {name!r} in a dictionary of inputs{suggest(str(name), sorted(known))}")
    values = {name: _as_tensor(name, value) for name, value in given.items() if name in known}
    if isinstance(values.get("input_ids"), torch.Tensor) and values["input_ids"].ndim == 1:
        values = {n: v[None] if isinstance(v, torch.Tensor) and v.ndim == 1 else v for n, v in values.items()}
    return values


def _of_list(tokenizer: Any, given: list, left: bool, writes: bool) -> dict[str, Any]:
    if not given:
        raise InputError("there is no input, because the list is empty")
    kinds = {_kind(item) for item in given}
    if len(kinds) > 1:
        raise InputError(f"all inputs of a batch must be of one kind, but this one mixes {' and '.join(sorted(kinds))}")
    kind = kinds.pop()
    if kind == "text":
        return _of_texts(tokenizer, given, left)
    if kind == "numbers":
        return {"input_ids": torch.tensor([[int(n) for n in given]])}
    if kind == "token ids":
        rows = [_ids(_tensor("token ids", ids)).flatten() for ids in given]
        if writes and len({len(row) for row in rows}) == 1:  # the same as a tensor of them
            return {"input_ids": torch.stack(rows)}
        return pad(rows, padding_token(tokenizer), left)
    if kind == "messages":
        return _of_chats(tokenizer, [given], left)
    if kind == "chats":
        return _of_chats(tokenizer, given, left)
    raise InputError(f"a language model takes strings, token ids or chat messages, not a list of {kind}")


def _kind(item: Any) -> str:
    if isinstance(item, str):
        return "text"
    if isinstance(item, bool):
        return "bool"
    if as_integer(item) is not None:
        return "numbers"
    if isinstance(item, Mapping):
        return "messages" if "role" in item else "dictionaries"
    if isinstance(item, (list, tuple)) and item and isinstance(item[0], Mapping):
        return "chats"
    if isinstance(item, (list, tuple, torch.Tensor)) or hasattr(item, "__array__"):
        return "token ids"
    return type(item).__name__


def _of_texts(tokenizer: Any, texts: list[str], left: bool) -> dict[str, Any]:
    tokenizer = _required(tokenizer, "text")
    check_text("the prompt", texts)
    if len(texts) == 1:
        values = dict(tokenizer(texts[0], return_tensors="pt"))
        _check_not_empty(values["input_ids"][0], texts[0])
        return values
    each = [dict(tokenizer(text, return_tensors="pt")) for text in texts]
    for text, one in zip(texts, each):
        _check_not_empty(one["input_ids"][0], text)
    values = pad([one["input_ids"][0] for one in each], padding_token(tokenizer), left)
    if "token_type_ids" in each[0]:
        values["token_type_ids"] = pad([one["token_type_ids"][0] for one in each], 0, left)["input_ids"]
    return values


def _of_chats(tokenizer: Any, chats: list, left: bool) -> dict[str, Any]:
    tokenizer = _required(tokenizer, "a chat")
    if getattr(tokenizer, "chat_template", None) is None:
        raise InputError("the tokenizer has no chat template: pass text instead, or use a chat model")
    for chat in chats:
        check_text("a message", [message.get("content") for message in chat])
    options = {"add_generation_prompt": True, "return_dict": True}
    try:
        ids = [tokenizer.apply_chat_template(chat, **options)["input_ids"] for chat in chats]
    except Exception as error:  # templates raise their own errors
        raise InputError(f"the chat template cannot take these messages: {reason_of(error)}") from error
    return pad([torch.tensor(one) for one in ids], padding_token(tokenizer), left)


def _as_tensor(name: str, value: Any) -> Any:
    """Return an argument as a tensor, if it is a list or an array. A tuple may be a cache, if it is not of tokens."""
    kinds = (list, tuple, np.ndarray) if name in ("input_ids", *PER_TOKEN) else (list, np.ndarray)
    return _tensor(name, value) if isinstance(value, kinds) else value


def _tensor(name: str, value: Any) -> torch.Tensor:
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{name} must be numbers, with rows of the same length: {error}") from None


def _ids(tensor: torch.Tensor) -> torch.Tensor:
    if not tensor.numel():
        raise InputError("the prompt has no tokens")
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise InputError(f"token ids are integers, not {str(tensor.dtype).removeprefix('torch.')}")
    if tensor.ndim not in (1, 2):
        raise InputError(f"token ids have the shape (tokens,) or (rows, tokens), not {tuple(tensor.shape)}")
    return tensor.long() if tensor.ndim == 2 else tensor.long()[None]


# ---- checks


def _required(tokenizer: Any, what: str) -> Any:
    if tokenizer is None:
        raise InputError(
            f"{what} needs a tokenizer, and the model has none: pass one, as in LanguageModel((model, tokenizer)), or "
            "pass token ids"
        )
    return tokenizer


def _check_not_empty(ids: torch.Tensor, text: str) -> None:
    """Raise InputError for a text without tokens. Even an empty one may have some, such as a token of its beginning."""
    if not len(ids):
        what = f"{text!r} has no tokens" if text else "is empty"
        raise InputError(f"the prompt {what}: pass at least one word, or token ids")


def _check_tokens(model: nn.Module, tokens: torch.Tensor) -> None:
    if not tokens.numel():
        raise InputError("the prompt has no tokens")
    if tokens.is_meta:
        return
    words = getattr(embeddings(model), "num_embeddings", None)
    if isinstance(words, int) and (tokens.max() >= words or tokens.min() < 0):
        wrong = int(tokens.max()) if tokens.max() >= words else int(tokens.min())
        raise InputError(f"there is no token {wrong}: the token ids of the model are 0 to {words - 1}")
    config = getattr(model, "config", None)
    config = text_config(config, READS) if hasattr(config, "get_text_config") else config
    context = getattr(config, "max_position_embeddings", None)
    most = context - _first_position(model) if isinstance(context, int) else 0
    if 0 < most < tokens.shape[-1] and _has_position_table(model, context):
        raise InputError(f"the prompt is too long: it has {tokens.shape[-1]} tokens, and the model's context is {most}")


def _has_position_table(model: nn.Module, rows: int) -> bool:
    """Return whether the model looks up positions in a table of `rows` vectors, learned or fixed.

    Rotary embeddings and recurrent models need none, and run beyond the context that the model was trained for."""
    tables = {
        path: module.num_embeddings - getattr(module, "offset", 0)
        for path, module in model.named_modules()
        if isinstance(module, nn.Embedding)
    }
    tables |= {path: len(buffer) for path, buffer in model.named_buffers() if buffer.ndim == 2}
    return any(n == rows and _OF_POSITIONS.search(path.rpartition(".")[2]) for path, n in tables.items())


def _first_position(model: nn.Module) -> int:
    """Return the position of the first token: 0, or the position after the padding position in RoBERTa and similar
    models, whose padding has a position."""
    if model not in _first_positions:
        counts = (m for m in model.modules() if hasattr(m, "create_position_ids_from_input_ids"))
        padding = getattr(next(counts, None), "padding_idx", None)
        _first_positions[model] = 0 if padding is None else padding + 1
    return _first_positions[model]


def _takes(model: nn.Module, name: str) -> bool:
    return name in inspect.signature(unwrapped(model).forward).parameters
