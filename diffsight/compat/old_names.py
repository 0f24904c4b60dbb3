"""Modules that transformers 4 had and transformers 5 has not: `text_encoder.text_model.final_layer_norm`."""

from typing import Any

_FLATTENED = {  # the class of a model: the name of the module in it that now is the model itself
    "CLIPTextModel": "text_model",
    "CLIPVisionModel": "vision_model",
    "SiglipTextModel": "text_model",
    "SiglipVisionModel": "vision_model",
}


def old_name(owner: Any) -> str | None:
    """Return the name of the module that a model contained in transformers 4 and is itself now, or None."""
    return _FLATTENED.get(type(owner).__name__)
