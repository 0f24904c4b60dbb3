"""The models that come with diffsight or with one of its extras, by name.

DESCRIPTIONS["diffsight/shapes-clip"]       # what `diffsight models` prints
FOLDERS["diffsight/shapes-clip"]            # where the files of a pipeline are
"""

from pathlib import Path

_SHAPES = Path(__file__).parent / "shapes"

PIPELINES = {
    "diffsight/shapes-clip": "64 x 64 scenes of coloured shapes; CLIP text encoder, UNet, 6 M parameters",
    "diffsight/shapes-t5": "the same scenes; T5 text encoder, UNet, 6 M parameters",
    "diffsight/shapes-flux": "the same scenes; CLIP and T5 text encoders, FLUX transformer, 8 M parameters",
}
LANGUAGE_MODELS = {
    "diffsight/smollm2": "SmolLM2-135M-Instruct, a language model; Llama-like, 30 layers, 135 M parameters",
}
DESCRIPTIONS = PIPELINES | LANGUAGE_MODELS
FOLDERS = {name: _SHAPES / name.removeprefix("diffsight/shapes-") for name in PIPELINES}
