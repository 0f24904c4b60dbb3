"""The settings of a result, as listed on a page or in a terminal: the short entries of its record, by name."""

from collections.abc import Mapping
from typing import Any

_LEFT_OUT = ("lens", "call", "versions", "files")  # shown elsewhere
_LONGEST = 400  # characters of a value
_MOST = 8  # prompts that are listed


def settings_of(record: Mapping[str, Any]) -> dict[str, str]:
    """Return the settings in a record as text, including those of the pipeline. Data, such as words, is left out."""
    found: dict[str, str] = {}
    for name, value in record.items():
        if name == "arguments" and isinstance(value, Mapping):
            found |= {key: _text(inner) for key, inner in value.items()}
        elif name == "prompts":
            found[name] = _prompts(value)
        elif name not in _LEFT_OUT and _is_short(value):
            found[name] = _text(value)
    return found


def subject_of(record: Mapping[str, Any]) -> str | None:
    """Return the prompt in a record if there is a single one."""
    prompts = record.get("prompts")
    if prompts and len(prompts) == 1:
        return _text_of(prompts[0])
    return record.get("prompt") or record.get("target")


def _text_of(prompt: Any) -> str:
    """Return the text of a prompt. Some lenses record a prompt with more details."""
    return str(prompt.get("prompt") or prompt.get("text")) if isinstance(prompt, Mapping) else str(prompt)


def _prompts(prompts: Any) -> str:
    texts = list(map(_text_of, prompts))
    more = [f"… and {len(texts) - _MOST} more"] if len(texts) > _MOST else []
    return "\n".join([*texts[:_MOST], *more])


def _is_short(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(isinstance(item, (str, int, float)) for item in value)
    return isinstance(value, (str, int, float))


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    text = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"
