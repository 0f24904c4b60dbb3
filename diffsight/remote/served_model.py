"""A model on a server, as seen by a client: `model.server`.

model = DiffusionModel("diffsight/shapes-clip", remote="http://127.0.0.1:8000")
with model.server.session():                    # these runs follow each other on one replica
    model.generate("a red circle", seed=0).images
    model.generate("a blue square", seed=0).images
model.server.lens("attention_maps", "a red circle", seed=0)         # runs on the server and returns the result
job = model.server.submit("diffusion_lens", "a red circle")         # returns at once
job = model.generate("a red circle", seed=0, blocking=False)        # so does a run without a body
job.status, job.result()
"""

import io
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn
from weakref import WeakValueDictionary

import torch

from diffsight.errors import InputError
from diffsight.remote.connection import Address, Connection
from diffsight.remote.frames import pack, unpack
from diffsight.remote.protocol import common_version, opening_without_run
from diffsight.remote.wire_errors import RemoteError, error_of
from diffsight.remote.wire_values import ValueDecoder, ValueEncoder

_LONGEST = 1 << 31  # bytes of a frame
_HALF = torch.float16


class ServedModel:
    """A model on a server: its connections, and its operations besides runs.

    Args:
        name: The name of the model on the server.
        remote: The address of the server, or True for the one in DIFFSIGHT_REMOTE.
        api_key: The key; by default, the one in DIFFSIGHT_API_KEY.

    Raises:
        InputError: The address is not valid.
        RemoteError: There is no server, it refuses the key, or it does not have the model.
    """

    def __init__(self, name: str, remote: str | bool, api_key: str | None = None) -> None:
        self.address = Address(remote, api_key)
        self.dtype: torch.dtype | None = None
        self._kept: Connection | None = None  # the connection of a session
        self._is_busy = False
        self._runs = WeakValueDictionary[Connection, Any]()  # the flows of open runs, by their connections
        known = {one["name"]: one for one in self.address.json("/models")["models"]}
        if name not in known:
            raise InputError(f"the server at {self.address} has no model {name!r}: it has {', '.join(known) or 'none'}")
        self.name = name
        self.description: Mapping[str, Any] = known[name]
        self.version = common_version(self.description["versions"])

    @classmethod
    def of(
        cls, model: Any, source: Any, remote: str | bool, api_key: str | None, dispatch: bool, given: Mapping[str, Any]
    ) -> "ServedModel":
        """Return the model on a server that a wrapper was called to open, with `source` and these arguments.

        Raises:
            InputError: An argument applies only to loading a model, or the model is of another class.
        """
        kind = type(model).__name__
        names = [name for name, value in (given | {"dispatch": dispatch or None}).items() if value is not None]
        if names:
            raise InputError(f"{names[0]}: `diffsight serve` has already loaded the model. Leave this argument out")
        if not isinstance(source, str):
            raise InputError(f"remote=: name the model on the server with a string, not a {type(source).__name__}")
        server = cls(source, remote, api_key)
        if server.description["kind"] != kind:
            raise InputError(f"{source} is a {server.description['kind']}: open it with that class, not with {kind}")
        return server

    @property
    def services(self) -> list[str]:
        """The names of everything the server runs besides runs: lenses, and queries about the model."""
        return self.description["services"]

    def find(self, name: str) -> Any:
        """Return the server's answer to a query about the model, such as "encoders"."""
        return self.ask({"op": "find", "name": name})

    @property
    def half_precision(self) -> bool:
        """Whether floating-point tensors are sent as float16, in both directions. Assignable. False by default."""
        return self.dtype is not None

    @half_precision.setter
    def half_precision(self, value: bool) -> None:
        self.dtype = _HALF if value else None

    @contextmanager
    def configuration(self) -> Iterator[Path]:
        """Download the configuration of the model, without weights, into a folder that exists until the block ends."""
        data = self.address.get(f"/models/{self.name}/configuration")
        with tempfile.TemporaryDirectory(prefix="diffsight-") as place:
            try:
                with zipfile.ZipFile(io.BytesIO(data)) as archive:
                    archive.extractall(place)  # changes names that lead out of the folder, so that they stay in it
            except zipfile.BadZipFile:
                raise RemoteError(f"{self.address} does not answer like a server of diffsight") from None
            yield Path(place)

    # ---- connections

    def open(self, run: Any = None) -> Connection:
        """Return a connection for a run: a new one or, in a session, the session's connection."""
        if self._kept is not None and self._is_busy:
            raise InputError("a session has one run at a time: end the open run first, or open this one outside it")
        self._is_busy = self._kept is not None
        connection = self._kept or self.address.connect(self.name, _LONGEST)
        if run is not None:
            self._runs[connection] = run
        return connection

    def release(self, connection: Connection, is_broken: bool = False, is_over: bool = False) -> None:
        """Take back the connection of a run that has ended on the client.

        If the run is still open on the server, wait until it has ended there too, so that nothing of it is left."""
        is_kept = connection is self._kept
        self._runs.pop(connection, None)
        try:
            if not is_broken and (is_kept or not is_over):  # all messages before "closed" belong to that run
                connection.send({"body": None, "do": [{"op": "close"}]}, {})
                while connection.receive()[0]["say"] != "closed":
                    pass
        except RemoteError:
            is_broken = True
        if is_kept:
            self._is_busy = False
            self._kept = None if is_broken else connection
        if not is_kept or is_broken:
            connection.close()

    @contextmanager
    def session(self) -> Iterator[None]:
        """Keep one replica of the server for the runs in the block, which run one after the other."""
        if self._kept is not None:
            raise InputError("a session is open already")
        self._kept = self.address.connect(self.name, _LONGEST)
        try:
            yield
        finally:
            kept, self._kept, self._is_busy = self._kept, None, False
            if kept is not None:
                kept.close()

    def ask(self, op: Mapping[str, Any]) -> Any:
        """Return the answer to an operation that needs no run.

        If this thread has an open run, the run's replica answers: the others may be busy, or there may be no other."""
        runs = [run for known in self._runs.valuerefs() if (run := known()) is not None and run.can_ask]
        if runs:
            return runs[-1].call_there(op)
        encoder = ValueEncoder(dtype=self.dtype)
        connection = self.open()
        try:
            connection.send(opening_without_run(self.version, self.half_precision), {})
            do = [{name: encoder.encode(value) for name, value in op.items()}]
            connection.send({"body": None, "do": do}, encoder.tensors)
            reply, tensors = connection.receive()
        finally:
            self.release(connection, is_over=True)
        if reply["say"] == "error":
            raise error_of(reply["error"])
        return ValueDecoder(tensors).decode(reply["value"])

    # ---- lenses

    def lens(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Run a lens on the server and return its result.

            model.server.lens("logit_lens", "The Eiffel Tower is in the city of", top_k=3)

        Args:
            name: The name of the lens, such as "logit_lens".
            args, kwargs: Its arguments, without the model.

        Raises:
            RemoteError: The server does not run this lens.
        """
        return self.ask({"op": "lens", "name": name, "args": list(args), "kwargs": kwargs})

    def submit(self, name: str, *args: Any, **kwargs: Any) -> "Job":
        """Start a lens on the server and return at once. Takes the same arguments as `lens`."""
        encoder = ValueEncoder(dtype=self.dtype)
        op = {"op": "lens", "name": name, "args": encoder.encode(list(args)), "kwargs": encoder.encode(kwargs)}
        return self._start_job({"body": None, "do": [op]}, encoder.tensors, lambda value: value)

    def submit_run(self, opening: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> "Job":
        """Start a run without a body on the server and return at once."""
        return self._start_job(opening, tensors, lambda value: value["result"])

    def _start_job(
        self, message: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], result_in: Callable[[Any], Any]
    ) -> "Job":
        frame = pack(message, tensors)
        body = frame.encode() if isinstance(frame, str) else frame
        return Job(self.address, self.address.json(f"/models/{self.name}/jobs", "POST", body)["job"], result_in)


class Job:
    """A lens, or a run without a body, that runs on a server.

    Args:
        address: The server.
        number: The id of the job.
        result_in: Returns the result in the server's answer.
    """

    def __init__(self, address: Address, number: str, result_in: Callable[[Any], Any]) -> None:
        self.address, self.id, self._result_in = address, number, result_in

    @property
    def status(self) -> str:
        """ "waiting", "running", "done" or "failed"."""
        return self.address.json(f"/jobs/{self.id}")["status"]

    def result(self, timeout: float | None = None) -> Any:
        """Wait for the job and return its result.

        Args:
            timeout: The maximum number of seconds to wait; None for no limit.

        Raises:
            TimeoutError: The job has not ended within this time.
        """
        end = None if timeout is None else time.monotonic() + timeout
        pause = 0.05
        while self.status in ("waiting", "running"):
            if end is not None and time.monotonic() > end:
                raise TimeoutError(f"the job {self.id} has not ended in {timeout} seconds; it is {self.status}")
            time.sleep(pause)
            pause = min(2 * pause, 2.0)
        data = self.address.get(f"/jobs/{self.id}/result")
        message, tensors = unpack(data if data[:1] != b"{" else data.decode())
        if message["say"] == "error":
            raise error_of(message["error"])
        return self._result_in(ValueDecoder(tensors).decode(message["value"]))

    def __enter__(self) -> NoReturn:
        raise InputError(
            "a job has no block, because it runs in the background on the server: wait for it with job.result(), or "
            "leave out blocking=False to look inside the run"
        )

    def __exit__(self, *_: object) -> None: ...

    def __repr__(self) -> str:
        return f"<job {self.id} on {self.address}>"
