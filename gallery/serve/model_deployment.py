"""The deployment of a model on Ray Serve, as an application of its own.

    application = model_app({"name": "diffsight/shapes-clip", "source": "diffsight/shapes-clip"})

A replica holds the model and serves one connection at a time. Ray Serve queues other connections, whose keys take turns
(see `fair_queue.py`), and starts replicas on one or more machines. All other requests go to the front; see
`front_deployment.py`.

The builder takes a dictionary, so that a Serve config file can refer to it; see the documentation of remote runs.
"""

import logging
import uuid
from collections.abc import Mapping
from typing import Any

import torch
from fastapi import FastAPI, WebSocket
from ray import serve
from ray.serve.config import RequestRouterConfig

from diffsight.gallery.model_opening import open_model
from diffsight.gallery.serve.application_names import FRONT, check_settings
from diffsight.gallery.serve.connection_limits import Limits
from diffsight.gallery.serve.conversation import Conversation
from diffsight.gallery.serve.daemon_thread import DaemonThread
from diffsight.gallery.serve.descriptions import configuration, description
from diffsight.gallery.serve.fair_queue import FairQueue
from diffsight.gallery.serve.job_socket import JobSocket
from diffsight.gallery.serve.keys import Keys, key_in
from diffsight.gallery.serve.services import services_of
from diffsight.gallery.serve.sockets import ServeSocket
from diffsight.key_hash import SESSION_HEADER
from diffsight.remote import ProtocolError, RemoteError, error_frame, job_frames

# Serve pickles an API where its class is defined, so everything that its methods use is defined above it.

_TYPES = ("torch_dtype", "dtype")  # options that a config file gives as names, such as "bfloat16"
_LONGEST_GLANCE = 0.1  # maximum seconds between checks for a free replica, for the first request in the queue
_model_api = FastAPI(openapi_url=None)


def _with_types(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options with dtypes in place of their names."""
    types = {name: getattr(torch, str(options[name]), options[name]) for name in _TYPES if name in options}
    return {**options, **types}


def _log_to_serve() -> None:
    """Write the log of runs to the log of the replica."""
    log = logging.getLogger("diffsight.serve")
    log.setLevel(logging.INFO)
    log.handlers, log.propagate = logging.getLogger("ray.serve").handlers, False


@serve.deployment(max_ongoing_requests=1)
@serve.ingress(_model_api)
class ModelReplica:
    """Holds a model and serves one connection at a time.

    Args:
        name: The name of the model.
        source: The model to open: a packaged name, a folder or a hub id.
        options: Arguments of the class that opens it, such as `device_map`.
        device: The device to move the model to. None leaves it where its options put it.
        keys: The file of keys. If None, anyone who can reach the server may use it.
        limits: The limits of one connection; see `Limits`.
    """

    def __init__(
        self,
        name: str,
        source: str,
        options: Mapping[str, Any],
        device: str | None,
        keys: str | None,
        limits: Mapping[str, Any],
    ) -> None:
        _log_to_serve()
        self._name, self._limits, self._keys = name, Limits(**limits), Keys(keys)
        self._model = open_model(source, **_with_types(options))
        self._model.module  # loads the weights, so that the first run does not wait for them
        if device is not None:
            self._model.to(device)
        if hasattr(self._model, "set_progress_bar_config"):
            self._model.set_progress_bar_config(disable=True)
        self._services = services_of(self._model)
        self._thread = DaemonThread("run")

    def describe(self) -> tuple[dict[str, Any], bytes]:
        """Return the entry of the model in `/models`, and its configuration."""
        return description(self._name, self._model), configuration(self._model)

    @_model_api.websocket("/open")
    async def run(self, socket: WebSocket) -> None:
        """Serve a connection."""
        key = self._keys.find(key_in(socket.headers))
        if key is None or self._keys.with_digest(socket.headers.get(SESSION_HEADER, "")) is not key:
            await socket.close(
                3000, f"the key is missing or unknown, or the {SESSION_HEADER} header does not belong to the key"
            )
            return
        await socket.accept()
        client = ServeSocket(socket, self._limits.frame_bytes)
        number, front = uuid.uuid4().hex[:12], serve.get_app_handle(FRONT)
        if not await front.begin.remote(number, key.name, key.runs, self._name):
            await client.refuse(RemoteError(f"the key already has {key.runs} open runs, which is its limit"))
            return
        try:
            await client.close(await self._conversation(f"{number} of {key.name}").run(client))
        finally:
            await front.end.remote(number)

    async def work(self, number: str, frame: bytes, key: str) -> tuple[bool, bytes]:
        """Carry out a job of a key. Return whether it has failed, and the frame with its result or its error."""
        await serve.get_app_handle(FRONT).job_begins.remote(number)
        try:
            socket = JobSocket(job_frames(frame))
        except ProtocolError as error:
            return True, error_frame(error).encode()
        await self._conversation(f"job {number} of {key}").run(socket)
        return socket.failed, socket.answer

    def _conversation(self, name: str) -> Conversation:
        return Conversation(self._model, self._services, self._limits, name, self._thread)


def model_app(args: Mapping[str, Any]) -> Any:
    """Build the application of a model, for a Serve config file, which has a separate section for settings.

    Args:
        args: `name`; optionally `source` (by default the name), `options`, `device`, `keys`, `limits`, and `queue` (how
            many runs of a key may wait, by default 100).

    Raises:
        InputError: There is an unknown argument.
    """
    return model_app_with({}, args)


def model_app_with(settings: Mapping[str, Any], args: Mapping[str, Any]) -> Any:
    """Build the application of a model.

    Args:
        settings: Settings of the deployment, such as `num_replicas`.
        args: The arguments of `model_app`.

    Raises:
        InputError: There is an unknown argument.
    """
    check_settings("model_app", args, {"name", "source", "options", "device", "keys", "limits", "queue"})
    limits = dict(args.get("limits") or {})
    Limits(**limits)
    name, keys = args["name"], args.get("keys")
    queue = RequestRouterConfig(
        request_router_class=FairQueue,
        request_router_kwargs={"keys": keys, "longest": args.get("queue", 100)},
        max_backoff_s=_LONGEST_GLANCE,
    )
    return ModelReplica.options(request_router_config=queue, **settings).bind(
        name, args.get("source", name), dict(args.get("options") or {}), args.get("device"), keys, limits
    )
