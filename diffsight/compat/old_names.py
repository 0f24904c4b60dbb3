"""Modules that exist in transformers 4 but not in transformers 5: `text_encoder.text_model.final_layer_norm`."""

from typing import Any

_FLATTENED = {  # class of a model: the name of the inner module that is now the model itself
    "CLIPTextModel": "text_model",
    "CLIPVisionModel": "vision_model",
    "SiglipTextModel": "text_model",
    "SiglipVisionModel": "vision_model",
}


def old_name(owner: Any) -> str | None:
    """Return the name of the inner module in transformers 4 that is now the model itself, or None."""
    return _FLATTENED.get(type(owner).__name__)
