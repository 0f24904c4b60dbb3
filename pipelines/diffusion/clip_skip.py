"""The argument `clip_skip`, with which Stable Diffusion pipelines use an earlier layer of their text encoder.

Its effect, written as an assignment in a run:

    run.text_encoder.ln_final.input = run.text_encoder.layers[-2].output       # clip_skip=1
"""

import inspect
from typing import Any

from diffsight.errors import InputError

_NORM = "text_encoder.text_model.final_layer_norm"  # the norm that diffusers 0.42 applies to the earlier layer


def check_clip_skip(pipeline: Any, clip_skip: Any) -> None:
    """Raise InputError if a call passes `clip_skip` and would fail, because the final norm of the text encoder is not
    where the pipeline expects it, as in transformers 5."""
    encoder = getattr(pipeline, "text_encoder", None)
    if clip_skip is None or encoder is None or hasattr(encoder, "text_model"):
        return
    try:
        code = inspect.getsource(type(pipeline).encode_prompt)
    except (AttributeError, OSError, TypeError):  # no `encode_prompt`, or no source code
        return
    if _NORM in code:
        raise InputError(
            f"clip_skip={clip_skip}: {type(pipeline).__name__} needs {_NORM} for it, which {type(encoder).__name__} of "
            "the installed version of transformers does not have. Assign the layer in a run instead: "
            f"run.text_encoder.ln_final.input = run.text_encoder.layers[-{clip_skip + 1}].output"
        )
