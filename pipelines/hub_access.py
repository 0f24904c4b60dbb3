"""Whether the model hub can be reached. Where it cannot, only what is in the cache is looked for, without retries."""

import socket
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from huggingface_hub import constants


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


def hub_says(reason: str) -> str:
    """Return why the hub has no such model, in a sentence; `reason` is what the library says."""
    if hub_access():
        return "The hub cannot be reached, and the model is not in the cache"
    return f"The hub: {reason.split('. ')[0]}"
