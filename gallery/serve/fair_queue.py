"""The queue of runs that wait for a replica of a model: the keys take turns.

However many runs a key has in the queue, it delays the next run of another key by one run at most, and it cannot fill
the queue for others.
Each proxy of Ray Serve has a queue of its own, and so has the front for jobs.
"""

import pickle
from collections import defaultdict
from itertools import count
from typing import Any

from ray.serve.exceptions import BackPressureError
from ray.serve.request_router import FIFOMixin, PendingRequest, RequestRouter, RunningReplica

from diffsight.gallery.serve.keys import Keys, key_in


class FairQueue(FIFOMixin, RequestRouter):
    """Assigns replicas to waiting requests; the keys take turns.

    The two methods that it overrides are private in Ray Serve, and were tried with the version in `constraints.txt`."""

    def initialize_state(self, keys: str | None = None, longest: int = 100) -> None:
        """Set up the queue.

        Args:
            keys: The file of keys. Requests with unknown keys, which a replica refuses, count as one key.
            longest: The maximum number of waiting requests of a key.
        """
        self._keys, self._longest = Keys(keys), longest
        self._waiting: defaultdict[str, list[PendingRequest]] = defaultdict(list)  # by the name of the key
        self._turns, self._last = count(1), defaultdict[str, int](int)  # the last turn of each key

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Return all replicas: the one with the shortest queue is taken."""
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True  # else a full replica is asked without a pause
        return [candidate_replicas]

    async def _choose_replica_for_request(
        self, pending_request: PendingRequest, *, is_retry: bool = False
    ) -> RunningReplica:
        name = self._name_of(pending_request)
        line = self._waiting[name]
        if len(line) >= self._longest and not is_retry:
            raise BackPressureError(len(line), self._longest)
        line.insert(0 if is_retry else len(line), pending_request)  # one that a replica has sent back keeps its place
        try:
            return await super()._choose_replica_for_request(pending_request, is_retry=is_retry)
        finally:
            self._waiting[name] = [one for one in self._waiting[name] if one is not pending_request]

    def _fulfill_next_pending_request(self, replica: RunningReplica, request_metadata: Any = None) -> None:
        """Assign a replica to the first request of the key whose last turn is the longest ago."""
        first = {
            name: next((one for one in line if not one.future.done()), None) for name, line in self._waiting.items()
        }
        names = [name for name, one in first.items() if one is not None]
        if names:
            name = min(names, key=self._last.__getitem__)
            self._last[name] = next(self._turns)
            self._pending_requests_to_fulfill.appendleft(first[name])
        super()._fulfill_next_pending_request(replica, request_metadata)

    def _name_of(self, request: PendingRequest) -> str:
        """Return the name of the key of a request: of a run, from its headers, as Serve's proxy passes them on."""
        if "key" in request.kwargs:  # a job
            return request.kwargs["key"]
        if not request.metadata.is_http_request:
            return ""
        scope = pickle.loads(request.args[0]).asgi_scope  # pickled by Serve in this process, not by the client
        key = self._keys.find(
            key_in({name.decode("latin-1"): text.decode("latin-1") for name, text in scope["headers"]})
        )
        return "" if key is None else key.name
