"""The hash of an API key, and the header in which a client sends it.

Imports no PyTorch, which the front of a server and the queues for its models do not load.
"""

from hashlib import sha256

SESSION_HEADER = "X-Session-ID"  # the queue of a server knows a key by the hash in this header


def hash_of(key: str) -> str:
    """Return the SHA-256 hash of a key, in hexadecimal."""
    return sha256(key.encode("utf-8", "replace")).hexdigest()
