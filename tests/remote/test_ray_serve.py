"""What only Ray Serve can show: `diffsight serve` with two replicas of each model, on the loopback.

The server is a process of its own, with a temporary folder of its own. All waits have a deadline.
"""

import importlib.util
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from urllib.request import urlopen

import pytest
import torch

if not importlib.util.find_spec("ray") or not importlib.util.find_spec("fastapi"):
    pytest.skip("these tests need the extra `server`", allow_module_level=True)

from diffsight import DiffusionModel, LanguageModel, logit_lens
from diffsight.errors import DiffsightError
from diffsight.gallery.serve.keys import add_key
from diffsight.pipelines.packaged import PIPELINES
from diffsight.remote import RemoteError
from helpers import same, same_image

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Ray's own
IDS = torch.tensor([[5, 17, 42, 8]])
PACKAGED, PROMPT = list(PIPELINES), "a red circle above a blue square"
DOCS = Path(__file__).parents[2] / "docs"
QUEUE = 10  # runs of a key that may wait
START, SHORT = 300, 120  # seconds to wait for the server, and for anything else
KILL_ONE_REPLICA = """
import sys, ray
ray.init(sys.argv[1], log_to_driver=False, namespace="serve")
names = [one["name"] for one in ray.util.list_named_actors(all_namespaces=True)]
ray.kill(ray.get_actor(next(name for name in names if "model-gpt2#ModelReplica" in name)))
"""


class Served:
    """A server, started by the command."""

    def __init__(self, folder: Path, model: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.address, self.folder, keys = f"http://127.0.0.1:{port}", folder, folder / "keys.txt"
        self.key, self.other_key = add_key(keys, "tests", 16), add_key(keys, "other", 1)
        self.environment = os.environ | {
            "RAY_TMPDIR": str(folder),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
            "OMP_NUM_THREADS": "1",
            "RAY_worker_niceness": "0",  # not behind everything else that this machine runs
        }
        self.environment.pop("RAY_ADDRESS", None)
        options = ["--port", str(port), "--keys", str(keys), "--replicas", "2", "--num-cpus", "0.1"]
        options += ["--frame-bytes", str(1 << 25), "--run-seconds", "120", "--queue", str(QUEUE)]
        self.log = folder / "output.txt"
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(
                [Path(sys.executable).with_name("diffsight"), "serve", f"gpt2={model}", *PACKAGED, *options],
                env=self.environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def output(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def wait_until_ready(self) -> None:
        wait_for(lambda: "serving gpt2" in self.output() or self.process.poll() is not None, START, self.output)
        assert self.process.poll() is None, self.output()

    def kill_one_replica(self) -> None:
        session = self.folder / "ray" / "session_latest"
        (port,) = (file.read_text() for file in session.glob("gcs_server_port_*"))
        arguments = [sys.executable, "-c", KILL_ONE_REPLICA, f"127.0.0.1:{port}"]
        subprocess.run(arguments, env=self.environment, check=True, timeout=SHORT, capture_output=True)

    def end(self) -> None:
        """Stop the server as Ctrl-C does; if it does not end in time, kill the processes of its own session."""
        self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(SHORT)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)


def wait_for(condition, seconds, describe=lambda: ""):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, describe()
        time.sleep(0.1)


@pytest.fixture(scope="module")
def folder(gpt2, tmp_path_factory):
    place = tmp_path_factory.mktemp("served") / "gpt2"
    gpt2.save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def served(folder):
    place = Path(tempfile.mkdtemp(prefix="ds", dir="/tmp"))  # short, since the names of sockets are in it
    server = Served(place, folder)
    try:
        server.wait_until_ready()
        yield server
    finally:
        server.end()
        shutil.rmtree(place, ignore_errors=True)


@pytest.fixture
def model(served):
    return LanguageModel("gpt2", remote=served.address, api_key=served.key)


@pytest.fixture(scope="module")
def local(folder):
    return LanguageModel(str(folder))


def body(model, ids=IDS):
    with torch.no_grad(), model.generate(ids, max_new_tokens=3, do_sample=False) as run:
        found = []
        for step in run.steps:
            run.layers_output[1][:, -1] += step.index
            found += [run.layers_output[2], step.tokens]
    return [*found, run.result]


@pytest.mark.parametrize("name", ["serve_config.yaml", "ray_service.yaml"])
def test_the_config_files_of_the_documentation(name):
    """Ray accepts them, and builds the applications in the way in which it does for a config file."""
    import yaml
    from ray.serve._private.api import call_user_app_builder_with_args_if_necessary as build
    from ray.serve.schema import ServeDeploySchema

    from diffsight.gallery.serve import application_names, front_deployment, model_deployment

    data = yaml.safe_load((DOCS / name).read_text(encoding="utf-8"))
    if data.get("kind") == "RayService":
        data = yaml.safe_load(data["spec"]["serveConfigV2"])
    config = ServeDeploySchema(**data)
    *models, front = config.applications
    assert front.name == application_names.FRONT and front.import_path == f"{front_deployment.__name__}:front_app"
    assert front.args["models"] == [app.args["name"] for app in models]
    build(front_deployment.front_app, front.args)
    for app in models:
        name = app.args["name"]
        assert (app.name, app.route_prefix) == (application_names.app_of(name), application_names.route_of(name))
        assert app.import_path == f"{model_deployment.__name__}:model_app"
        build(model_deployment.model_app, app.args)
        assert [one.name for one in app.deployments] == [model_deployment.ModelReplica.name]


def test_the_same_values(model, local, served):
    assert same(body(model), body(local))


def test_eight_clients_on_two_replicas(served, local):
    """Clients wait for their turn, and each gets its own values."""
    found = {}

    def client(number):
        model = LanguageModel("gpt2", remote=served.address, api_key=served.key)
        found[number] = body(model, (IDS + 7 * number) % 61)

    threads = [threading.Thread(target=client, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SHORT)
    assert len(found) == 8 and all(same(found[n], body(local, (IDS + 7 * n) % 61)) for n in found)


def test_keys_take_turns(served, model):
    """A key that fills its queue delays the run of another key by a run or two, and does not take its place."""
    runs, done = [model.trace(IDS), model.trace(IDS)], []
    for run in runs:
        run.layers[0].output  # both replicas are taken
    other = LanguageModel("gpt2", remote=served.address, api_key=served.other_key)

    def client(whose, model):
        try:
            model.trace(IDS).finish()
            done.append(whose)
        except RemoteError as error:
            done.append(str(error))

    threads = [threading.Thread(target=client, args=("tests", model)) for _ in range(QUEUE + 2)]
    threads.append(threading.Thread(target=client, args=("other", other)))
    for thread in threads:
        thread.start()
        time.sleep(0.1)  # so that they are in the queue in this order
    wait_for(lambda: len(done) == 2, SHORT)
    time.sleep(1)
    assert all("too many runs wait for the model" in text for text in done)
    for run in runs:
        run.stop()
    for thread in threads:
        thread.join(SHORT)
    assert sorted(done[2:]) == ["other"] + QUEUE * ["tests"] and "other" in done[2:6]


def test_long_frames_are_sent_in_parts_and_have_a_limit(model):
    def drop(value):
        op = {"op": "call", "path": "transformer.drop", "method": "", "args": [value], "kwargs": {}, "hook": False}
        return model.server.ask(op)

    big = torch.randn(1, 1 << 22)  # 16 MiB: more than Serve takes in one message
    assert torch.equal(drop(big), big)
    with pytest.raises(DiffsightError, match=f"the limit is {1 << 25}"):
        drop(big.repeat(1, 3))


def test_lenses_and_jobs(model, local):
    expected = logit_lens(local, IDS, top_k=3)
    assert torch.equal(logit_lens(model, IDS, top_k=3).ids, expected.ids)
    job = model.server.submit("logit_lens", IDS, top_k=3)
    assert torch.equal(job.result(timeout=SHORT).ids, expected.ids) and job.status == "done"
    assert model.server.address.json("/status")["your_jobs"][job.id] == "done"
    failed = model.server.submit("logit_lens", IDS, layers=9)
    with pytest.raises(ValueError, match="there is no layer 9"):
        failed.result(timeout=SHORT)
    assert failed.status == "failed"


def test_a_run_as_a_job(model, local):
    job = model.generate(IDS, max_new_tokens=3, do_sample=False, blocking=False)
    assert torch.equal(job.result(timeout=SHORT), local.generate(IDS, max_new_tokens=3, do_sample=False).result)


@pytest.mark.parametrize("name", PACKAGED)
def test_the_same_images(name, served):
    there = DiffusionModel(name, remote=served.address, api_key=served.key)
    expected, found = (one.generate(PROMPT, seed=3, num_inference_steps=2) for one in (DiffusionModel(name), there))
    assert same_image(found.images[0], expected.images[0])


def test_status_models_and_health(model, served):
    with model.trace(IDS) as run:
        run.layers[0].output
        status = model.server.address.json("/status")
        other = LanguageModel("gpt2", remote=served.address, api_key=served.other_key)
        assert other.server.address.json("/status")["your_runs"] == []
    assert status["open_runs"] == {"gpt2": 1} | dict.fromkeys(PACKAGED, 0) and len(status["your_runs"]) == 1
    assert all(one == {"status": "RUNNING", "replicas": {"RUNNING": 2}} for one in status["models"].values())
    assert {one["name"]: one["kind"] for one in model.server.address.json("/models")["models"]} == {
        "gpt2": "LanguageModel",
        **dict.fromkeys(PACKAGED, "DiffusionModel"),
    }
    with urlopen(f"{served.address}/-/healthz", timeout=SHORT) as answer:
        assert answer.read() == b"success"
    number = status["your_runs"][0]["run"]
    logs = (served.folder / "ray" / "session_latest" / "logs" / "serve").glob("replica_model-gpt2_*.log")
    assert any(f"run {number} of tests begins" in log.read_text() for log in logs)


def test_keys(served):
    with pytest.raises(RemoteError, match="refuses the key"):
        LanguageModel("gpt2", remote=served.address, api_key="ds-wrong")
    model = LanguageModel("gpt2", remote=served.address, api_key=served.other_key)
    with model.trace(IDS) as first:
        first.layers[0].output
        with pytest.raises(RemoteError, match="the key already has 1 open runs, which is its limit"):
            model.trace(IDS).finish()
    model.server.address.key = "ds-wrong"
    with pytest.raises(RemoteError, match="refuses the key"):
        model.trace(IDS).finish()


def test_a_replica_that_is_killed_in_a_run(served, model, local):
    """Its run fails with a clear error, the run on the other replica goes on, and Serve starts another replica."""
    runs, results = [model.trace(IDS), model.trace(IDS)], []
    for run in runs:
        run.layers[0].output
    served.kill_one_replica()
    for run in runs:
        try:
            results.append(run.layers[1].output)
            run.finish()
        except RemoteError as error:
            results.append(str(error))
    with torch.no_grad(), local.trace(IDS) as run:
        expected = run.layers[1].output
    lost, other = sorted(results, key=lambda one: isinstance(one, torch.Tensor))
    assert f"the run on {served.address} has ended" in lost and torch.equal(other, expected)

    def replicas():
        return json.dumps(model.server.address.json("/status")["models"]["gpt2"])

    wait_for(lambda: '"RUNNING": 2' in replicas(), START, replicas)
    assert same(body(model), body(local))
