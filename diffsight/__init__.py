"""diffsight opens up diffusion pipelines and multimodal models: read and change any value inside a run.

    from diffsight import DiffusionModel

    model = DiffusionModel("diffsight/shapes-clip")
    with model.generate("a red circle above a blue square", seed=17) as run:
        run.text_encoder.ln_final.input = run.text_encoder.layers[4].output
    run.images[0].save("layer4.png")

The engine (`Model`, `Run`, the errors) needs PyTorch alone; what stands on diffusers and transformers is imported when
it is first asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .edits import Edit
from .envoy import Envoy
from .errors import (
    AssignmentError,
    DiffsightError,
    InputError,
    NeverReachedError,
    NoRunError,
    OutOfOrderError,
    PointNotFoundError,
    RunClosedError,
    ScanError,
    SourceError,
    WrongThreadError,
)
from .model import Model
from .run import Run, Step
from .session import Session

if TYPE_CHECKING:
    from diffsight.gallery.grid import image_grid
    from diffsight.lenses.collecting import Activations, collect_activations, load_activations
    from diffsight.lenses.comparison import EncoderComparison, compare_encoders, linear_cka
    from diffsight.lenses.diffusion import DiffusionLensResult, diffusion_lens
    from diffsight.lenses.drawing import LensWarning
    from diffsight.lenses.fidelity import LayerFidelity, layer_fidelity
    from diffsight.lenses.image_tokens import ImageTokenPredictions, image_token_lens
    from diffsight.lenses.linear_map import LinearMap
    from diffsight.lenses.logit import logit_lens
    from diffsight.lenses.patching import EncoderPatchingResult, encoder_patching
    from diffsight.lenses.patchscope import (
        DESCRIPTION,
        IDENTITY,
        PatchscopeTexts,
        TargetPrompt,
        patchscope_generate,
        patchscope_lens,
        repeat_prompt,
    )
    from diffsight.lenses.predictions import LensPredictions
    from diffsight.lenses.steering import steer
    from diffsight.lenses.tracking import Prompt, TargetProbabilities, first_tokens, run_prompts
    from diffsight.pipelines.diffusion import DiffusionModel
    from diffsight.pipelines.encoders import Encoder, Encoders, find_encoders
    from diffsight.pipelines.huggingface import HFPipeline
    from diffsight.pipelines.language import LanguageModel
    from diffsight.pipelines.vision_language import VisionLanguageModel
    from diffsight.pipelines.words import PromptWords, align_words

__version__ = "0.1.0"

_LATER = {
    "DiffusionModel": "diffsight.pipelines.diffusion",
    "HFPipeline": "diffsight.pipelines.huggingface",
    "LanguageModel": "diffsight.pipelines.language",
    "VisionLanguageModel": "diffsight.pipelines.vision_language",
    "diffusion_lens": "diffsight.lenses.diffusion",
    "DiffusionLensResult": "diffsight.lenses.diffusion",
    "layer_fidelity": "diffsight.lenses.fidelity",
    "LayerFidelity": "diffsight.lenses.fidelity",
    "compare_encoders": "diffsight.lenses.comparison",
    "EncoderComparison": "diffsight.lenses.comparison",
    "linear_cka": "diffsight.lenses.comparison",
    "LensWarning": "diffsight.lenses.drawing",
    "encoder_patching": "diffsight.lenses.patching",
    "EncoderPatchingResult": "diffsight.lenses.patching",
    "LinearMap": "diffsight.lenses.linear_map",
    "PromptWords": "diffsight.pipelines.words",
    "align_words": "diffsight.pipelines.words",
    "Encoder": "diffsight.pipelines.encoders",
    "Encoders": "diffsight.pipelines.encoders",
    "find_encoders": "diffsight.pipelines.encoders",
    "Activations": "diffsight.lenses.collecting",
    "collect_activations": "diffsight.lenses.collecting",
    "load_activations": "diffsight.lenses.collecting",
    "ImageTokenPredictions": "diffsight.lenses.image_tokens",
    "image_token_lens": "diffsight.lenses.image_tokens",
    "logit_lens": "diffsight.lenses.logit",
    "DESCRIPTION": "diffsight.lenses.patchscope",
    "IDENTITY": "diffsight.lenses.patchscope",
    "PatchscopeTexts": "diffsight.lenses.patchscope",
    "TargetPrompt": "diffsight.lenses.patchscope",
    "patchscope_generate": "diffsight.lenses.patchscope",
    "patchscope_lens": "diffsight.lenses.patchscope",
    "repeat_prompt": "diffsight.lenses.patchscope",
    "LensPredictions": "diffsight.lenses.predictions",
    "steer": "diffsight.lenses.steering",
    "Prompt": "diffsight.lenses.tracking",
    "TargetProbabilities": "diffsight.lenses.tracking",
    "first_tokens": "diffsight.lenses.tracking",
    "run_prompts": "diffsight.lenses.tracking",
    "image_grid": "diffsight.gallery.grid",
}

__all__ = [
    "DESCRIPTION",
    "IDENTITY",
    "Activations",
    "AssignmentError",
    "DiffsightError",
    "DiffusionLensResult",
    "DiffusionModel",
    "Edit",
    "Encoder",
    "EncoderComparison",
    "EncoderPatchingResult",
    "Encoders",
    "Envoy",
    "HFPipeline",
    "ImageTokenPredictions",
    "InputError",
    "LanguageModel",
    "LayerFidelity",
    "LensPredictions",
    "LensWarning",
    "LinearMap",
    "Model",
    "NeverReachedError",
    "NoRunError",
    "OutOfOrderError",
    "PatchscopeTexts",
    "PointNotFoundError",
    "Prompt",
    "PromptWords",
    "Run",
    "RunClosedError",
    "ScanError",
    "Session",
    "SourceError",
    "Step",
    "TargetProbabilities",
    "TargetPrompt",
    "VisionLanguageModel",
    "WrongThreadError",
    "align_words",
    "collect_activations",
    "compare_encoders",
    "diffusion_lens",
    "encoder_patching",
    "find_encoders",
    "first_tokens",
    "image_grid",
    "image_token_lens",
    "layer_fidelity",
    "linear_cka",
    "load_activations",
    "logit_lens",
    "patchscope_generate",
    "patchscope_lens",
    "repeat_prompt",
    "run_prompts",
    "steer",
]


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return getattr(import_module(_LATER[name]), name)
    raise AttributeError(f"module 'diffsight' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER})
