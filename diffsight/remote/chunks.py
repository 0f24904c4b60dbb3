"""Chunks: a frame that is longer than servers take at once is sent in parts.

A text `{"bytes": n, "text": false}` comes first, then the parts, of at most 8 MiB each. Shorter frames are sent as they
are.
"""

import json
from collections.abc import Iterator

from diffsight.remote.frames import Frame
from diffsight.remote.wire_values import ProtocolError

_LONGEST = 8 << 20
_HEAD = '{"bytes":'


def split(frame: Frame) -> Iterator[Frame]:
    """Yield what is sent for a frame."""
    if len(frame) <= _LONGEST:
        yield frame
        return
    is_text = isinstance(frame, str)
    data = memoryview(frame.encode() if is_text else frame)
    yield f'{_HEAD}{len(data)},"text":{json.dumps(is_text)}}}'
    for start in range(0, len(data), _LONGEST):
        yield bytes(data[start : start + _LONGEST])


class Chunks:
    """Joins what is received to frames.

    Args:
        longest: How many bytes a frame may have.
    """

    def __init__(self, longest: int) -> None:
        self._longest = longest
        self._parts: bytearray | None = None
        self._size, self._is_text = 0, False

    def add(self, data: Frame) -> Frame | None:
        """Add what was received; return the frame if it is complete, else None.

        Raises:
            ProtocolError: The frame is too long, or its parts do not fit.
        """
        if self._parts is None and not (isinstance(data, str) and data.startswith(_HEAD)):
            self._check(len(data))
            return data
        if self._parts is None:
            self._begin(data)
            return None
        if isinstance(data, str) or len(self._parts) + len(data) > self._size:
            raise ProtocolError("the parts of a frame do not fit what was announced")
        self._parts += data
        if len(self._parts) < self._size:
            return None
        whole, self._parts = bytes(self._parts), None
        return whole.decode(errors="replace") if self._is_text else whole

    def _begin(self, head: str) -> None:
        try:
            announced = json.loads(head)
            self._size, self._is_text = int(announced["bytes"]), bool(announced["text"])
        except (ValueError, KeyError, TypeError):
            raise ProtocolError("the head of a frame in parts is damaged") from None
        self._check(self._size)
        self._parts = bytearray()

    def _check(self, size: int) -> None:
        if size > self._longest:
            raise ProtocolError(f"a frame of {size} bytes: the limit is {self._longest}")
