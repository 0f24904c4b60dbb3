"""A bare WebSocket on Ray Serve that returns as many bytes as it is asked for, to compare `remote_runs.py` with."""

from contextlib import suppress

from fastapi import FastAPI, WebSocket, WebSocketDisconnect
from ray import serve

_api = FastAPI()


@serve.deployment(ray_actor_options={"num_cpus": 0.1})
@serve.ingress(_api)
class Echo:
    """Answers "N " with N bytes."""

    @_api.websocket("/")
    async def answer(self, socket: WebSocket) -> None:
        """Answer the requests of one client."""
        await socket.accept()
        with suppress(WebSocketDisconnect):
            while True:
                await socket.send_bytes(b"\1" * int((await socket.receive_text()).split(" ")[0]))
