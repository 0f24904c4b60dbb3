"""Find out whether the model hub can be reached. If not, only the cache is searched, without retries."""

import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

_OF_DOWNLOADS = ("cache_dir", "force_download", "local_files_only", "revision", "token")
_lock = Lock()
_offline_blocks: list[object] = []  # active blocks, in any thread, that keep the hub's library offline


def hub_access() -> dict[str, Any]:
    """Return arguments that keep `from_pretrained` off the network if this machine cannot resolve the hub's name.

    A proxy may resolve a name that this machine cannot, so with a proxy the network is tried."""
    if getproxies():
        return {}
    try:
        socket.getaddrinfo(urlsplit(constants.ENDPOINT).hostname, None)
    except OSError:
        return {"local_files_only": True}
    return {}


def hub_file(repository: str, name: str, arguments: Mapping[str, Any]) -> Path | None:
    """Return a file of a repository on the hub, or None if there is no such repository or file.

    `arguments` are those of `from_pretrained`, with those of `hub_access`."""
    given = {key: arguments[key] for key in _OF_DOWNLOADS if key in arguments}
    try:
        return Path(hf_hub_download(repository, name, **given))
    except (OSError, HfHubHTTPError, HFValidationError):
        return None


@contextmanager
def cache_only_if_offline() -> Iterator[None]:
    """Load everything in a block without the network if this machine cannot resolve the hub's name.

    This is for functions that do not pass `local_files_only` on to everything they load."""
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
