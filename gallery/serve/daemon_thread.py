"""A thread that carries out calls, and does not delay the end of its process."""

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future
from functools import partial
from typing import Any


class DaemonThread(Executor):
    """Carries out calls in one thread, one after the other.

    Python waits for the threads of a `ThreadPoolExecutor` before a process ends: a replica whose run is stuck would not
    end.

    Args:
        name: The name of the thread.
    """

    def __init__(self, name: str) -> None:
        self._calls: queue.SimpleQueue[tuple[Future, Callable[[], Any]]] = queue.SimpleQueue()
        threading.Thread(target=self._work, name=name, daemon=True).start()

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future:
        """Call a function in the thread. Return the future of its result."""
        future: Future = Future()
        self._calls.put((future, partial(function, *args, **kwargs)))
        return future

    def _work(self) -> None:
        while True:
            future, call = self._calls.get()
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(call())
                except BaseException as error:
                    future.set_exception(error)
            del future, call  # nothing of a call is kept while the thread waits
