"""Frames: how a message travels over a WebSocket.

A message without tensors is a text frame of JSON. One with tensors is a binary frame in the safetensors format, with
the JSON under "message" in its metadata. Neither can hold code.
"""

import json
from collections.abc import Mapping
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from diffsight.errors import InputError
from diffsight.remote.wire_values import ProtocolError

Frame = str | bytes
_MESSAGE = "message"


def pack(message: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> Frame:
    """Return a message and its tensors as one frame.

    Raises:
        InputError: A tensor has a type that safetensors does not have.
    """
    text = json.dumps(message, separators=(",", ":"), allow_nan=False)
    if not tensors:
        return text
    try:
        return save(_separate(tensors), {_MESSAGE: text})
    except (KeyError, ValueError, SafetensorError) as error:
        kinds = ", ".join(sorted({str(tensor.dtype) for tensor in tensors.values()}))
        raise InputError(f"tensors of {kinds} cannot be sent: {error}") from error


def unpack(frame: Frame) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Return the message in a frame, and its tensors.

    Raises:
        ProtocolError: It is not a frame of this protocol.
    """
    tensors: dict[str, torch.Tensor] = {}
    try:
        if isinstance(frame, str):
            text = frame
        else:
            length = int.from_bytes(frame[:8], "little")
            text = json.loads(frame[8 : 8 + length])["__metadata__"][_MESSAGE]
            tensors = load(frame)
        message = json.loads(text, parse_constant=_refuse)
    except (ValueError, KeyError, TypeError, RecursionError, SafetensorError, OverflowError) as error:
        raise ProtocolError(f"this is not a frame of a remote run: {type(error).__name__}: {error}") from None
    if not isinstance(message, dict):
        raise ProtocolError(f"a message is a dictionary, not a {type(message).__name__}")
    return message, tensors


def _separate(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors, none of which shares its memory with another: safetensors refuses those."""
    seen: set[int] = set()
    found = {}
    for name, tensor in tensors.items():
        place = tensor.untyped_storage().data_ptr()
        found[name] = tensor.clone() if place in seen else tensor
        seen.add(place)
    return found


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")
