"""A server of one process for the tests: the conversation and the front of the real one, over a plain WebSocket.

with serving({"gpt2": model}) as address:
    LanguageModel("gpt2", remote=address)
"""

import asyncio
import threading
from collections import defaultdict
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from diffsight.gallery.serve.conversation import Closed, Conversation, Limits
from diffsight.gallery.serve.descriptions import configuration, description
from diffsight.gallery.serve.front import Front
from diffsight.gallery.serve.keys import Keys, key_in
from diffsight.gallery.serve.services import services_of
from diffsight.remote import Chunks, split


class PlainSocket:
    """A WebSocket of the library `websockets`."""

    def __init__(self, socket: Any, frame_bytes: int) -> None:
        self._socket, self._chunks = socket, Chunks(frame_bytes)

    async def receive(self) -> str | bytes:
        from websockets.exceptions import ConnectionClosed

        try:
            while (frame := self._chunks.add(await self._socket.recv())) is None:
                pass
            return frame
        except ConnectionClosed:
            raise Closed from None

    async def send(self, frame: str | bytes) -> None:
        from websockets.exceptions import ConnectionClosed

        try:
            for part in split(frame):
                await self._socket.send(part)
        except ConnectionClosed:
            raise Closed from None


def model_of(path: str) -> str:
    """Return the model whose runs a path names; an empty string if it names none."""
    return path.removeprefix("/runs/").removesuffix("/open") if path.startswith("/runs/") else ""


@contextmanager
def serving(
    models: Mapping[str, Any],
    limits: Limits = Limits(),  # noqa: B008
    keys: Any = None,
    at_once: int = 1,
) -> Iterator[str]:
    """Serve models on the loopback and return the address. Models may be added later.

    `at_once` is how many runs of a model may be open at once: they share its modules, in threads of their own."""
    from websockets.asyncio.server import serve
    from websockets.datastructures import Headers
    from websockets.http11 import Response

    front, known = Front([(description(n, m), configuration(m)) for n, m in models.items()]), Keys(keys)
    loop = asyncio.new_event_loop()
    ready, ports, stopping = threading.Event(), [], asyncio.Event()
    free = defaultdict(lambda: asyncio.Semaphore(at_once))
    threads = ThreadPoolExecutor(1000, "run")

    def plain(connection: Any, request: Any) -> Any:
        name = model_of(request.path)
        if known.find(key_in(request.headers)) is None:
            status, kind, body = front.error(401, "it is missing or unknown")
        elif name in models:
            return None
        else:
            status, kind, body = front.answer(request.path)
        return Response(status, "", Headers([("Content-Type", kind), ("Content-Length", str(len(body)))]), body)

    async def handle(socket: Any) -> None:
        name = model_of(socket.request.path)
        async with free[name]:
            conversation = Conversation(models[name], services_of(models[name]), limits, "test", threads)
            reason = await conversation.run(PlainSocket(socket, limits.frame_bytes))
        await socket.close(1000 if not reason else 1008, reason.encode()[:120].decode(errors="ignore"))

    async def main() -> None:
        options = dict(process_request=plain, max_size=16 << 20, close_timeout=1, compression=None)
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
        loop.close()
        threads.shutdown(wait=False)
