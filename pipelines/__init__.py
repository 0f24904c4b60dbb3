"""The wrappers: diffusion pipelines, language models, vision-language models, and transformers pipelines.

Each name is imported when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from diffsight.errors import suggest

if TYPE_CHECKING:
    from diffsight.pipelines.attention.attention_probabilities import AttentionProduct
    from diffsight.pipelines.diffusion.attention import Attention, Attentions, find_attentions
    from diffsight.pipelines.diffusion.encoding import PromptEncoding, encode_prompt
    from diffsight.pipelines.diffusion.model import DiffusionModel
    from diffsight.pipelines.diffusion.run import DiffusionRun, DiffusionStep
    from diffsight.pipelines.diffusion.text_encoders import Encoder, Encoders, find_encoders
    from diffsight.pipelines.huggingface import HFPipeline
    from diffsight.pipelines.language.generation import GenerationRun, GenerationStep
    from diffsight.pipelines.language.model import LanguageModel, LanguageRun
    from diffsight.pipelines.vision_language.model import VisionLanguageModel, VisionLanguageRun
    from diffsight.pipelines.words import PromptWords, align_words

__all__ = [
    "Attention",
    "AttentionProduct",
    "Attentions",
    "DiffusionModel",
    "DiffusionRun",
    "DiffusionStep",
    "Encoder",
    "Encoders",
    "GenerationRun",
    "GenerationStep",
    "HFPipeline",
    "LanguageModel",
    "LanguageRun",
    "PromptEncoding",
    "PromptWords",
    "VisionLanguageModel",
    "VisionLanguageRun",
    "align_words",
    "encode_prompt",
    "find_attentions",
    "find_encoders",
]

_NAMES_IN = {
    "attention.attention_probabilities": ("AttentionProduct",),
    "diffusion.attention": ("Attention", "Attentions", "find_attentions"),
    "diffusion.encoding": ("PromptEncoding", "encode_prompt"),
    "diffusion.model": ("DiffusionModel",),
    "diffusion.run": ("DiffusionRun", "DiffusionStep"),
    "diffusion.text_encoders": ("Encoder", "Encoders", "find_encoders"),
    "huggingface": ("HFPipeline",),
    "language.generation": ("GenerationRun", "GenerationStep"),
    "language.model": ("LanguageModel", "LanguageRun"),
    "vision_language.model": ("VisionLanguageModel", "VisionLanguageRun"),
    "words": ("PromptWords", "align_words"),
}
_MODULE_OF = {name: f"{__name__}.{module}" for module, names in _NAMES_IN.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}{suggest(name, _MODULE_OF)}")
    return getattr(import_module(_MODULE_OF[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
