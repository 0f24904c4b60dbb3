"""The queue of runs that wait for a replica of a model: the keys take turns.

However many runs a key has in the queue, it delays the next run of another key by one run at most, and it cannot fill
the queue for others.
Each proxy of Ray Serve has a queue of its own, and so has the front for jobs.
"""

import asyncio
import sys
from collections import defaultdict
from itertools import count

from ray.serve.exceptions import BackPressureError
from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from diffsight.gallery.serve.keys import Keys


class FairQueue(RequestRouter):
    """Assigns replicas to waiting requests; the keys take turns.

    Ray Serve asks for the replicas that a request may go to, and is answered when it is the request's turn."""

    def initialize_state(self, keys: str | None = None, longest: int = 100) -> None:
        """Set up the queue.

        Args:
            keys: The file of keys. Requests with unknown keys, which a replica refuses, count as one key.
            longest: The maximum number of waiting requests of a key.
        """
        self._keys, self._longest = Keys(keys), longest
        self._waiting: defaultdict[str, list[PendingRequest]] = defaultdict(list)  # by the name of the key
        self._turns, self._last = count(1), defaultdict[str, int](int)  # the last turn of each key
        self._has_moved = asyncio.Event()  # set, and replaced, when a request leaves the queue

    @property
    def max_num_routing_tasks(self) -> int:
        """The number of requests for which Ray Serve asks at once: all of them."""
        return sys.maxsize

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Wait for the turn of a request, and return all replicas: the one with the shortest queue is taken."""
        if pending_request is None:
            return [candidate_replicas]
        pending_request.routing_context.should_backoff = True  # else a full replica is asked without a pause
        self._join(pending_request)
        while not pending_request.future.done() and self._next() is not pending_request:
            await self._has_moved.wait()
        return [[*self.curr_replicas.values()]]

    def _join(self, request: PendingRequest) -> None:
        """Add a request to the line of its key, or refuse it. One that a replica has sent back keeps its place."""
        name = self._name_of(request)
        line = self._waiting[name]
        if any(one is request for one in line):
            return
        if len(line) >= self._longest and request.created_at >= line[-1].created_at:
            request.future.set_exception(BackPressureError(len(line), self._longest))
            return
        line.append(request)
        line.sort(key=lambda one: one.created_at)
        request.future.add_done_callback(lambda future: self._leave(name, request, not future.cancelled()))

    def _leave(self, name: str, request: PendingRequest, has_replica: bool) -> None:
        self._waiting[name] = [one for one in self._waiting[name] if one is not request]
        if has_replica:
            self._last[name] = next(self._turns)
        self._has_moved.set()
        self._has_moved = asyncio.Event()

    def _next(self) -> PendingRequest | None:
        """Return the first request of the key whose last turn is the longest ago."""
        names = [name for name, line in self._waiting.items() if line]
        return self._waiting[min(names, key=self._last.__getitem__)][0] if names else None

    def _name_of(self, request: PendingRequest) -> str:
        """Return the name of the key of a request."""
        if "key" in request.kwargs:  # a job
            return request.kwargs["key"]
        key = self._keys.with_digest(request.metadata.session_id)
        return "" if key is None else key.name
