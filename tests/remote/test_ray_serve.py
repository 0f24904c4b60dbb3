"""Runs on an instance of Ray Serve, which the tests start on the loopback: two replicas of a small language model."""

import os
import threading
import time
from pathlib import Path

import pytest
import torch
import yaml

pytest.importorskip("ray", reason="these tests need the extra `server`")
pytest.importorskip("fastapi", reason="these tests need the extra `server`")

import ray

from diffsight import LanguageModel, logit_lens
from diffsight.gallery.serve.keys import add_key
from diffsight.gallery.serve.serve_command import start
from diffsight.remote import RemoteError
from helpers import same

IDS = torch.tensor([[5, 17, 42, 8]])
LIMITS = {"run_seconds": 60.0, "idle_seconds": 20.0, "frame_bytes": 1 << 26}


@pytest.fixture(scope="module")
def folder(gpt2, tmp_path_factory):
    place = tmp_path_factory.mktemp("served") / "gpt2"
    gpt2.save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def served(folder, tmp_path_factory):
    """Return the address of a server, and a key for it."""
    keys = tmp_path_factory.mktemp("keys") / "keys.txt"
    key, port = add_key(keys, "tests"), 18000 + os.getpid() % 2000
    serve = start(
        {"gpt2": str(folder)}, port=port, keys=str(keys), replicas=2, resources={"num_cpus": 0.1}, limits=LIMITS
    )
    yield f"http://127.0.0.1:{port}", key
    serve.shutdown()
    ray.shutdown()


@pytest.fixture
def model(served):
    address, key = served
    return LanguageModel("gpt2", remote=address, api_key=key)


@pytest.fixture(scope="module")
def local(folder):
    return LanguageModel(str(folder))


def body(model, ids=IDS):
    with model.generate(ids, max_new_tokens=3, do_sample=False) as run:
        found = []
        for step in run.steps:
            run.layers_output[1][:, -1] += step.index
            found += [run.layers_output[2], step.tokens]
    return [*found, run.result]


def test_the_config_file_of_the_documentation():
    """Ray accepts it, and so do the builders that it names."""
    from ray.serve.schema import ServeDeploySchema

    from diffsight.gallery.serve import deployment

    text = (Path(__file__).parents[2] / "docs" / "serve_config.yaml").read_text(encoding="utf-8")
    config = ServeDeploySchema(**yaml.safe_load(text))
    assert [app.name for app in config.applications][-1] == deployment.FRONT
    for app in config.applications:
        builder = getattr(deployment, app.import_path.partition(":")[2])
        assert [one.name for one in app.deployments] in ([], ["ModelReplica"])
        builder(app.args)
        if builder is deployment.model_app:
            assert (app.name, app.route_prefix) == (
                deployment.app_of(app.args["name"]),
                deployment.route_of(app.args["name"]),
            )


def test_the_same_values(model, local):
    with torch.no_grad():
        assert same(body(model), body(local))


def test_two_runs_at_once_on_two_replicas(model, local):
    with model.trace(IDS) as x, model.trace(IDS + 1) as y:
        y.layers_output[1] = x.layers_output[1]
    with torch.no_grad(), local.trace(IDS) as a, local.trace(IDS + 1) as b:
        b.layers_output[1] = a.layers_output[1]
    assert torch.equal(y.result.logits, b.result.logits) and torch.equal(x.result.logits, a.result.logits)


def test_clients_at_once_wait_for_their_turn(served, local):
    address, key = served
    found = {}

    def client(number):
        model = LanguageModel("gpt2", remote=address, api_key=key)
        found[number] = body(model, (IDS + 7 * number) % 61)

    threads = [threading.Thread(target=client, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with torch.no_grad():
        assert len(found) == 8 and all(same(found[n], body(local, (IDS + 7 * n) % 61)) for n in found)


def test_a_frame_of_many_megabytes(model, local):
    value = torch.zeros(1, 4, 16).expand(1, 4, 16).clone()
    big = torch.randn(1, 1 << 22)  # 16 MiB: more than Serve takes in one message
    assert torch.equal(model.server.ask(call_of("transformer.drop", big)), big)
    with model.trace(IDS) as run:
        run.layers_output[1] = value
    with torch.no_grad(), local.trace(IDS) as expected:
        expected.layers_output[1] = value
    assert torch.equal(run.result.logits, expected.result.logits)


def call_of(path, value):
    return {"op": "call", "path": path, "method": "", "args": [value], "kwargs": {}, "hook": False}


def test_lenses_and_jobs(model, local):
    expected = logit_lens(local, IDS, top_k=3)
    assert torch.equal(logit_lens(model, IDS, top_k=3).ids, expected.ids)
    job = model.server.submit("logit_lens", IDS, top_k=3)
    assert torch.equal(job.result(timeout=60).ids, expected.ids) and job.status == "done"
    with pytest.raises(ValueError, match="there is no layer 9"):
        model.server.submit("logit_lens", IDS, layers=9).result(timeout=60)


def test_status_tells_of_ones_own_runs(model):
    with model.trace(IDS) as run:
        run.layers[0].output
        status = model.server.address.json("/status")
    assert status["open_runs"] == {"gpt2": 1} and len(status["your_runs"]) == 1


def test_a_wrong_key(served):
    address, _ = served
    with pytest.raises(RemoteError, match="refuses the key"):
        LanguageModel("gpt2", remote=address, api_key="ds-wrong")


def test_a_replica_that_is_killed_in_a_run(model, local):
    """The run fails with a clear error, the others go on, and Serve starts another replica."""
    with pytest.raises(RemoteError, match=r"the run on http://127\.0\.0\.1:.* has ended"):
        with model.trace(IDS) as run:
            run.layers[0].output
            for actor in ray.util.list_named_actors(all_namespaces=True):
                if "ModelReplica" in actor["name"]:
                    ray.kill(ray.get_actor(actor["name"], namespace=actor["namespace"]))
            time.sleep(1)
            run.layers[1].output
    for attempt in range(60):
        try:
            with torch.no_grad():
                assert same(body(model), body(local))
            break
        except RemoteError:
            assert attempt < 59
            time.sleep(1)
