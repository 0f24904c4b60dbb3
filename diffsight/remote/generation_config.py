"""Settings of generation as remote runs send them: the plain values of a `GenerationConfig`, without its defaults."""

import sys
from typing import Any

from diffsight.errors import InputError

_CLASS = "transformers.generation.configuration_utils.GenerationConfig"
_NOT_SENT = ("compile_config", "constraints", "continuous_batching_config", "transformers_version")


def is_generation_config(value: Any) -> bool:
    """Return whether a value is a `GenerationConfig` of transformers."""
    return f"{type(value).__module__}.{type(value).__name__}" == _CLASS


def settings_of(config: Any) -> dict[str, Any]:
    """Return the settings of a `GenerationConfig` that are not the default.

    Raises:
        InputError: A setting is not a plain value.
    """
    settings = {name: value for name, value in config.to_diff_dict().items() if name != "transformers_version"}
    for name, value in settings.items():
        if name not in _known(type(config)) or not _is_plain(value):
            raise InputError(f"generation_config: {name} cannot be sent to a server, which takes plain values only")
    return settings


def config_of(settings: dict[str, Any]) -> Any:
    """Return the `GenerationConfig` with these settings.

    Raises:
        ValueError: There is a setting that is unknown, or not a plain value.
    """
    kind = sys.modules["transformers"].GenerationConfig
    wrong = [name for name, value in settings.items() if name not in _known(kind) or not _is_plain(value)]
    if wrong:
        raise ValueError(f"a configuration of generation has no {wrong[0]}")
    return kind(**settings)


def _known(kind: type) -> set[str]:
    return {name for name in vars(kind()) if not name.startswith("_") and name not in _NOT_SENT}


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(map(_is_plain, [*value, *value.values()]))
    return value is None or type(value) in (bool, int, float, str)
