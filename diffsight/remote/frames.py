"""Frames: the format of messages on a WebSocket.

A message without tensors is a text frame of JSON. A message with tensors is a binary frame in the safetensors format,
with the JSON under "message" in its metadata. Neither can contain code.
"""

import json
from collections.abc import Mapping
from math import prod
from typing import Any

import torch

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


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


_encode = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode  # created once, since that is slow
_decode = json.JSONDecoder(parse_constant=_refuse).decode
_TYPES_BY_NAME = {name: dtype for dtype, name in _TYPES.items()}


def pack(message: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> Frame:
    """Return a message and its tensors as one frame.

    Raises:
        InputError: A tensor has a type that safetensors does not support.
    """
    text = _encode(message)
    if not tensors:
        return text
    return _safetensors(text, tensors)


def unpack(frame: Frame, longest_json: int | None = None) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Return the message in a frame and its tensors.

    Args:
        frame: The frame.
        longest_json: The maximum length of the JSON in it, whose objects take up to 25 times as much memory as its
            text. None for no limit. Tensors take as much as in the frame.

    Raises:
        ProtocolError: The data is not a frame of this protocol, or its JSON is too long.
    """
    if isinstance(frame, str):
        length = len(frame) if frame.isascii() else len(frame.encode("utf-8", "replace"))
    else:
        length = min(int.from_bytes(frame[:8], "little"), len(frame))
    if longest_json is not None and length > longest_json:
        raise ProtocolError(
            f"a message with {length} bytes of JSON: the limit is {longest_json}. Send tensors, not lists"
        )
    tensors: dict[str, torch.Tensor] = {}
    try:
        if isinstance(frame, str):
            text = frame
        else:
            start = 8 + int.from_bytes(frame[:8], "little")
            header = _decode(frame[8:start].decode())
            text = header.pop("__metadata__")[_MESSAGE]
            data = memoryview(frame)[start:]
            tensors = _tensors_in(header, data)
        message = _decode(text)
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, OverflowError) as error:
        raise ProtocolError(f"this is not a frame of a remote run: {type(error).__name__}: {error}") from None
    if not isinstance(message, dict):
        raise ProtocolError(f"a message is a dictionary, not a {type(message).__name__}")
    return message, tensors


def _tensors_in(header: Mapping[str, Any], data: memoryview) -> dict[str, torch.Tensor]:
    """Return copies of the tensors in the data of a frame.

    Each byte belongs to one tensor. Otherwise, a short frame could describe many large tensors."""
    tensors, end = {}, 0
    for name, described in header.items():
        if described["data_offsets"][0] != end:
            raise ValueError(f"the tensor {name} does not begin where the previous one ends")
        tensors[name], end = _tensor(data, **described), described["data_offsets"][1]
    return tensors


def _tensor(data: memoryview, dtype: str, shape: list[int], data_offsets: list[int]) -> torch.Tensor:
    """Return a copy of a tensor in the data of a frame."""
    start, end = data_offsets
    kind = _TYPES_BY_NAME[dtype]
    if not all(type(number) is int and number >= 0 for number in (*shape, start, end)) or end > len(data):
        raise ValueError(f"there is no tensor of shape {shape} at {data_offsets}")
    if prod(shape) * kind.itemsize != end - start:
        raise ValueError(f"a tensor of {dtype} and shape {shape} does not take {end - start} bytes")
    # Aligned by PyTorch, since kernels may round differently for other alignments.
    tensor = torch.empty(shape, dtype=kind, device="cpu")
    if end > start:
        memoryview(tensor.reshape(-1).view(torch.uint8).numpy())[:] = data[start:end]
    return tensor


def _safetensors(text: str, tensors: Mapping[str, torch.Tensor]) -> bytes:
    """Return the tensors in the safetensors format: the length of the header, the header, the data.

    The functions of safetensors do the same, but take five times as long for a small tensor."""
    header: dict[str, Any] = {"__metadata__": {_MESSAGE: text}}
    parts, end = [], 0
    for name, tensor in tensors.items():
        if tensor.dtype not in _TYPES:
            raise InputError(f"tensors of {tensor.dtype} cannot be sent")
        data = memoryview(tensor.reshape(-1).view(torch.uint8).numpy()) if tensor.numel() else b""
        start, end = end, end + len(data)
        header[name] = {"dtype": _TYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
        parts.append(data)
    head = _encode(header).encode()
    head += b" " * (-len(head) % 8)
    return b"".join([len(head).to_bytes(8, "little"), head, *parts])
