"""The thread in which a server carries out runs: it is shared by connections, one after the other."""

import asyncio
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from diffsight.gallery.serve import conversation
from diffsight.gallery.serve.connection_limits import Limits
from diffsight.gallery.serve.conversation import Closed, Conversation
from diffsight.gallery.serve.daemon_thread import DaemonThread
from diffsight.remote import RunEnded

OPENING = {"version": 1, "method": None, "args": [], "kwargs": {}, "edits": [], "half": False, "grad": False}
FIND = {"body": None, "do": [{"op": "find", "name": "it"}]}


class Client:
    """A client that calls a function on the server. It leaves when `leaves` is set, or else with its answer."""

    def __init__(self, leaves=None):
        self.frames, self.leaves, self.answers = [json.dumps(OPENING), json.dumps(FIND)], leaves, []
        self.has_left = asyncio.Event()

    async def receive(self):
        if self.frames:
            return self.frames.pop(0)
        while not (self.answers if self.leaves is None else self.leaves.is_set()):
            await asyncio.sleep(0.01)
        self.has_left.set()
        raise Closed

    async def send(self, frame):
        self.answers.append(json.loads(frame))


def start(client, threads, it):
    return asyncio.create_task(Conversation(None, {"it": it}, Limits(), "test", threads).run(client))


def test_nothing_is_done_for_a_client_that_left_while_it_waited():
    leaves, calls = threading.Event(), []
    leaves.set()

    async def main(threads):
        client, is_free = Client(leaves), threading.Event()
        threads.submit(is_free.wait)
        run = start(client, threads, lambda: calls.append(1))
        await client.has_left.wait()
        is_free.set()
        await run

    with ThreadPoolExecutor(1) as threads:
        asyncio.run(main(threads))
    assert calls == []


def test_no_other_client_is_interrupted(monkeypatch):
    """A session is interrupted again until it has ended, whatever ends it. The next one has the same thread."""
    monkeypatch.setattr(conversation, "_AGAIN", 0.1)
    leaves = threading.Event()

    class Left(BaseException):
        pass

    def fail():
        leaves.set()
        try:
            wait()
        except RunEnded:
            raise Left from None

    def wait():
        for _ in range(30):
            time.sleep(0.01)
        return 5

    async def main(threads):
        with pytest.raises(Left):
            await start(Client(leaves), threads, fail)
        client = Client()
        await start(client, threads, wait)
        return client.answers

    with ThreadPoolExecutor(1) as threads:
        (answer,) = asyncio.run(main(threads))
    assert answer["value"] == 5


def test_the_thread_of_a_replica():
    """It does not delay the end of the process, and goes on after an error."""

    def fail():
        raise SystemExit(3)

    threads = DaemonThread("run")
    first, failed, second = (
        threads.submit(call) for call in (threading.current_thread, fail, threading.current_thread)
    )
    with pytest.raises(SystemExit):
        failed.result(5)
    assert first.result(5).daemon and first.result(5) is second.result(5)
