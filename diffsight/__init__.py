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

from diffsight.edits import Edit
from diffsight.envoy import Envoy
from diffsight.errors import (
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
from diffsight.model import Model
from diffsight.run import Run, Step
from diffsight.session import Session

if TYPE_CHECKING:
    from diffsight.lenses.collect_activations import Activations, collect_activations, load_activations
    from diffsight.lenses.compare_encoders import EncoderComparison, compare_encoders, linear_cka
    from diffsight.lenses.diffusion_lens import DiffusionLensResult, diffusion_lens
    from diffsight.lenses.encoder_patching import EncoderPatchingResult, encoder_patching
    from diffsight.lenses.encoders.drawing import LensWarning
    from diffsight.lenses.image_token_lens import ImageTokenPredictions, image_token_lens
    from diffsight.lenses.layer_fidelity import LayerFidelity, layer_fidelity
    from diffsight.lenses.linear_map import LinearMap
    from diffsight.lenses.logit_lens import logit_lens
    from diffsight.lenses.patchscope import (
        DESCRIPTION,
        IDENTITY,
        PatchscopeTexts,
        TargetPrompt,
        patchscope_generate,
        patchscope_lens,
        repeat_prompt,
    )
    from diffsight.lenses.results.image_grid import image_grid
    from diffsight.lenses.steering import steer
    from diffsight.lenses.target_probabilities import Prompt, TargetProbabilities, first_tokens, run_prompts
    from diffsight.lenses.tokens.predictions import LensPredictions
    from diffsight.pipelines.diffusion.model import DiffusionModel
    from diffsight.pipelines.diffusion.text_encoders import Encoder, Encoders, find_encoders
    from diffsight.pipelines.huggingface import HFPipeline
    from diffsight.pipelines.language.model import LanguageModel
    from diffsight.pipelines.language.words import PromptWords, align_words
    from diffsight.pipelines.vision_language.model import VisionLanguageModel

__version__ = "0.1.0"

_LATER = {
    "DiffusionModel": "diffsight.pipelines.diffusion.model",
    "HFPipeline": "diffsight.pipelines.huggingface",
    "LanguageModel": "diffsight.pipelines.language.model",
    "VisionLanguageModel": "diffsight.pipelines.vision_language.model",
    "diffusion_lens": "diffsight.lenses.diffusion_lens",
    "DiffusionLensResult": "diffsight.lenses.diffusion_lens",
    "layer_fidelity": "diffsight.lenses.layer_fidelity",
    "LayerFidelity": "diffsight.lenses.layer_fidelity",
    "compare_encoders": "diffsight.lenses.compare_encoders",
    "EncoderComparison": "diffsight.lenses.compare_encoders",
    "linear_cka": "diffsight.lenses.compare_encoders",
    "LensWarning": "diffsight.lenses.encoders.drawing",
    "encoder_patching": "diffsight.lenses.encoder_patching",
    "EncoderPatchingResult": "diffsight.lenses.encoder_patching",
    "LinearMap": "diffsight.lenses.linear_map",
    "PromptWords": "diffsight.pipelines.language.words",
    "align_words": "diffsight.pipelines.language.words",
    "Encoder": "diffsight.pipelines.diffusion.text_encoders",
    "Encoders": "diffsight.pipelines.diffusion.text_encoders",
    "find_encoders": "diffsight.pipelines.diffusion.text_encoders",
    "Activations": "diffsight.lenses.collect_activations",
    "collect_activations": "diffsight.lenses.collect_activations",
    "load_activations": "diffsight.lenses.collect_activations",
    "ImageTokenPredictions": "diffsight.lenses.image_token_lens",
    "image_token_lens": "diffsight.lenses.image_token_lens",
    "logit_lens": "diffsight.lenses.logit_lens",
    "DESCRIPTION": "diffsight.lenses.patchscope",
    "IDENTITY": "diffsight.lenses.patchscope",
    "PatchscopeTexts": "diffsight.lenses.patchscope",
    "TargetPrompt": "diffsight.lenses.patchscope",
    "patchscope_generate": "diffsight.lenses.patchscope",
    "patchscope_lens": "diffsight.lenses.patchscope",
    "repeat_prompt": "diffsight.lenses.patchscope",
    "LensPredictions": "diffsight.lenses.tokens.predictions",
    "steer": "diffsight.lenses.steering",
    "Prompt": "diffsight.lenses.target_probabilities",
    "TargetProbabilities": "diffsight.lenses.target_probabilities",
    "first_tokens": "diffsight.lenses.target_probabilities",
    "run_prompts": "diffsight.lenses.target_probabilities",
    "image_grid": "diffsight.lenses.results.image_grid",
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
