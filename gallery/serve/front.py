"""A server's answers about its models: `/models`, and the configuration of each model."""

import json
from collections.abc import Sequence
from typing import Any

Answer = tuple[int, str, bytes]  # status, content type, body


class Front:
    """Answers plain HTTP requests.

    Args:
        models: The description and the configuration of each model; see `descriptions.py`.
    """

    def __init__(self, models: Sequence[tuple[dict[str, Any], bytes]]) -> None:
        self._listed = [listed for listed, _ in models]
        self._configurations = {listed["name"]: data for listed, data in models}

    def answer(self, path: str) -> Answer:
        """Answer a request."""
        if path == "/models":
            return self.json({"models": self._listed})
        if path.endswith("/configuration"):
            name = self.model_of(path)
            if name in self._configurations:
                return 200, "application/zip", self._configurations[name]
            return self.error(404, f"there is no model {name!r}: it has {', '.join(self._configurations) or 'none'}")
        return self.error(404, f"there is nothing at {path}")

    @staticmethod
    def model_of(path: str) -> str:
        """Return the name of the model in a path such as "/models/diffsight/shapes-clip/configuration"."""
        return path.removeprefix("/models/").rpartition("/")[0]

    @staticmethod
    def json(data: Any) -> Answer:
        """Return an answer with data as JSON."""
        return 200, "application/json", json.dumps(data).encode()

    @staticmethod
    def error(status: int, why: str) -> Answer:
        """Return an answer that refuses the request and gives the reason."""
        return status, "application/json", json.dumps({"error": why}).encode()
