"""The deployment on Ray Serve: an application for each model, and a front that answers all other requests.

    application = model_app({"name": "diffsight/shapes-clip", "source": "diffsight/shapes-clip"})

A replica holds the model and serves one connection at a time. Ray Serve queues other connections in order of arrival,
and starts replicas on one or more machines. The front keeps track of open runs and stores the results of jobs.

Both builders take a dictionary, so that a Serve config file can refer to them; see the documentation of remote runs.
"""

import asyncio
import time
import uuid
from collections.abc import Mapping
from typing import Any

import torch
from fastapi import FastAPI, Request, Response, WebSocket
from ray import serve

from diffsight.errors import DiffsightError, InputError
from diffsight.gallery.opening import open_model
from diffsight.gallery.serve.conversation import Conversation, Limits
from diffsight.gallery.serve.descriptions import configuration, description
from diffsight.gallery.serve.front import Front
from diffsight.gallery.serve.jobs import Jobs
from diffsight.gallery.serve.keys import Key, Keys, key_in
from diffsight.gallery.serve.services import services_of
from diffsight.gallery.serve.sockets import JobSocket, ServeSocket
from diffsight.remote import lens_frames

# Serve pickles an API where its class is defined, so everything that its methods use is defined above it.

_TYPES = ("torch_dtype", "dtype")  # options that a config file gives as names, such as "bfloat16"
FRONT = "front"  # the application that answers all requests except runs
_model_api, _front_api = FastAPI(openapi_url=None), FastAPI(openapi_url=None)


def _response(answer: tuple[int, str, bytes]) -> Response:
    status, kind, body = answer
    return Response(body, status_code=status, media_type=kind)


def _with_types(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options with dtypes in place of their names."""
    types = {name: getattr(torch, str(options[name]), options[name]) for name in _TYPES if name in options}
    return {**options, **types}


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
        self._name, self._limits, self._keys = name, Limits(**limits), Keys(keys)
        self._model = open_model(source, **_with_types(options))
        self._model.module  # loads the weights, so that the first run does not wait for them
        if device is not None:
            self._model.to(device)
        if hasattr(self._model, "set_progress_bar_config"):
            self._model.set_progress_bar_config(disable=True)
        self._services = services_of(self._model)

    def describe(self) -> tuple[dict[str, Any], bytes]:
        """Return the entry of the model in `/models`, and its configuration."""
        return description(self._name, self._model), configuration(self._model)

    @_model_api.websocket("/open")
    async def run(self, socket: WebSocket) -> None:
        """Serve a connection."""
        key = self._keys.find(key_in(socket.headers))
        if key is None:
            await socket.close(3000, "the key is missing or unknown")
            return
        number, front = uuid.uuid4().hex[:12], serve.get_app_handle(FRONT)
        if not await front.begin.remote(number, key.name, key.runs, self._name):
            await socket.close(3003, f"the key already has {key.runs} open runs, which is its limit")
            return
        try:
            await socket.accept()
            conversation = Conversation(self._model, self._services, self._limits, f"{number} of {key.name}")
            client = ServeSocket(socket, self._limits.frame_bytes)
            await client.close(await conversation.run(client))
        finally:
            await front.end.remote(number)

    async def work(self, number: str, frame: bytes) -> bytes:
        """Carry out a job, and return the frame with its result."""
        socket = JobSocket(lens_frames(frame))
        await Conversation(self._model, self._services, self._limits, f"job {number}").run(socket)
        return socket.answer


@serve.deployment(max_ongoing_requests=1000, ray_actor_options={"num_cpus": 0})
@serve.ingress(_front_api)
class FrontReplica:
    """Answers plain HTTP requests, and keeps track of open runs.

    Args:
        models: The names of the models, mapped to the names of their applications.
        keys: The file of keys.
        limits: The limits of one connection.
        keep_seconds: How long the result of a job is kept.
    """

    def __init__(
        self, models: Mapping[str, str], keys: str | None, limits: Mapping[str, Any], keep_seconds: float
    ) -> None:
        self._models, self._keys, self._limits = dict(models), Keys(keys), Limits(**limits)
        self._front: Front | None = None
        self._runs: dict[str, dict[str, Any]] = {}
        self._jobs = Jobs(keep_seconds)

    async def begin(self, number: str, key: str, most: int, model: str) -> bool:
        """Record a run. Return False if its key already has the maximum number of open runs."""
        now, longest = time.time(), self._limits.run_seconds + self._limits.idle_seconds
        self._runs = {n: run for n, run in self._runs.items() if now - run["since"] < longest}  # of lost replicas
        if sum(run["key"] == key for run in self._runs.values()) >= most:
            return False
        self._runs[number] = {"run": number, "key": key, "model": model, "since": now}
        return True

    async def end(self, number: str) -> None:
        """Record that a run has ended."""
        self._runs.pop(number, None)

    @_front_api.api_route("/{path:path}", methods=["GET", "POST"])
    async def answer(self, path: str, request: Request) -> Response:
        """Answer a request."""
        key = self._keys.find(key_in(request.headers))
        if key is None:
            return _response(Front.error(401, "it is missing or unknown"))
        try:
            return _response(await self._answer(f"/{path}", request, key))
        except DiffsightError as error:
            return _response(Front.error(400, str(error)))

    async def _answer(self, path: str, request: Request, key: Key) -> tuple[int, str, bytes]:
        if path == "/status":
            return Front.json(self._status(key))
        if path.startswith("/jobs/"):
            return self._jobs.answer(path.removeprefix("/jobs/"), key.name)
        if path.endswith("/jobs") and request.method == "POST":
            return await self._submit(Front.model_of(path), request, key)
        if self._front is None:
            handles = [serve.get_app_handle(app) for app in self._models.values()]
            self._front = Front(await asyncio.gather(*(handle.describe.remote() for handle in handles)))
        return self._front.answer(path)

    async def _submit(self, model: str, request: Request, key: Key) -> tuple[int, str, bytes]:
        if model not in self._models:
            return Front.error(404, f"there is no model {model!r}: it has {', '.join(self._models)}")
        body = bytearray()
        async for part in request.stream():
            body += part
            if len(body) > self._limits.frame_bytes:
                return Front.error(413, f"a job takes no more than {self._limits.frame_bytes} bytes")
        handle, frame = serve.get_app_handle(self._models[model]), bytes(body)
        lens_frames(frame)  # raises an error if the frame is not a job
        return Front.json(self._jobs.start(key.name, key.runs, lambda number: handle.work.remote(number, frame)))

    def _status(self, key: Key) -> dict[str, Any]:
        apps = serve.status().applications
        runs = [
            {"run": run["run"], "model": run["model"], "seconds": round(time.time() - run["since"], 1)}
            for run in self._runs.values()
            if run["key"] == key.name
        ]
        models = {}
        for name, app in self._models.items():
            deployments = apps[app].deployments.values() if app in apps else ()
            states = {state: count for one in deployments for state, count in one.replica_states.items()}
            models[name] = {"status": str(apps[app].status.value) if app in apps else "MISSING", "replicas": states}
        open_runs = {name: sum(run["model"] == name for run in self._runs.values()) for name in self._models}
        return {"models": models, "open_runs": open_runs, "your_runs": runs, "your_jobs": self._jobs.of(key.name)}


# ---- builders, for `diffsight serve` and for Serve config files


def app_of(name: str) -> str:
    """Return the name of the application of a model."""
    return "model-" + "".join(letter if letter.isalnum() else "-" for letter in name)


def route_of(name: str) -> str:
    """Return the route of the runs of a model."""
    return f"/runs/{name}"


def model_app(args: Mapping[str, Any], **settings: Any) -> Any:
    """Build the application of a model.

    Args:
        args: `name`; optionally `source` (by default the name), `options`, `device`, `keys`, and `limits`.
        settings: Settings of the deployment, such as `num_replicas`. A config file has a separate section for them.

    Raises:
        InputError: There is an unknown argument.
    """
    _check("model_app", args, {"name", "source", "options", "device", "keys", "limits"})
    limits = dict(args.get("limits") or {})
    Limits(**limits)
    name = args["name"]
    return ModelReplica.options(**settings).bind(
        name, args.get("source", name), dict(args.get("options") or {}), args.get("device"), args.get("keys"), limits
    )


def front_app(args: Mapping[str, Any]) -> Any:
    """Build the application that answers all requests except runs.

    Args:
        args: `models`, the names of the models; optionally `keys`, `limits`, and `keep_seconds` (3600 by default).

    Raises:
        InputError: There is an unknown argument.
    """
    _check("front_app", args, {"models", "keys", "limits", "keep_seconds"})
    models = {name: app_of(name) for name in args["models"]}
    return FrontReplica.bind(models, args.get("keys"), dict(args.get("limits") or {}), args.get("keep_seconds", 3600.0))


def _check(builder: str, args: Mapping[str, Any], known: set[str]) -> None:
    unknown = sorted(args.keys() - known)
    if unknown:
        raise InputError(f"{builder} has no argument {unknown[0]!r}; its arguments are {', '.join(sorted(known))}")
