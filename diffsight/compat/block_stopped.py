"""`nnsight.stop()` and `layer.output.stop()`: leave a block before its end."""

from typing import Any, NoReturn


class BlockStopped(BaseException):
    """Raised to leave the block of a trace, a loop or a session. The block's `__exit__` suppresses it."""

    def __str__(self) -> str:
        return "stop() works only in the block of a trace or a session"


def stop() -> NoReturn:
    """Leave the block of the trace, the loop or the session around this line."""
    raise BlockStopped


def stop_at(value: Any) -> NoReturn:
    """Stop the model here: `layer.output.stop()`."""
    raise BlockStopped
