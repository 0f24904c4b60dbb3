"""The sockets of a conversation: the WebSocket of a request to Serve, or a job."""

import asyncio
from contextlib import suppress

from fastapi import WebSocket, WebSocketDisconnect

from diffsight.gallery.serve.conversation import Closed
from diffsight.remote import Chunks, split


class ServeSocket:
    """The WebSocket of a request to Serve."""

    def __init__(self, socket: WebSocket, frame_bytes: int) -> None:
        self._socket, self._chunks = socket, Chunks(frame_bytes)

    async def receive(self) -> str | bytes:
        while True:
            message = await self._socket.receive()
            if message["type"] == "websocket.disconnect":
                raise Closed
            data = message["text"] if message.get("text") is not None else message["bytes"]
            frame = self._chunks.add(data)
            if frame is not None:
                return frame

    async def send(self, frame: str | bytes) -> None:
        try:
            for part in split(frame):
                await (self._socket.send_text(part) if isinstance(part, str) else self._socket.send_bytes(part))
        except (WebSocketDisconnect, RuntimeError, OSError):
            raise Closed from None

    async def close(self, reason: str) -> None:
        """Close the WebSocket with a reason."""
        with suppress(RuntimeError, OSError, WebSocketDisconnect):  # the client has already closed it
            await self._socket.close(1008 if reason else 1000, reason.encode()[:120].decode(errors="ignore"))


class JobSocket:
    """Stands in for the client of a job, which has sent all its requests and waits for the answer."""

    def __init__(self, frames: list[str | bytes]) -> None:
        self._frames, self._answered, self.answer = frames, asyncio.Event(), b""

    async def receive(self) -> str | bytes:
        if self._frames:
            return self._frames.pop(0)
        await self._answered.wait()
        raise Closed

    async def send(self, frame: str | bytes) -> None:
        self.answer = frame.encode() if isinstance(frame, str) else frame
        self._answered.set()
