"""Whether the model hub can be reached. Where it cannot, only what is in the cache is looked for, without retries."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from huggingface_hub import constants

_lock = Lock()
_offline_blocks: list[object] = []  # the blocks in progress, in any thread, that keep the hub's library offline


def hub_access() -> dict[str, Any]:
    """Return the arguments of `from_pretrained` that keep it from the network if this machine cannot find the hub.

    A proxy may find a host whose name is not known here, so with a proxy the network is tried."""
    if getproxies():
        return {}
    try:
        socket.getaddrinfo(urlsplit(constants.ENDPOINT).hostname, None)
    except OSError:
        return {"local_files_only": True}
    return {}


@contextmanager
def cache_only_if_offline() -> Iterator[None]:
    """Keep everything that is loaded in a block from the network if this machine cannot find the hub.

    This is for functions that do not pass `local_files_only` on to all that they load."""
    if (constants.HF_HUB_OFFLINE and not _offline_blocks) or not hub_access():
        yield
        return
    this = object()
    try:
        with _lock:
            _offline_blocks.append(this)
            constants.HF_HUB_OFFLINE = True
        yield
    finally:
        with _lock:
            _offline_blocks.remove(this)
            constants.HF_HUB_OFFLINE = bool(_offline_blocks)


def hub_says(reason: str) -> str:
    """Return why the hub has no such model, in a sentence; `reason` is what the library says."""
    if hub_access():
        return "The hub cannot be reached, and the model is not in the cache"
    return f"The hub: {reason.split('. ')[0]}"
