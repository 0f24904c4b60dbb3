"""Faults of clients and of the network: the run is unwound at once, others are served, and nothing is left behind."""

import gc
import json
import os
import socket
import threading
import time
import weakref
from contextlib import ExitStack, contextmanager, suppress

import pytest
import torch

pytest.importorskip("websockets", reason="remote runs need the package websockets")

from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from diffsight import LanguageModel
from diffsight.errors import DiffsightError, InputError
from diffsight.extending import tree_of
from diffsight.gallery.serve.conversation import Limits
from diffsight.gallery.serve.keys import Keys, add_key, key_in
from diffsight.key_hash import SESSION_HEADER
from diffsight.remote import RemoteError
from diffsight.remote.connection import Address
from helpers import footprint
from remote.serving import serving

# The exception that ends a run may come within a finalizer, where Python reports and drops it; it is raised again.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
IDS = torch.tensor([[5, 17, 42, 8]])
OPENING = {
    "version": 1,
    "method": "trace",
    "args": [[[5, 17, 42, 8]]],
    "kwargs": {},
    "edits": [],
    "half": False,
    "grad": False,
}
POINT = {"path": "transformer.h[1]", "part": "output", "call": 0, "selection": None}
ASK = {"body": None, "do": [{"op": "ask", **POINT}]}


@pytest.fixture(scope="module")
def limits():
    return Limits(run_seconds=3.0, idle_seconds=1.0, frame_bytes=1 << 20)


@pytest.fixture(scope="module")
def served(language, limits):
    with serving({"gpt2": language}, limits) as address:
        yield address


@pytest.fixture(scope="module")
def patient(language):
    """Return the address of a server that does not end a run when this machine is busy for a second."""
    with serving({"gpt2": language}, Limits(frame_bytes=1 << 20)) as address:
        yield address


@pytest.fixture
def model(served):
    return LanguageModel("gpt2", remote=served)


@contextmanager
def raw(address):
    """Open a plain WebSocket to the runs of the model."""
    with connect(
        f"{address.replace('http', 'ws')}/runs/gpt2/open", compression=None, proxy=None, close_timeout=0.5
    ) as client:
        yield client


def is_served(model, language):
    """Return whether the next client gets its own values, and the model is as it was."""
    with torch.no_grad():
        expected = language.trace(IDS).result.logits
    return torch.equal(model.trace(IDS).result.logits, expected)


STEP = {"body": None, "do": [{"op": "step"}]}
FINISH = {"body": None, "do": [{"op": "finish"}]}
RUN = [OPENING | {"method": "generate", "kwargs": {"max_new_tokens": 3}}, STEP, ASK, STEP, ASK, FINISH]


@pytest.mark.parametrize("is_answered", [True, False])
def test_a_client_that_goes_at_any_message(is_answered, served, model, language):
    """It goes after each message of a run, with the answer taken or not: the next client is served."""
    before = footprint(language.module)
    for count in range(len(RUN) + 1):
        with raw(served) as client:
            for number, message in enumerate(RUN[:count]):
                client.send(json.dumps(message))
                if number and (is_answered or number < count - 1):
                    client.recv(timeout=5)
        assert is_served(model, language) and footprint(language.module) == before


def test_a_flood_of_connections(served, model, language):
    """Connections that ask nothing wait in the queue, or are ended for their silence; a client is served afterwards."""
    address = served.removeprefix("http://").split(":")
    sockets = [socket.create_connection(address) for _ in range(100)]
    waiting = ExitStack()
    with waiting:
        for _ in range(20):
            waiting.enter_context(raw(served))
    for one in sockets:
        one.close()
    assert is_served(model, language)


def framed(**tensors):
    """Return a frame with a header that describes these tensors, and four bytes of data."""
    header = json.dumps({"__metadata__": {"message": json.dumps(ASK)}, **tensors}).encode()
    return len(header).to_bytes(8, "little") + header + b"\0" * 4


FLOAT = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
GARBAGE = [
    framed(a=FLOAT, b=FLOAT),
    framed(a=FLOAT | {"shape": [2**62, 2**62, 0], "data_offsets": [0, 0]}),
    framed(a=FLOAT | {"shape": [-1]}),
    json.dumps(OPENING | {"edits": [""] * 1001}),
    "",
    "{",
    "[]",
    "1",
    b"",
    b"\0" * 40,
    b"\xff" * 8 + b"{}",
    '{"a": NaN}',
    "[" * 100000,
    json.dumps({"do": []}),
    json.dumps(OPENING | {"version": 99}),
    json.dumps(OPENING | {"code": "print(1)"}),
    json.dumps({name: value for name, value in OPENING.items() if name != "grad"}),
    json.dumps(OPENING | {"args": {}}),
    json.dumps(ASK),
    '{"bytes": 99999999999, "text": false}',
    '{"bytes": "x", "text": false}',
]
REQUESTS = [
    {"body": None, "do": []},
    {"body": None, "do": [{"op": "eval", "code": "1"}]},
    {"body": None, "do": [{"op": "ask", **POINT, "more": 1}]},
    {"body": None, "do": [{"op": "ask", **POINT, "call": "1"}]},
    {"body": None, "do": [{"op": "ask", **POINT, "selection": {"kind": "os"}}]},
    {"body": None, "do": [{"op": "ask", **POINT, "part": "forward"}]},
    {"body": 3, "do": [{"op": "step"}]},
    {"body": None, "do": [{"op": "each", "count": 10**9}]},
    {"body": None, "do": [{"op": "end_body", "failed": False}]},
    {"body": None, "do": [{"op": "write", "number": 7, "path": "", "value": {}}]},
    {"body": None, "do": [{"op": "assign", **POINT, "value": {"$output": ["os.system", {}]}, "where": ""}]},
    {"body": None, "do": [{"op": "assign", **POINT, "value": {"$object": ["os.PathLike", {}]}, "where": ""}]},
    {"body": None, "do": [{"op": "assign", **POINT, "value": {"$tensor": "9"}, "where": ""}]},
    {"body": None, "do": [{"op": "assign", **POINT, "value": {"$new": 1}, "where": ""}]},
    {"body": None, "do": [{"op": "call", "path": "", "method": "to", "args": [], "kwargs": {}, "hook": False}]},
]


@pytest.mark.parametrize("frame", GARBAGE, ids=range(len(GARBAGE)))
def test_garbage_is_refused(frame, patient):
    with raw(patient) as client:
        client.send(frame)
        answer = json.loads(client.recv(timeout=20))
    assert answer["say"] == "error" and answer["error"]["kind"] == "ProtocolError"


@pytest.mark.parametrize("request_", REQUESTS, ids=range(len(REQUESTS)))
def test_a_wrong_request_is_refused(request_, patient):
    with raw(patient) as client:
        client.send(json.dumps(OPENING))
        client.send(json.dumps(request_))
        answer = json.loads(client.recv(timeout=20))
    assert answer["say"] == "error" and answer["error"]["kind"] == "ProtocolError"


def test_a_request_that_needs_a_run(patient):
    with raw(patient) as client:
        client.send(json.dumps(OPENING | {"method": None}))
        client.send(json.dumps(STEP))
        assert "step cannot be asked for here" in client.recv(timeout=20)


def test_garbage_disturbs_nobody(served, model, language):
    assert is_served(model, language)


def test_a_frame_that_is_too_long(model, language):
    with pytest.raises(DiffsightError, match=r"limit is 1048576|the connection was lost"):
        with model.trace(IDS) as run:
            run.layers[1].output = torch.zeros(1, 4, 1 << 20)
            run.logits
    assert is_served(model, language)


def test_silence_ends_a_run(model, language):
    with pytest.raises(RemoteError, match="nothing was asked of it for 1 seconds"):
        with model.trace(IDS) as run:
            run.layers[0].output
            time.sleep(1.5)
            with pytest.raises(RemoteError, match="the server does not run 'none'"):
                model.server.lens("none")  # on a connection of its own
            run.layers[1].output
    assert is_served(model, language)


def test_a_run_that_takes_too_long(model, language):
    with pytest.raises(RemoteError, match="took longer than 3 seconds"):
        with model.generate(IDS, max_new_tokens=50, do_sample=False) as run:
            for _ in run.steps:
                run.layers[0].output
                time.sleep(0.5)
    assert is_served(model, language)


def test_a_run_that_takes_too_much_memory(language):
    """The values that a client holds are held on the server too, until the run ends there."""
    with open("/proc/self/statm", encoding="ascii") as file:
        used = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    with serving({"gpt2": language}, Limits(memory_bytes=used + (400 << 20))) as address:
        model, held = LanguageModel("gpt2", remote=address), []
        with pytest.raises(RemoteError, match="the process uses more memory than its limit of"):
            with model.trace(IDS) as run:
                run.layers[0].output
                for _ in range(60):  # 16 MiB each, here and there, and more while they are sent
                    held.append(model.transformer.drop(torch.ones(1, 1 << 22)))
        assert 2 < len(held) < 40
        end = time.monotonic() + 10
        while tree_of(language).open_runs.open() and time.monotonic() < end:
            time.sleep(0.01)
        assert not tree_of(language).open_runs.open()


def test_an_interrupt_in_the_body_ends_the_run(model, language):
    before = footprint(language.module)
    with pytest.raises(KeyboardInterrupt):
        with model.trace(IDS) as run:
            run.layers[1].output
            raise KeyboardInterrupt
    assert is_served(model, language) and footprint(language.module) == before


def test_a_lost_client_is_unwound_while_the_model_computes(served, model, language):
    entered, unwound = threading.Event(), threading.Event()

    def compute(module, args, output):
        entered.set()
        try:
            for _ in range(1000):
                time.sleep(0.01)
        except BaseException:
            unwound.set()
            raise

    handle = language.module.transformer.h[0].register_forward_hook(compute)
    try:
        with raw(served) as client:
            client.send(json.dumps(OPENING))
            client.send(json.dumps(ASK))
            assert entered.wait(5)
        assert unwound.wait(5)
    finally:
        handle.remove()
    assert is_served(model, language)


def test_a_client_that_asks_without_listening(served, model, language):
    with raw(served) as client, suppress(ConnectionClosed):  # the server hangs up on it
        client.send(json.dumps(OPENING))
        for _ in range(200):
            client.send(json.dumps(ASK))
    assert is_served(model, language)


def test_clients_at_once_get_their_own_values(served, language):
    """Eight clients, each in its own thread: no values are mixed."""
    found, errors = {}, []

    def client(number):
        try:
            model = LanguageModel("gpt2", remote=served)
            for turn in range(3):
                ids = (IDS + 7 * number + turn) % 61
                with model.trace(ids) as run:
                    run.layers_output[1] = run.layers_output[0] * (number + 1)
                found[number, turn] = ids, run.result.logits
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=client, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and len(found) == 24
    for (number, _), (ids, logits) in found.items():
        with torch.no_grad(), language.trace(ids) as run:
            run.layers_output[1] = run.layers_output[0] * (number + 1)
        assert torch.equal(run.result.logits, logits)


def test_many_runs_leave_nothing_behind(model, language):
    before = footprint(language.module)
    runs = tree_of(language).open_runs

    def one(number):
        with model.trace(IDS) as run:
            run.layers[0].output
            if number % 2:
                run.stop()

    for number in range(20):
        one(number)
    gc.collect()
    threads, kept, tensors = threading.active_count(), threads_of_runs(), count_tensors()
    for number in range(100):
        one(number)
    gc.collect()
    assert threading.active_count() <= threads + 1 and count_tensors() <= tensors + 5
    assert threads_of_runs() == kept  # in a process of Ray, a thread that has ended leaves memory behind
    assert footprint(language.module) == before and not runs.open()


def test_a_run_that_its_own_function_mentions_is_dropped(patient, language):
    """The server has one place, so the next run begins when this one has ended."""
    model = LanguageModel("gpt2", remote=patient)
    run = model.trace(IDS)
    run.follow("layers[1]", lambda value, run=run: None)
    run.layers[0].output
    known = weakref.ref(run)
    del run
    gc.collect()
    assert known() is None and is_served(model, language)


def threads_of_runs():
    return {thread.ident for thread in threading.enumerate() if thread.name.startswith("run")}


def count_tensors():
    return sum(type(thing) is torch.Tensor for thing in gc.get_objects())


# ---- keys and addresses


def test_keys(language, tmp_path, monkeypatch):
    file = tmp_path / "keys.txt"
    key = add_key(file, "alice")
    assert key not in file.read_text() and file.stat().st_mode & 0o077 == 0
    with serving({"gpt2": language}, keys=file) as address:
        for wrong in (None, "", "ds-wrong", key + "x"):
            with pytest.raises(RemoteError, match=r"refuses the key: it is missing or unknown. Pass api_key="):
                LanguageModel("gpt2", remote=address, api_key=wrong)
        model = LanguageModel("gpt2", remote=address, api_key=key)
        assert model.trace(IDS).result.logits.shape == (1, 4, 61)
        monkeypatch.setenv("DIFFSIGHT_API_KEY", f" {key}\n")
        headers = Address(address).headers  # of the key and of its hash, which the server compares
        assert Keys(file).with_digest(headers[SESSION_HEADER]) is not None and key_in(headers) == key
        monkeypatch.setenv("DIFFSIGHT_REMOTE", address)
        assert LanguageModel("gpt2", remote=True).trace(IDS).result.logits.shape == (1, 4, 61)
        model.server.address.key = "ds-wrong"
        with pytest.raises(RemoteError, match="refuses the key"):
            model.trace(IDS).finish()


def test_a_file_of_keys_that_is_wrong(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        Keys(tmp_path / "none.txt")
    for line in ("alice secret", "alice"):
        (tmp_path / "keys.txt").write_text(f"{line}\n")
        with pytest.raises(InputError, match="line 1"):
            Keys(tmp_path / "keys.txt")
    add_key(tmp_path / "others.txt", "bob", 2)
    with pytest.raises(InputError, match="'bob' already"):
        add_key(tmp_path / "others.txt", "bob")
    with pytest.raises(InputError, match=f"the folder {tmp_path / 'none'} does not exist"):
        add_key(tmp_path / "none" / "keys.txt", "bob")
    with pytest.raises(InputError, match=r"keys.txt cannot be written: Not a directory"):
        add_key(tmp_path / "others.txt" / "keys.txt", "bob")
    (tmp_path / "link.txt").symlink_to("others.txt")
    add_key(tmp_path / "link.txt", "carol")
    assert (tmp_path / "link.txt").is_symlink() and "carol" in (tmp_path / "others.txt").read_text()
    assert sorted(one.name for one in tmp_path.iterdir()) == ["keys.txt", "link.txt", "others.txt"]


def test_no_server():
    with pytest.raises(RemoteError, match=r"there is no server at http://127\.0\.0\.1:9 .*diffsight serve"):
        LanguageModel("gpt2", remote="http://127.0.0.1:9")


def test_wrong_sources(served):
    with pytest.raises(InputError, match="has no model 'gpt3': it has gpt2"):
        LanguageModel("gpt3", remote=served)
    with pytest.raises(InputError, match="takes the address of a server"):
        LanguageModel("gpt2", remote="127.0.0.1")
    for key in ("ключ", "ds-\nkey", 3):
        with pytest.raises(InputError, match="contains characters that never occur in a key"):
            LanguageModel("gpt2", remote=served, api_key=key)
    with pytest.raises(InputError, match="dispatch: `diffsight serve` has already loaded the model"):
        LanguageModel("gpt2", remote=served, dispatch=True)
