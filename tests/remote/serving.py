"""A server of one process for the tests: the conversation and the front of the real one, over a plain WebSocket.

with serving({"gpt2": model}) as address:
    LanguageModel("gpt2", remote=address)
"""

import asyncio
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from diffsight.gallery.serve.conversation import Closed, Conversation, Limits
from diffsight.gallery.serve.front import Front
from diffsight.gallery.serve.keys import Keys, key_in
from diffsight.gallery.serve.services import services_of


class PlainSocket:
    """A WebSocket of the library `websockets`."""

    def __init__(self, socket: Any) -> None:
        self._socket = socket

    async def receive(self) -> str | bytes:
        from websockets.exceptions import ConnectionClosed

        try:
            return await self._socket.recv()
        except ConnectionClosed:
            raise Closed from None

    async def send(self, frame: str | bytes) -> None:
        from websockets.exceptions import ConnectionClosed

        try:
            await self._socket.send(frame)
        except ConnectionClosed:
            raise Closed from None


@contextmanager
def serving(models: Mapping[str, Any], limits: Limits = Limits(), keys: Any = None) -> Iterator[str]:  # noqa: B008
    """Serve models on the loopback, one run of each at a time, and return the address."""
    from websockets.asyncio.server import serve
    from websockets.datastructures import Headers
    from websockets.http11 import Response

    front = Front(models, Keys(keys))
    loop = asyncio.new_event_loop()
    ready, ports, stopping = threading.Event(), [], asyncio.Event()
    locks = {name: asyncio.Lock() for name in models}

    def plain(connection: Any, request: Any) -> Any:
        if (
            request.path.endswith("/run")
            and front.refusal(key_in(request.headers), front.model_of(request.path)) is None
        ):
            return None
        status, kind, body = front.answer("GET", request.path, key_in(request.headers), b"")
        return Response(status, "", Headers([("Content-Type", kind), ("Content-Length", str(len(body)))]), body)

    async def handle(socket: Any) -> None:
        name = front.model_of(socket.request.path)
        async with locks[name]:
            conversation = Conversation(models[name], services_of(models[name]), limits, "test")
            reason = await conversation.run(PlainSocket(socket))
        await socket.close(1000 if not reason else 1008, reason.encode()[:120].decode(errors="ignore"))

    async def main() -> None:
        options = dict(process_request=plain, max_size=limits.frame_bytes, compression=None)
        async with serve(handle, "127.0.0.1", 0, **options) as server:
            ports.append(server.sockets[0].getsockname()[1])
            ready.set()
            await stopping.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=(main(),), daemon=True)
    thread.start()
    ready.wait(10)
    try:
        yield f"http://127.0.0.1:{ports[0]}"
    finally:
        loop.call_soon_threadsafe(stopping.set)
        thread.join(10)
