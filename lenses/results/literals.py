"""Plain values as Python code."""

import json
from typing import Any


def literal(value: Any) -> str:
    """Return a plain value as code, with strings in double quotes."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) and value.isprintable() else repr(value)
