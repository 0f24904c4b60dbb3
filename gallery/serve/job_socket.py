"""The socket of a job, which has no client that waits."""

import asyncio

from diffsight.gallery.serve.conversation import Closed
from diffsight.remote import says_error


class JobSocket:
    """Stands in for the client of a job, which has sent all its requests and waits for the answer.

    Attributes:
        answer: The frame that was answered.
        failed: Whether it is an error.
    """

    def __init__(self, frames: list[str | bytes]) -> None:
        self._frames, self._answered = frames, asyncio.Event()
        self.answer, self.failed = b"", False

    async def receive(self) -> str | bytes:
        if self._frames:
            return self._frames.pop(0)
        await self._answered.wait()
        raise Closed

    async def send(self, frame: str | bytes) -> None:
        self.answer, self.failed = frame.encode() if isinstance(frame, str) else frame, says_error(frame)
        self._answered.set()
