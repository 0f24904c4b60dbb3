"""Frames: how a message travels over a WebSocket.

A message without tensors is a text frame of JSON. One with tensors is a binary frame in the safetensors format, with
the JSON under "message" in its metadata. Neither can hold code.
"""

import json
from collections.abc import Mapping
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load

from diffsight.errors import InputError
from diffsight.remote.wire_values import ProtocolError

Frame = str | bytes
_MESSAGE = "message"
_TYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def pack(message: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> Frame:
    """Return a message and its tensors as one frame.

    Raises:
        InputError: A tensor has a type that safetensors does not have.
    """
    text = json.dumps(message, separators=(",", ":"), allow_nan=False)
    if not tensors:
        return text
    return _safetensors(text, tensors)


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


def _safetensors(text: str, tensors: Mapping[str, torch.Tensor]) -> bytes:
    """The tensors in the safetensors format: the length of the header, the header, the data.

    `safetensors.torch.save` does the same, and takes five times as long for a small tensor."""
    header: dict[str, Any] = {"__metadata__": {_MESSAGE: text}}
    parts, end = [], 0
    for name, tensor in tensors.items():
        if tensor.dtype not in _TYPES:
            raise InputError(f"tensors of {tensor.dtype} cannot be sent")
        data = memoryview(tensor.reshape(-1).view(torch.uint8).numpy()) if tensor.numel() else b""
        start, end = end, end + len(data)
        header[name] = {"dtype": _TYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
        parts.append(data)
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    return b"".join([len(head).to_bytes(8, "little"), head, *parts])


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")
