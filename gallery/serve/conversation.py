"""One client's connection to a model: its frames, and the thread in which its runs are carried out.

The event loop only moves frames. Everything else happens in one thread, since a run belongs to the thread that opened
it. When the client disconnects or a limit is reached, an exception is raised in that thread, which unwinds the model
wherever it is.

The thread is kept for the next connection. What greenlet stores for a thread is not freed when the thread ends, until
the main thread of the process runs Python code, which it does not do in a process of Ray.
"""

import asyncio
import ctypes
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from contextlib import suppress
from contextvars import Context
from typing import Any, Protocol

from diffsight.gallery.serve.connection_limits import Limits
from diffsight.remote import ProtocolError, RemoteError, RunEnded, RunSession, error_frame

_log = logging.getLogger("diffsight.serve")
_GLANCE = 0.1  # seconds between two looks at the memory of the process
_AGAIN = 2.0  # seconds after which a session that has not ended is interrupted again
_WAITING = 2  # frames of a client that may be queued: the opening of a run, and its first request


class Closed(Exception):
    """The client has closed the connection."""


class Socket(Protocol):
    """A WebSocket of any library. Both methods raise Closed when the client has gone. `receive` raises ProtocolError
    for a frame that is too long."""

    async def receive(self) -> str | bytes: ...

    async def send(self, frame: str | bytes) -> None: ...


class Conversation:
    """Serves one connection.

    Args:
        model: The model.
        services: Functions that the client may call besides runs; see `RunSession`.
        limits: The limits of the connection.
        name: The name of the connection in the log.
        threads: Provides the thread.
    """

    def __init__(
        self, model: Any, services: Mapping[str, Callable[..., Any]], limits: Limits, name: str, threads: Executor
    ) -> None:
        self._limits, self._name, self._threads = limits, name, threads
        self._frames: queue.SimpleQueue[str | bytes | None] = queue.SimpleQueue()
        self._session = RunSession(model, self._next, self._send, services, self._opened)
        self._lock = threading.Lock()
        self._thread: int | None = None  # the thread, while it may be interrupted
        self._is_ended = False  # whether the session was ended from outside, perhaps before it began
        self._waits = False  # whether the thread waits for a frame
        self._why: Exception | None = None  # why the session was ended from outside
        self._timer: asyncio.TimerHandle | None = None
        self._began = 0.0
        self._sends = threading.Semaphore()  # taken while a frame is being sent
        self._delivery: asyncio.Task | None = None  # of the last frame
        self._has_gone = False  # whether a frame could not be sent

    async def run(self, socket: Socket) -> str:
        """Serve the connection until it ends. Return the reason for its end, for the client."""
        self._loop, self._socket = asyncio.get_running_loop(), socket
        reading, watching = asyncio.create_task(self._read()), asyncio.create_task(self._watch_memory())
        try:
            with suppress(RunEnded):
                await self._loop.run_in_executor(self._threads, Context().run, self._serve)
            self._thread = None
        except asyncio.CancelledError:
            self._interrupt(None)
            raise
        finally:
            reading.cancel()
            watching.cancel()
            self._set_timer(False)
        if self._delivery is not None:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._delivery, self._limits.idle_seconds)
        if self._why is not None:
            with suppress(Closed, TimeoutError):
                await asyncio.wait_for(socket.send(error_frame(self._why)), self._limits.idle_seconds)
        return str(self._why or "")

    async def _read(self) -> None:
        try:
            while True:
                frame = await self._socket.receive()
                if self._frames.qsize() >= _WAITING:
                    raise ProtocolError("send one request at a time: the previous one has not been answered yet")
                self._frames.put(frame)
        except Closed:
            self._interrupt(None)
        except ProtocolError as error:
            self._interrupt(error)

    async def _watch_memory(self) -> None:
        most = self._limits.memory_bytes
        while most is not None and _memory() <= most:
            await asyncio.sleep(_GLANCE)
        if most is not None:
            self._interrupt(
                RemoteError(f"the run was ended: the process uses more memory than its limit of {most} bytes")
            )

    # ---- in the thread of the connection

    def _serve(self) -> None:
        try:
            with suppress(RunEnded):  # it may be raised between any two lines, even when the session is over
                self._carry_out()
        finally:  # the thread is used again, also after an exception such as SystemExit
            while self._thread is not None:
                with suppress(RunEnded):
                    self._leave_thread()

    def _carry_out(self) -> None:
        with self._lock:
            if self._is_ended:  # while it waited for the thread
                return
            self._thread = threading.get_ident()
        try:
            self._session.serve()
        except RunEnded:
            self._session.close()
        except Exception as error:  # a bug; the client is told only the type of the exception
            _log.exception("run %s failed", self._name)
            self._why = self._why or RemoteError(f"the server failed with {type(error).__name__}; its log says why")

    def _leave_thread(self) -> None:
        """Let no other exception be raised here, and wait for one that has not been raised yet.

        It could be taken back, but in Python 3.11 that leaves the whole process looking for it in every loop."""
        with self._lock:
            self._thread = None
        for _ in range(3):  # Python looks for it at the end of each turn
            pass

    def _next(self) -> str | bytes:
        with self._lock:
            self._waits = True
        try:
            frame = self._frames.get(timeout=self._limits.idle_seconds)
        except queue.Empty:
            seconds = self._limits.idle_seconds
            error = RemoteError(f"the run was ended, because nothing was asked of it for {seconds:g} seconds")
            self._why, frame = self._why or error, None
        with self._lock:
            self._waits = False
        if frame is None:
            raise RunEnded
        return frame

    def _send(self, frame: str | bytes) -> None:
        """Send a frame once the previous one has been received."""
        if not self._sends.acquire(timeout=self._limits.idle_seconds) or self._has_gone:
            raise RunEnded
        self._loop.call_soon_threadsafe(self._start_delivery, frame)

    def _opened(self, begins: bool) -> None:
        if begins:
            self._began = time.monotonic()
            _log.info("run %s begins", self._name)
        else:
            _log.info("run %s has ended after %.3f s", self._name, time.monotonic() - self._began)
        self._loop.call_soon_threadsafe(self._set_timer, begins)

    # ---- in the event loop

    def _start_delivery(self, frame: str | bytes) -> None:
        self._delivery = self._loop.create_task(self._deliver(frame))

    async def _deliver(self, frame: str | bytes) -> None:
        try:
            await self._socket.send(frame)
        except Closed:
            self._has_gone = True
        finally:
            self._sends.release()

    def _set_timer(self, begins: bool) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if begins:
            seconds = self._limits.run_seconds
            error = RemoteError(f"the run was ended, because it took longer than {seconds:g} seconds")
            self._timer = self._loop.call_later(seconds, self._interrupt, error)

    def _interrupt(self, why: Exception | None) -> None:
        """End the session: raise an exception wherever its thread is, unless the thread is waiting for a frame.

        Python drops an exception raised inside a finalizer, so it is raised again until the session has ended."""
        with self._lock:
            self._why, self._is_ended = self._why or why, True
            self._frames.put(None)
            if not self._waits and self._thread is not None:
                number = ctypes.c_ulong(self._thread)
                ctypes.pythonapi.PyThreadState_SetAsyncExc(number, ctypes.py_object(RunEnded))
                self._loop.call_later(_AGAIN, self._interrupt, why)


def _memory() -> int:
    """Return the memory used by the process, in bytes."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:  # not on Linux
        return 0
