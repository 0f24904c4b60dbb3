"""The front on Ray Serve: answers all requests except runs, keeps track of open runs, and stores the results of jobs.

    application = front_app({"models": ["diffsight/shapes-clip"]})

The builder takes a dictionary, so that a Serve config file can refer to it; see the documentation of remote runs. The
front does not need PyTorch.
"""

import asyncio
import time
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request, Response
from ray import serve
from ray.serve.exceptions import RayServeException

from diffsight.errors import DiffsightError
from diffsight.gallery.serve.application_names import app_of, check_settings
from diffsight.gallery.serve.connection_limits import Limits
from diffsight.gallery.serve.front import Front
from diffsight.gallery.serve.jobs import Jobs
from diffsight.gallery.serve.keys import Key, Keys, key_in

# Serve pickles an API where its class is defined, so everything that its methods use is defined above it.

_front_api = FastAPI(openapi_url=None)


def _response(answer: tuple[int, str, bytes]) -> Response:
    status, kind, body = answer
    return Response(body, status_code=status, media_type=kind)


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

    async def job_begins(self, number: str) -> None:
        """Record that a replica has begun with a job."""
        self._jobs.begins(number)

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
            try:
                handles = [serve.get_app_handle(app) for app in self._models.values()]
            except RayServeException:
                return Front.error(503, "its models are still being started. Try again later")
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
        return Front.json(
            self._jobs.start(key.name, key.runs, lambda number: handle.work.remote(number, frame, key=key.name))
        )

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


def front_app(args: Mapping[str, Any]) -> Any:
    """Build the application that answers all requests except runs.

    Args:
        args: `models`, the names of the models; optionally `keys`, `limits`, and `keep_seconds` (3600 by default).

    Raises:
        InputError: There is an unknown argument.
    """
    check_settings("front_app", args, {"models", "keys", "limits", "keep_seconds"})
    models = {name: app_of(name) for name in args["models"]}
    return FrontReplica.bind(models, args.get("keys"), dict(args.get("limits") or {}), args.get("keep_seconds", 3600.0))
