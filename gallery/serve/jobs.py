"""Jobs: lenses and runs that a server carries out in the background. Their results are kept for a limited time."""

import asyncio
import time
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from diffsight.errors import InputError
from diffsight.gallery.serve.front import Answer, Front


@dataclass
class _Job:
    key: str
    since: float
    status: str = "waiting"
    ended: float | None = None
    result: bytes = b""
    lost: str = ""  # why there is no result, if the replica was lost
    task: Any = field(default=None, repr=False)


class Jobs:
    """The jobs of a server.

    Args:
        keep_seconds: How long a result is kept after its job has ended.
    """

    def __init__(self, keep_seconds: float) -> None:
        self._keep, self._jobs = keep_seconds, dict[str, _Job]()

    def start(self, key: str, most: int, work: Callable[[str], Awaitable[tuple[bool, bytes]]]) -> dict[str, str]:
        """Start a job and return its id. `most` is the maximum number of unfinished jobs of a key.

        Raises:
            InputError: The key already has this many unfinished jobs.
        """
        self._forget()
        if sum(job.key == key and job.ended is None for job in self._jobs.values()) >= most:
            raise InputError(f"the key already has {most} unfinished jobs, which is its limit")
        number = uuid.uuid4().hex
        job = self._jobs[number] = _Job(key, time.time())
        job.task = asyncio.create_task(self._carry_out(job, work(number)))
        return {"job": number}

    def begins(self, number: str) -> None:
        """Record that a replica has begun with a job."""
        job = self._jobs.get(number)
        if job is not None and job.ended is None:
            job.status = "running"

    def of(self, key: str) -> dict[str, str]:
        """Return the status of each of a key's jobs, by id."""
        self._forget()
        return {number: job.status for number, job in self._jobs.items() if job.key == key}

    def answer(self, path: str, key: str) -> Answer:
        """Answer a request for a job ("ID") or its result ("ID/result")."""
        self._forget()
        number, _, what = path.partition("/")
        job = self._jobs.get(number)
        if job is None or job.key != key:
            return Front.error(404, f"there is no job {number}: results are kept for {self._keep:g} seconds")
        if not what:
            return Front.json({"job": number, "status": job.status})
        if what != "result" or job.ended is None:
            return Front.error(409, f"the job {number} is {job.status}: it has no {what} yet")
        if job.lost:
            return Front.error(500, f"the job {number} was lost: {job.lost}. Submit it again")
        return 200, "application/octet-stream", job.result

    async def _carry_out(self, job: _Job, work: Awaitable[tuple[bool, bytes]]) -> None:
        try:
            failed, job.result = await work
        except Exception as error:  # too many wait for the model, or its replica ended
            failed, job.lost = True, type(error).__name__
        job.status = "failed" if failed else "done"
        job.ended = time.time()

    def _forget(self) -> None:
        now = time.time()
        self._jobs = {n: job for n, job in self._jobs.items() if job.ended is None or now - job.ended < self._keep}
