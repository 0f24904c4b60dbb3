"""The commands `diffsight serve` and `diffsight key`."""

import argparse
import os
import signal
import threading
from typing import Any

from diffsight.errors import InputError
from diffsight.gallery.command_options import add_command
from diffsight.gallery.option_parsing import parse_positive

_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_LIMITS = ("run_seconds", "idle_seconds", "frame_bytes", "memory_bytes")


def add_serve_commands(commands: Any) -> None:
    """Add these commands to the command line."""
    serve = add_command(
        commands,
        "serve",
        _serve,
        help="serve models for remote runs",
        description="Serve models for remote runs, with Ray Serve. Needs the extra `server`.",
        example="diffsight/shapes-clip",
    )
    serve.add_argument("models", nargs="+", metavar="MODEL", help="packaged name, folder or hub id; or NAME=MODEL")
    serve.add_argument("--host", default="127.0.0.1", help="the address to listen on (default: the loopback)")
    serve.add_argument("--port", type=int, default=8000, help="the port (default: 8000)")
    serve.add_argument("--keys", metavar="FILE", help="the file of API keys, see `diffsight key`")
    serve.add_argument(
        "--replicas", type=parse_positive, default=1, metavar="N", help="replicas of each model (default: 1)"
    )
    serve.add_argument(
        "--max-replicas", type=parse_positive, metavar="N", help="add replicas up to this number under load"
    )
    serve.add_argument("--num-gpus", type=float, default=0.0, metavar="X", help="GPUs of each replica (default: 0)")
    serve.add_argument("--num-cpus", type=float, default=1.0, metavar="X", help="CPUs of each replica (default: 1)")
    serve.add_argument("--device", help="the device of the models (default: cuda with GPUs, else the CPU)")
    serve.add_argument("--device-map", help="how a model is spread over the GPUs of a replica, such as auto")
    serve.add_argument("--dtype", help="the type of the weights, such as bfloat16 (default: that of the files)")
    serve.add_argument("--run-seconds", type=float, default=600.0, metavar="S", help="the longest run (default: 600)")
    serve.add_argument("--idle-seconds", type=float, default=60.0, metavar="S", help="longest silence (default: 60)")
    serve.add_argument(
        "--frame-bytes", type=parse_positive, metavar="N", help="bytes of a client's message (default: 1 GiB)"
    )
    serve.add_argument(
        "--memory-bytes",
        type=parse_positive,
        metavar="N",
        help="end runs while a replica uses more (default: no limit)",
    )
    serve.add_argument(
        "--queue", type=parse_positive, default=100, metavar="N", help="runs of a key that may wait (default: 100)"
    )
    key = add_command(
        commands,
        "key",
        _key,
        help="make an API key for a server",
        description="Make a new API key, print it once, and add its hash to a file for `diffsight serve --keys`.",
        example="keys.txt alice",
    )
    key.add_argument("file", metavar="FILE", help="the file of keys, created if it does not exist")
    key.add_argument("name", metavar="NAME", help="whose key it is")
    key.add_argument(
        "--runs", type=parse_positive, default=8, metavar="N", help="runs that it may have open (default: 8)"
    )


def _key(options: argparse.Namespace) -> None:
    from diffsight.gallery.serve.keys import add_key

    print(add_key(options.file, options.name, options.runs))


def _serve(options: argparse.Namespace) -> None:
    models = _named(options.models)
    if options.host not in _LOOPBACK and options.keys is None:
        raise InputError(f"--host {options.host} lets other machines in: pass --keys FILE, which `diffsight key` makes")
    server = start(
        models,
        host=options.host,
        port=options.port,
        keys=options.keys,
        replicas=options.replicas,
        most=options.max_replicas,
        resources={"num_gpus": options.num_gpus, "num_cpus": options.num_cpus},
        device=options.device or ("cuda" if options.num_gpus and not options.device_map else None),
        options=_options(options),
        limits={name: getattr(options, name) for name in _LIMITS if getattr(options, name) is not None},
        queue=options.queue,
    )
    print(f"serving {', '.join(models)} at http://{options.host}:{options.port} (Ctrl-C ends it)", flush=True)
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    ended.wait()
    server.shutdown()


def start(
    models: dict[str, str],
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    keys: str | None = None,
    replicas: int = 1,
    most: int | None = None,
    resources: dict[str, float] | None = None,
    device: str | None = None,
    options: dict[str, Any] | None = None,
    limits: dict[str, Any] | None = None,
    queue: int = 100,
) -> Any:
    """Start Ray Serve with an application for each model, and return the module `ray.serve`, which can shut it down.

    Args:
        models: The models to open, by the names under which they are served.
        host, port: The address and port to listen on.
        keys: The file of keys.
        replicas: The number of replicas of each model. Under load, replicas are added up to `most`.
        resources: `num_gpus` and `num_cpus` of each replica.
        device: The device to move the models to.
        options: Arguments of the class that opens the models.
        limits: The limits of one connection.
        queue: How many runs of a key may wait for a replica of a model.

    Raises:
        InputError: Ray is not installed, a model cannot be opened, or the file of keys is not valid.
    """
    from diffsight.gallery.model_opening import open_model
    from diffsight.gallery.serve.application_names import FRONT, app_of, route_of
    from diffsight.gallery.serve.keys import Keys

    Keys(keys)
    for source in models.values():
        open_model(source)  # without weights, so that a wrong name raises an error here and not in a replica
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if "RAY_ADDRESS" not in os.environ:  # Ray on this machine only, which then listens on the loopback
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    try:
        import ray
        from ray import serve
    except ImportError:
        raise InputError("`diffsight serve` needs Ray Serve: pip install 'diffsight[server]'") from None
    from diffsight.gallery.serve.front_deployment import front_app
    from diffsight.gallery.serve.model_deployment import model_app_with

    if not ray.is_initialized():
        cluster = os.environ.get("RAY_ADDRESS", "local")
        ray.init(cluster, include_dashboard=False, log_to_driver=False, logging_level="warning")
    serve.start(http_options={"host": host, "port": port})
    scaling: dict[str, Any] = {"num_replicas": replicas}
    if most is not None:
        scaling = {"autoscaling_config": {"min_replicas": replicas, "max_replicas": most, "target_ongoing_requests": 1}}
    common = {"keys": None if keys is None else os.path.abspath(keys), "limits": limits or {}}
    targets = [serve.RunTarget(front_app({"models": list(models), **common}), FRONT)]
    for name, source in models.items():
        args = {"name": name, "source": source, "options": options or {}, "device": device, "queue": queue, **common}
        app = model_app_with({"ray_actor_options": resources or {}} | scaling, args)
        targets.append(serve.RunTarget(app, app_of(name), route_of(name)))
    serve.run_many(targets)
    return serve


def _named(words: list[str]) -> dict[str, str]:
    """Return the models to open, by name."""
    found: dict[str, str] = {}
    for word in words:
        name, is_named, source = word.partition("=")
        source = source if is_named else word
        if not is_named and os.path.isdir(source):
            name = os.path.basename(os.path.abspath(source))
        if name in found:
            raise InputError(f"{name} appears twice: give each model a different name, as in NAME=MODEL")
        found[name] = source
    return found


def _options(options: argparse.Namespace) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if options.device_map:
        found["device_map"] = options.device_map
    if options.dtype:
        import torch

        dtype = getattr(torch, options.dtype, None)
        if not isinstance(dtype, torch.dtype):
            raise InputError(f"--dtype: there is no tensor type called {options.dtype!r}; use one such as bfloat16")
        found["torch_dtype"] = options.dtype
    return found
