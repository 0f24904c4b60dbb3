"""diffsight opens diffusion pipelines and language models: read and change any value while they run.

    from diffsight import DiffusionModel

    model = DiffusionModel("diffsight/shapes-clip")
    with model.generate("a red circle above a blue square", seed=17) as run:
        run.text_encoder.ln_final.input = run.text_encoder.layers[4].output
    run.images[0].save("layer4.png")

This package exports the names that you need most: the wrappers, the runs, three errors to catch, the lenses and
`image_grid`. Everything else is in its own module: `diffsight.errors`, `diffsight.pipelines`, `diffsight.lenses`.

Each name is imported when it is first used, and so are PyTorch, diffusers and transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffsight.edits import Edit
    from diffsight.errors import DiffsightError, OutOfOrderError, WrongThreadError
    from diffsight.lenses import (
        activation_patching,
        attach_sae,
        attention_from,
        attention_maps,
        attribution_patching,
        block_ablation,
        causal_tracing,
        collect_activations,
        compare_encoders,
        concept_features,
        diffusion_lens,
        encoder_patching,
        evaluate_function_vector,
        evaluate_sae,
        feature_effect,
        function_vector,
        image_grid,
        image_token_lens,
        invert,
        layer_fidelity,
        load_activations,
        logit_lens,
        patchscope_generate,
        patchscope_lens,
        prompt_swap,
        prompt_to_prompt,
        run_prompts,
        steer,
        steering_sweep,
        steering_vector,
        top_examples,
        train_sae,
        trajectory_lens,
    )
    from diffsight.model import Model
    from diffsight.pipelines import DiffusionModel, HFPipeline, LanguageModel, VisionLanguageModel
    from diffsight.run import Run
    from diffsight.steps import Step

__version__ = "0.1.0"

__all__ = [
    "DiffsightError",
    "DiffusionModel",
    "Edit",
    "HFPipeline",
    "LanguageModel",
    "Model",
    "OutOfOrderError",
    "Run",
    "Step",
    "VisionLanguageModel",
    "WrongThreadError",
    "activation_patching",
    "attach_sae",
    "attention_from",
    "attention_maps",
    "attribution_patching",
    "block_ablation",
    "causal_tracing",
    "collect_activations",
    "compare_encoders",
    "concept_features",
    "diffusion_lens",
    "encoder_patching",
    "evaluate_function_vector",
    "evaluate_sae",
    "feature_effect",
    "function_vector",
    "image_grid",
    "image_token_lens",
    "invert",
    "layer_fidelity",
    "load_activations",
    "logit_lens",
    "patchscope_generate",
    "patchscope_lens",
    "prompt_swap",
    "prompt_to_prompt",
    "run_prompts",
    "steer",
    "steering_sweep",
    "steering_vector",
    "top_examples",
    "train_sae",
    "trajectory_lens",
]

_MODULE_OF = {  # for every name except the lenses
    "DiffsightError": "errors",
    "DiffusionModel": "pipelines",
    "Edit": "edits",
    "HFPipeline": "pipelines",
    "LanguageModel": "pipelines",
    "Model": "model",
    "OutOfOrderError": "errors",
    "Run": "run",
    "Step": "steps",
    "VisionLanguageModel": "pipelines",
    "WrongThreadError": "errors",
}


_PACKAGES = ("lenses", "pipelines", "gallery")
_BESIDE = {"gallery": ["explore"]}  # it needs an extra, so that package does not list it
_OPENING = ("from_pretrained", "load", "load_model", "open", "open_model")  # what other libraries call it


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        return import_module(f"{__name__}.{name}")
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}{_hint(name)}")
    value = getattr(import_module(f"{__name__}.{_MODULE_OF.get(name, 'lenses')}"), name)
    globals()[name] = value
    return value


def _hint(name: str) -> str:
    if name in _OPENING:
        return '; DiffusionModel("diffsight/shapes-clip") opens a pipeline, and LanguageModel a language model'
    if name in ("models", "list_models"):
        return "; the command `diffsight models` lists the packaged models"
    for package in _PACKAGES:
        listed = [*import_module(f"{__name__}.{package}").__all__, *_BESIDE.get(package, ())]
        if not name.startswith("_") and name in listed:
            return f"; it is in diffsight.{package}: from diffsight.{package} import {name}"
    return import_module(f"{__name__}.errors").suggest(name, __all__)


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
