"""The record of a result, as JSON: how it was made, so that `diffsight repeat` can make it again.

result.save("lens")                 # the record is lens/lens.json
as_json(result.record())            # the same text, but for the call
"""

import json
import platform
from collections.abc import Mapping
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from diffsight.lenses.results.calls import Call

_VERSIONS = ("diffsight", "torch", "diffusers", "transformers")
_version = cache(version)  # it searches the disk


def with_call(record: Mapping[str, Any], call: Call | None) -> dict[str, Any]:
    """Return the record of a result, together with the call that made it."""
    return dict(record) if call is None else {**record, "call": call.record()}


def versions() -> dict[str, str]:
    """Return the versions of the libraries that produce results."""
    return {"python": platform.python_version()} | {name: _version(name) for name in _VERSIONS}


def as_json(record: Mapping[str, Any]) -> str:
    """Return a record as JSON, together with the versions of the libraries that produced the result."""
    return json.dumps({**record, "versions": versions()}, indent=2, default=repr, ensure_ascii=False) + "\n"


def write_record(record: Mapping[str, Any], path: Path) -> None:
    """Write a record as JSON, see `as_json`."""
    path.write_text(as_json(record), encoding="utf-8")
