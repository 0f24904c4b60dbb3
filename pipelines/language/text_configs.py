"""The configuration of the text model in a model."""

from typing import Any

READS, WRITES = "text_encoder", "decoder"


def text_config(config: Any, part: str) -> Any:
    """Return the configuration of the text model. A model that reads text and writes sounds, such as MusicGen, has
    one for the `part` that READS and one for that which WRITES."""
    has_both = all(getattr(config, name, None) is not None for name in (READS, WRITES))
    return getattr(config, part) if has_both else config.get_text_config()
