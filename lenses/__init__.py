"""The lenses: functions that show what is inside a model, and their results.

    from diffsight.lenses import logit_lens

Each name is imported when it is first used. Many lenses have the same name as the module they are
in; imported from here, the name always means the lens.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from diffsight.errors import suggest

if TYPE_CHECKING:
    from diffsight.lenses.activation_patching import activation_patching
    from diffsight.lenses.attach_sae import attach_sae
    from diffsight.lenses.attention_maps import AttentionMaps, attention_from, attention_maps
    from diffsight.lenses.attribution_patching import attribution_patching
    from diffsight.lenses.block_ablation import block_ablation
    from diffsight.lenses.causal_tracing import CausalTrace, causal_tracing
    from diffsight.lenses.collect_activations import Activations, collect_activations, load_activations
    from diffsight.lenses.collecting.point_activations import PointActivations
    from diffsight.lenses.compare_encoders import EncoderComparison, compare_encoders
    from diffsight.lenses.concept_features import concept_features
    from diffsight.lenses.demonstrations.few_shot_prompts import few_shot_prompts
    from diffsight.lenses.diffusion_lens import DiffusionLensResult, diffusion_lens
    from diffsight.lenses.encoder_patching import EncoderPatchingResult, encoder_patching
    from diffsight.lenses.encoders.drawing import LensWarning
    from diffsight.lenses.evaluate_function_vector import FunctionVectorScores, evaluate_function_vector
    from diffsight.lenses.evaluate_sae import SAEEvaluation, evaluate_sae
    from diffsight.lenses.feature_effect import FeatureEffect, feature_effect
    from diffsight.lenses.features.autoencoder import SAE
    from diffsight.lenses.features.sae_trainer import SAESettings
    from diffsight.lenses.function_vectors import FunctionVector, function_vector
    from diffsight.lenses.image_token_lens import ImageTokenPredictions, image_token_lens
    from diffsight.lenses.inversion import Inversion, invert
    from diffsight.lenses.layer_fidelity import LayerFidelity, layer_fidelity
    from diffsight.lenses.linear_cka import linear_cka
    from diffsight.lenses.linear_map import LinearMap
    from diffsight.lenses.logit_lens import logit_lens
    from diffsight.lenses.metrics.image_metrics import clip_score, latent_distance, pixel_distance, shapes_verdict
    from diffsight.lenses.metrics.metric import Outcome
    from diffsight.lenses.metrics.token_metrics import kl_divergence, logit_difference, token_probability
    from diffsight.lenses.patch_object_attn_lens import patch_object_attn_lens
    from diffsight.lenses.patchscope import (
        DESCRIPTION,
        IDENTITY,
        PatchscopeTexts,
        TargetPrompt,
        patchscope_generate,
        patchscope_lens,
        repeat_prompt,
    )
    from diffsight.lenses.prompt_swap import PromptSwap, prompt_swap
    from diffsight.lenses.prompt_to_prompt import PromptToPromptResult, prompt_to_prompt
    from diffsight.lenses.results.image_grid import image_grid
    from diffsight.lenses.results.site_effects import EffectComparison, SiteEffects
    from diffsight.lenses.steering import steer
    from diffsight.lenses.steering_sweep import SteeringSweep, steering_sweep
    from diffsight.lenses.steering_vector import SteeringVectors, steering_vector
    from diffsight.lenses.target_probabilities import Prompt, TargetProbabilities, first_tokens, run_prompts
    from diffsight.lenses.tokens.predictions import LensPredictions
    from diffsight.lenses.top_examples import Example, TopExamples, top_examples
    from diffsight.lenses.train_sae import train_sae
    from diffsight.lenses.trajectory_lens import TrajectoryLensResult, trajectory_lens

__all__ = [
    "DESCRIPTION",
    "IDENTITY",
    "SAE",
    "Activations",
    "AttentionMaps",
    "CausalTrace",
    "DiffusionLensResult",
    "EffectComparison",
    "EncoderComparison",
    "EncoderPatchingResult",
    "Example",
    "FeatureEffect",
    "FunctionVector",
    "FunctionVectorScores",
    "ImageTokenPredictions",
    "Inversion",
    "LayerFidelity",
    "LensPredictions",
    "LensWarning",
    "LinearMap",
    "Outcome",
    "PatchscopeTexts",
    "PointActivations",
    "Prompt",
    "PromptSwap",
    "PromptToPromptResult",
    "SAEEvaluation",
    "SAESettings",
    "SiteEffects",
    "SteeringSweep",
    "SteeringVectors",
    "TargetProbabilities",
    "TargetPrompt",
    "TopExamples",
    "TrajectoryLensResult",
    "activation_patching",
    "attach_sae",
    "attention_from",
    "attention_maps",
    "attribution_patching",
    "block_ablation",
    "causal_tracing",
    "clip_score",
    "collect_activations",
    "compare_encoders",
    "concept_features",
    "diffusion_lens",
    "encoder_patching",
    "evaluate_function_vector",
    "evaluate_sae",
    "feature_effect",
    "few_shot_prompts",
    "first_tokens",
    "function_vector",
    "image_grid",
    "image_token_lens",
    "invert",
    "kl_divergence",
    "latent_distance",
    "layer_fidelity",
    "linear_cka",
    "load_activations",
    "logit_difference",
    "logit_lens",
    "patch_object_attn_lens",
    "patchscope_generate",
    "patchscope_lens",
    "pixel_distance",
    "prompt_swap",
    "prompt_to_prompt",
    "repeat_prompt",
    "run_prompts",
    "shapes_verdict",
    "steer",
    "steering_sweep",
    "steering_vector",
    "token_probability",
    "top_examples",
    "train_sae",
    "trajectory_lens",
]

_NAMES_IN = {
    "activation_patching": ("activation_patching",),
    "attention_maps": ("AttentionMaps", "attention_from", "attention_maps"),
    "attribution_patching": ("attribution_patching",),
    "block_ablation": ("block_ablation",),
    "concept_features": ("concept_features",),
    "evaluate_sae": (
        "SAEEvaluation",
        "evaluate_sae",
    ),
    "feature_effect": (
        "FeatureEffect",
        "feature_effect",
    ),
    "demonstrations.few_shot_prompts": ("few_shot_prompts",),
    "evaluate_function_vector": ("FunctionVectorScores", "evaluate_function_vector"),
    "collecting.point_activations": ("PointActivations",),
    "features.autoencoder": ("SAE",),
    "attach_sae": ("attach_sae",),
    "train_sae": ("train_sae",),
    "features.sae_trainer": ("SAESettings",),
    "function_vectors": ("FunctionVector", "function_vector"),
    "patch_object_attn_lens": ("patch_object_attn_lens",),
    "top_examples": (
        "Example",
        "TopExamples",
        "top_examples",
    ),
    "causal_tracing": ("CausalTrace", "causal_tracing"),
    "collect_activations": ("Activations", "collect_activations", "load_activations"),
    "compare_encoders": ("EncoderComparison", "compare_encoders"),
    "diffusion_lens": ("DiffusionLensResult", "diffusion_lens"),
    "encoder_patching": ("EncoderPatchingResult", "encoder_patching"),
    "encoders.drawing": ("LensWarning",),
    "image_token_lens": ("ImageTokenPredictions", "image_token_lens"),
    "inversion": ("Inversion", "invert"),
    "layer_fidelity": ("LayerFidelity", "layer_fidelity"),
    "linear_cka": ("linear_cka",),
    "linear_map": ("LinearMap",),
    "logit_lens": ("logit_lens",),
    "patchscope": (
        "DESCRIPTION",
        "IDENTITY",
        "PatchscopeTexts",
        "TargetPrompt",
        "patchscope_generate",
        "patchscope_lens",
        "repeat_prompt",
    ),
    "prompt_swap": ("PromptSwap", "prompt_swap"),
    "prompt_to_prompt": ("PromptToPromptResult", "prompt_to_prompt"),
    "metrics.image_metrics": ("clip_score", "latent_distance", "pixel_distance", "shapes_verdict"),
    "metrics.metric": ("Outcome",),
    "metrics.token_metrics": ("kl_divergence", "logit_difference", "token_probability"),
    "results.image_grid": ("image_grid",),
    "results.site_effects": ("EffectComparison", "SiteEffects"),
    "steering": ("steer",),
    "steering_sweep": ("SteeringSweep", "steering_sweep"),
    "steering_vector": ("SteeringVectors", "steering_vector"),
    "target_probabilities": ("Prompt", "TargetProbabilities", "first_tokens", "run_prompts"),
    "tokens.predictions": ("LensPredictions",),
    "trajectory_lens": ("TrajectoryLensResult", "trajectory_lens"),
}
_MODULE_OF = {name: f"{__name__}.{module}" for module, names in _NAMES_IN.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}{suggest(name, _MODULE_OF)}")
    return getattr(import_module(_MODULE_OF[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Lenses(ModuleType):
    """This package. When Python imports a module such as `logit_lens`, it sets the attribute `logit_lens` to the
    module; here the attribute is set to the lens instead."""

    def __setattr__(self, name: str, value: Any) -> None:
        is_file_of_lens = name in _MODULE_OF and isinstance(value, ModuleType)
        super().__setattr__(name, getattr(value, name) if is_file_of_lens else value)


sys.modules[__name__].__class__ = _Lenses
