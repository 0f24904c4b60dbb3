"""Jobs: lenses and runs without a body, whose results are kept on the server."""

import asyncio
import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from diffsight.errors import InputError
from diffsight.gallery.serve.connection_limits import Limits
from diffsight.gallery.serve.conversation import Conversation
from diffsight.gallery.serve.job_socket import JobSocket
from diffsight.gallery.serve.jobs import Jobs
from diffsight.gallery.serve.services import services_of
from diffsight.remote import Job, ProtocolError, RemoteError, job_frames
from helpers import refusal, same_image

IDS = torch.tensor([[5, 17, 42, 8]])
CLIP, PROMPT = "diffsight/shapes-clip", "a red circle"


class JobsHere:
    """Takes the place of the jobs of a server: they run in this process, one after the other."""

    def __init__(self, model):
        self._model, self._jobs, self._loop = model, Jobs(keep_seconds=60), asyncio.new_event_loop()

    def json(self, path, method="GET", body=None):
        if method == "POST":
            return self._loop.run_until_complete(self._start(body))
        return json.loads(self.get(path))

    async def _start(self, body):
        answer = self._jobs.start("me", 2, lambda number: self._work(number, body))
        await asyncio.gather(*asyncio.all_tasks() - {asyncio.current_task()})
        return answer

    async def _work(self, number, body):
        self._jobs.begins(number)
        socket = JobSocket(job_frames(body))
        with ThreadPoolExecutor() as threads:
            await Conversation(self._model, services_of(self._model), Limits(), number, threads).run(socket)
        return socket.failed, socket.answer

    def get(self, path):
        status, _, body = self._jobs.answer(path.removeprefix("/jobs/"), "me")
        if status != 200:
            raise RemoteError(json.loads(body)["error"])
        return body


@pytest.fixture
def there(monkeypatch):
    """Return a function that lets the jobs of a remote model run in this process, on the model given."""

    def let(remote, model):
        jobs = JobsHere(model)
        monkeypatch.setattr(remote.server.address, "json", jobs.json)
        monkeypatch.setattr(remote.server.address, "get", jobs.get)
        return remote

    return let


def test_a_run_without_a_body(pipelines, remote_pipelines, language, remote_language, there):
    job = there(remote_pipelines[CLIP], pipelines[CLIP]).generate(PROMPT, seed=3, num_inference_steps=2, blocking=False)
    expected = pipelines[CLIP].generate(PROMPT, seed=3, num_inference_steps=2)
    assert isinstance(job, Job) and job.status == "done" and same_image(job.result().images[0], expected.images[0])
    found = there(remote_language, language).trace(IDS, blocking=False).result()
    with torch.no_grad():
        assert torch.equal(found.logits, language.trace(IDS).result.logits)
    assert torch.equal(remote_language.generate(IDS, max_new_tokens=2, blocking=True).result[:, :4], IDS)


def test_a_lens(language, remote_language, there):
    job = there(remote_language, language).server.submit("logit_lens", IDS, layers=9)
    assert job.status == "failed"
    with pytest.raises(ValueError, match="there is no layer 9"):
        job.result()


def test_a_run_that_fails(language, remote_language, there):
    job = there(remote_language, language).trace(inputs_embeds=torch.zeros(1, 4, 5), blocking=False)
    assert job.status == "failed"
    with pytest.raises(RuntimeError, match="size of tensor"):
        job.result()


def test_what_cannot_be_a_job(language, remote_language, there):
    there(remote_language, language)
    edited = remote_language.edit(lambda run: run.layers[0].output)
    assert "edits of the model run on the client" in refusal(edited.trace, IDS, blocking=False)
    assert "leave out grad=True" in refusal(remote_language.trace, IDS, grad=True, blocking=False)
    assert "blocking" in refusal(language.trace, IDS, blocking=False)
    with pytest.raises(InputError, match="a job has no block"), remote_language.trace(IDS, blocking=False):
        pass
    for message in ({"body": None, "do": [{"op": "step"}]}, {"version": 1}, {"body": None, "do": []}):
        with pytest.raises(ProtocolError):
            job_frames(json.dumps(message).encode())


def test_a_lost_replica_and_an_unknown_job():
    async def lost(number):
        raise ConnectionError

    async def jobs():
        kept = Jobs(keep_seconds=60)
        number = kept.start("me", 2, lost)["job"]
        assert kept.of("me") == {number: "waiting"}
        await asyncio.sleep(0)
        return kept.of("me")[number], kept.answer(f"{number}/result", "me"), kept.answer(number, "other")

    status, (code, _, body), (unknown, _, _) = asyncio.run(jobs())
    assert (status, code, unknown) == ("failed", 500, 404) and b"was lost: ConnectionError. Submit it again" in body
