"""The limits that a server sets to its clients."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """The limits of one connection.

    Attributes:
        run_seconds: The maximum time of a run, from its opening to its end.
        idle_seconds: The maximum time between an answer and the next request, and for a client to receive an answer.
        frame_bytes: The maximum size of a frame from a client.
        memory_bytes: The memory of the process above which a run is ended; None for no limit.
    """

    run_seconds: float = 600.0
    idle_seconds: float = 60.0
    frame_bytes: int = 1 << 30
    memory_bytes: int | None = None
