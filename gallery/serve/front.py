"""What a server answers besides runs: `/models`, the configuration of a model, `/status`, jobs."""

import json
from collections.abc import Callable, Mapping
from typing import Any

from diffsight.errors import DiffsightError
from diffsight.gallery.serve.descriptions import configuration, description
from diffsight.gallery.serve.keys import Key, Keys

Answer = tuple[int, str, bytes]  # status, content type, body
_JSON, _BINARY = "application/json", "application/octet-stream"


class Front:
    """Answers plain requests.

    Args:
        models: The models by name.
        keys: The keys of the server.
        status: Returns what `/status` tells.
    """

    def __init__(self, models: Mapping[str, Any], keys: Keys, status: Callable[[], Mapping[str, Any]] = dict) -> None:
        self.descriptions = [description(name, model) for name, model in models.items()]
        self._configurations = {name: configuration(model) for name, model in models.items()}
        self._keys, self._status = keys, status

    def find_key(self, key: str | None) -> Key | None:
        """Return the line of a key; None if it is not valid."""
        return self._keys.find(key)

    def model_of(self, path: str) -> str:
        """Return the name of the model in a path such as "/models/diffsight/shapes-clip/run"."""
        return path.removeprefix("/models/").rpartition("/")[0]

    def refusal(self, key: str | None, model: str) -> Answer | None:
        """Return why a run of a model is refused; None if it is not."""
        if self.find_key(key) is None:
            return _error(401, "it is missing or unknown")
        if model not in self._configurations:
            return _error(404, f"there is no model {model!r}: it has {', '.join(self._configurations) or 'none'}")
        return None

    def answer(self, method: str, path: str, key: str | None, body: bytes) -> Answer:
        """Answer a request."""
        if self.find_key(key) is None:
            return _error(401, "it is missing or unknown")
        if method == "GET" and path == "/models":
            return _json({"models": self.descriptions})
        if method == "GET" and path == "/status":
            return _json(dict(self._status()))
        if method == "GET" and path.endswith("/configuration"):
            name = self.model_of(path)
            return self.refusal(key, name) or (200, _BINARY, self._configurations[name])
        return _error(404, f"there is nothing at {path}")


def _json(data: Any) -> Answer:
    return 200, _JSON, json.dumps(data).encode()


def _error(status: int, why: str) -> Answer:
    return status, _JSON, json.dumps({"error": why}).encode()


def error_answer(error: DiffsightError) -> Answer:
    """Return the answer for a request that cannot be carried out."""
    return _error(400, str(error))
