"""Chunks: a frame that is too long to be sent at once is sent in parts.

First comes a text frame `{"bytes": n, "text": false}`, then the parts, of at most 8 MiB each. Shorter frames are sent
unchanged.
"""

import json
from collections.abc import Iterator

from diffsight.remote.frames import Frame
from diffsight.remote.wire_values import ProtocolError

_LONGEST = 8 << 20
_HEAD = '{"bytes":'


def split(frame: Frame) -> Iterator[Frame]:
    """Yield the frames to send for a frame: the frame itself, or its parts."""
    if len(frame) <= _LONGEST:
        yield frame
        return
    is_text = isinstance(frame, str)
    data = memoryview(frame.encode() if is_text else frame)
    yield f'{_HEAD}{len(data)},"text":{json.dumps(is_text)}}}'
    for start in range(0, len(data), _LONGEST):
        yield bytes(data[start : start + _LONGEST])


class Chunks:
    """Joins received data into frames.

    Args:
        longest: The maximum length of a frame in bytes.
    """

    def __init__(self, longest: int) -> None:
        self._longest = longest
        self._parts: bytearray | None = None
        self._size, self._is_text = 0, False

    def add(self, data: Frame) -> Frame | None:
        """Add received data; return the frame if it is complete, else None.

        Raises:
            ProtocolError: The frame is too long, or its parts do not match its head.
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
