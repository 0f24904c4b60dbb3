"""The WebSocket of a request to Serve."""

from contextlib import suppress

from fastapi import WebSocket, WebSocketDisconnect

from diffsight.gallery.serve.conversation import Closed
from diffsight.remote import Chunks, error_frame, split


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

    async def refuse(self, error: Exception) -> None:
        """Send an error and close the WebSocket."""
        with suppress(Closed):
            await self.send(error_frame(error))
        await self.close(str(error))

    async def close(self, reason: str) -> None:
        """Close the WebSocket with a reason."""
        with suppress(RuntimeError, OSError, WebSocketDisconnect):  # the client has already closed it
            await self._socket.close(1008 if reason else 1000, reason.encode()[:120].decode(errors="ignore"))
