"""The client's connection to a server: the address, the key, one WebSocket, and readable errors for their failures."""

import json
import os
from collections.abc import Callable
from contextlib import suppress
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import quote, urlsplit, urlunsplit
from urllib.request import Request, urlopen

from diffsight.errors import InputError
from diffsight.key_hash import SESSION_HEADER, hash_of
from diffsight.remote.chunks import Chunks, split
from diffsight.remote.frames import Frame, pack, unpack
from diffsight.remote.wire_errors import RemoteError, error_of

ADDRESS, KEY = "DIFFSIGHT_REMOTE", "DIFFSIGHT_API_KEY"  # environment variables
_PATIENCE = 30.0  # seconds to wait for the answer to a plain HTTP request
_QUEUE = 3600.0  # seconds to wait for a free replica


class Address:
    """The address of a server, and the key for it.

    Args:
        remote: The address, such as "https://host:8000". True takes it from the environment variable DIFFSIGHT_REMOTE.
        api_key: The key; by default, from DIFFSIGHT_API_KEY.

    Raises:
        InputError: `remote` is not an address, or `api_key` is not a key.
    """

    def __init__(self, remote: str | bool, api_key: str | None = None) -> None:
        found = os.environ.get(ADDRESS) if remote is True else remote
        if not isinstance(found, str) or not found:
            raise InputError(f"remote=True takes the address of the server from {ADDRESS}, which is not set")
        parts = urlsplit(found)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise InputError(f"remote= takes the address of a server, such as 'http://127.0.0.1:8000', not {found!r}")
        self.parts = parts
        key = os.environ.get(KEY) if api_key is None else api_key
        self.key = key.strip() if isinstance(key, str) else key
        if self.key and not (isinstance(self.key, str) and self.key.isascii() and self.key.isprintable()):
            raise InputError(
                f"api_key=, or {KEY}, contains characters that never occur in a key: pass what `diffsight key` printed"
            )

    def __str__(self) -> str:
        return urlunsplit((self.parts.scheme, self.parts.netloc, self.parts.path.rstrip("/"), "", ""))

    @property
    def headers(self) -> dict[str, str]:
        """The headers of every request: the key, and its hash, by which the queue of the server knows it."""
        if not self.key:
            return {}
        return {"Authorization": f"Bearer {self.key}", SESSION_HEADER: hash_of(self.key)}

    def get(self, path: str, method: str = "GET", body: bytes | None = None) -> bytes:
        """Return the server's answer to a plain HTTP request.

        Raises:
            RemoteError: There is no server, or it refuses the request. The message says why.
        """
        request = Request(f"{self}{quote(path, safe='/?=&')}", data=body, method=method, headers=self.headers)
        try:
            with urlopen(request, timeout=_PATIENCE) as answer:
                return answer.read()
        except HTTPError as error:
            raise RemoteError(self._refusal(error.code, error.read())) from None
        except (URLError, OSError) as error:
            raise RemoteError(self._unreachable(getattr(error, "reason", error))) from None

    def json(self, path: str, method: str = "GET", body: bytes | None = None) -> Any:
        """Return the server's answer, parsed as JSON."""
        try:
            return json.loads(self.get(path, method, body))
        except ValueError:
            raise RemoteError(f"{self} does not answer like a server of diffsight: it sent no JSON") from None

    def connect(self, model: str, longest: int) -> "Connection":
        """Open a WebSocket to a model. Waits in the queue of the server until a replica is free."""
        return Connection(self, model, longest)

    def websocket(self, model: str) -> str:
        """Return the WebSocket address for runs of a model."""
        scheme = "wss" if self.parts.scheme == "https" else "ws"
        place = f"{self.parts.path.rstrip('/')}/runs/{quote(model)}/open"
        return urlunsplit((scheme, self.parts.netloc, place, "", ""))

    def _refusal(self, status: int, body: bytes) -> str:
        try:
            why = json.loads(body)["error"]
        except (ValueError, KeyError, TypeError):
            full = ": too many runs wait for the model, or its replica failed. Try again later" if status >= 500 else ""
            why = f"it answers with status {status}{full}"
        if status in (401, 403):
            return f"the server at {self} refuses the key: {why}. Pass api_key=, or set {KEY}"
        return f"the server at {self}: {why}"

    def _unreachable(self, why: object) -> str:
        return f"there is no server at {self} ({why}). Start one with `diffsight serve MODEL`, or check the address"


class Connection:
    """One WebSocket to a model, which sends and receives messages one at a time."""

    def __init__(self, address: Address, model: str, longest: int) -> None:
        try:
            from websockets.exceptions import InvalidHandshake, InvalidStatus
            from websockets.sync.client import connect
        except ImportError:
            raise RemoteError("remote runs need the package websockets: pip install 'diffsight[remote]'") from None
        self._address, self._chunks = address, Chunks(longest)
        try:
            self._socket: Any = connect(
                address.websocket(model),
                additional_headers=address.headers,
                max_size=longest,
                open_timeout=_QUEUE,
                compression=None,
                ping_interval=None,
                proxy=None,
            ).__enter__()
        except InvalidStatus as error:
            raise RemoteError(address._refusal(error.response.status_code, error.response.body or b"")) from None
        except (OSError, InvalidHandshake, TimeoutError) as error:
            raise RemoteError(address._unreachable(error)) from None

    @property
    def is_open(self) -> bool:
        """Whether the WebSocket is open, as far as is known here. The server closes it when it ends a run."""
        from websockets.protocol import State

        return self._socket.protocol.state is State.OPEN

    def send(self, message: dict[str, Any], tensors: dict[str, Any]) -> None:
        """Send a message with its tensors."""
        for part in split(pack(message, tensors)):
            self._exchange(lambda part=part: self._socket.send(part))

    def receive(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the next message and its tensors."""
        while (frame := self._chunks.add(self._exchange(self._socket.recv))) is None:
            pass
        return unpack(frame)

    def close(self) -> None:
        """Close the WebSocket, which ends the run that is open on the server. May be called again."""
        self._socket.__exit__(None, None, None)

    def _exchange(self, function: Callable[[], Frame | None]) -> Any:
        from websockets.exceptions import ConnectionClosed

        try:
            return function()
        except ConnectionClosed as error:
            self._raise_last_words()
            frame = error.rcvd
            why = frame.reason if frame is not None and frame.reason else "the connection was lost"
            raise RemoteError(f"the run on {self._address} has ended: {why}") from None

    def _raise_last_words(self) -> None:
        """Raise the error that the server sent before it closed the connection, if there is one."""
        from websockets.exceptions import ConnectionClosed

        with suppress(ConnectionClosed, TimeoutError):
            while True:
                frame = self._chunks.add(self._socket.recv(timeout=0))
                message = {} if frame is None else unpack(frame)[0]
                if message.get("say") == "error":
                    raise error_of(message["error"])
