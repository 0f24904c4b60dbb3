"""What a server answers of its models: `/models`, and the configuration of each."""

import json
from collections.abc import Sequence
from typing import Any

Answer = tuple[int, str, bytes]  # status, content type, body


class Front:
    """Answers plain requests.

    Args:
        models: What is listed of each model, and its configuration, see `descriptions.py`.
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
        """Return the answer that is some data."""
        return 200, "application/json", json.dumps(data).encode()

    @staticmethod
    def error(status: int, why: str) -> Answer:
        """Return the answer that refuses, and says why."""
        return status, "application/json", json.dumps({"error": why}).encode()
