"""A result of every lens of the package, on small models in folders, for tests of pages, records and the gallery.

lens_results.make("logit_lens", folder)
"""

from functools import cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from diffsight import DiffusionModel, LanguageModel, VisionLanguageModel, lenses
from models import diffusion, language, vision_language

PROMPT = "a red circle above a blue square"
PAIRS = [("Paris", "London"), ("cat", "hello"), ("king", "Rome"), ("Madrid", "the")]
FEW = {"shots": 2, "heads": 2, "progress": False}
FAST = {"num_inference_steps": 1, "progress": False}


def save_models(folder: Path) -> None:
    """Save the models that the lenses run on into a folder."""
    diffusion.stable_diffusion().save_pretrained(folder / "pipeline")
    diffusion.stable_diffusion_xl().save_pretrained(folder / "xl")
    language.gpt2().save_pretrained(folder / "language")
    language.TOKENIZER.save_pretrained(folder / "language")
    for part in vision_language.llava():
        part.save_pretrained(folder / "vision")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(1)
        for point in ("unet.mid_block", "layers[1]"):
            lenses.SAE(32, 64, k=4, point=point).save(folder / "sae" / point)


@cache
def load(folder: Path) -> Any:
    """Return the model in a folder, loaded once."""
    kinds = {"language": LanguageModel, "vision": VisionLanguageModel}
    return kinds.get(folder.name, DiffusionModel)(folder)


@cache
def make(name: str, folder: Path) -> Any:
    """Return a result of a lens, on the models that `save_models` saved into a folder. It is made once."""
    return MADE[name](folder)


def _shapes(folder: Path) -> Any:
    return lenses.layer_fidelity(load_packaged(), 2, layers=[0, -1], **FAST)


@cache
def load_packaged() -> DiffusionModel:
    return DiffusionModel("diffsight/shapes-clip")


def _patching(folder: Path) -> Any:
    model = load(folder / "pipeline")
    words = {"words": ["circle", range(2, 4)], "layers": slice(0, 3, 2)}
    return lenses.encoder_patching(model, PROMPT, "a blue circle above a blue square", **words, **FAST)


def _mapped(folder: Path) -> Any:
    model = load(folder / "xl")
    ends = {"encoder": "text_encoder", "source_encoder": "text_encoder_2", "layers": [0]}
    mapping = lenses.LinearMap().fit(model, [PROMPT, "a green ring"], **ends, progress=False)
    return lenses.encoder_patching(model, PROMPT, PROMPT, words="red", mapping=mapping, **ends, **FAST)


def _comparison(folder: Path) -> Any:
    models = {"SD": load(folder / "pipeline"), "XL": load(folder / "xl")}
    prompts = [PROMPT, "a green ring", "a square"]
    return lenses.compare_encoders(models, prompts, encoders="text_encoder", layers=[0, 1], **FAST)


def _logits(folder: Path) -> Any:
    model = load(folder / "language")
    return lenses.logit_lens(model, language.PROMPTS[:2], layers=range(0, 4, 2), tokens=" Paris", top_k=2)


def _image_tokens(folder: Path) -> Any:
    image = Image.linear_gradient("L").resize((32, 32)).convert("RGB")
    return lenses.image_token_lens(load(folder / "vision"), "what is this", image, tokens=[5])


def _repeated(folder: Path) -> Any:
    target = lenses.repeat_prompt(["cat", "hello"], between=" -> ")
    return lenses.patchscope_lens(load(folder / "language"), language.PROMPTS[0], target=target, progress=False)


def _from_states(folder: Path) -> Any:
    states = torch.randn(2, 1, 32, generator=torch.Generator().manual_seed(0))
    return lenses.patchscope_lens(load(folder / "language"), states, layers=[0, 1], progress=False)


def _texts(folder: Path) -> Any:
    settings = {
        "target": lenses.repeat_prompt(),
        "layers": ["embedding", -1],
        "max_new_tokens": 3,
        "do_sample": True,
        "seed": 5,
    }
    return lenses.patchscope_generate(load(folder / "language"), language.PROMPTS[:2], **settings, progress=False)


def _targets(folder: Path, **options: Any) -> Any:
    model = load(folder / "language")
    prompts = [
        lenses.Prompt.from_strings(text, {"right": "Paris", "traps": ["London", "Madrid"]}, model)
        for text in language.PROMPTS[:2]
    ]
    return lenses.run_prompts(model, prompts, **options)


def _direction(folder: Path) -> Any:
    texts = language.PROMPTS[:2], language.PROMPTS[2:]
    return lenses.steering_vector(load(folder / "language"), *texts, layers=[0, -1], progress=False)


def _effects(folder: Path, lens: Any, **options: Any) -> Any:
    prompts = "The capital of France is", "The capital of Paris is"
    return lens(load(folder / "language"), *prompts, lenses.logit_difference(" Paris", " London"), **options)


def _sae(folder: Path, point: str) -> lenses.SAE:
    return lenses.SAE.load(folder / "sae", point)


MADE = {
    "diffusion_lens": lambda folder: lenses.diffusion_lens(load(folder / "pipeline"), PROMPT, seed=3, **FAST),
    "encoder_patching": _patching,
    "encoder_patching with a map": _mapped,
    "activation_patching": lambda folder: _effects(folder, lenses.activation_patching, sites="heads", progress=False),
    "activation_patching of a pipeline": lambda folder: lenses.activation_patching(
        load(folder / "pipeline"), PROMPT, "a green ring", lenses.pixel_distance(), sites="unet.mid_block", **FAST
    ),
    "attribution_patching": lambda folder: _effects(folder, lenses.attribution_patching),
    "block_ablation": lambda folder: lenses.block_ablation(
        load(folder / "pipeline"), PROMPT, sites="unet.**.attn2", mode="zero", seed=3, **FAST
    ),
    "layer_fidelity": _shapes,
    "compare_encoders": _comparison,
    "logit_lens": _logits,
    "attention_maps": lambda folder: lenses.attention_maps(
        load(folder / "pipeline"), PROMPT, words=["circle", "square"], keep="steps", seed=3, num_inference_steps=2
    ),
    "attention_from": lambda folder: lenses.attention_from(
        load(folder / "pipeline"), PROMPT, position=(0.5, 0.2), seed=3, num_inference_steps=1
    ),
    "invert": lambda folder: lenses.invert(load(folder / "pipeline"), diffusion.IMAGE, PROMPT, **FAST),
    "trajectory_lens": lambda folder: lenses.trajectory_lens(
        load(folder / "pipeline"), PROMPT, show=["noisy", "prediction", "guidance map"], seed=3, **FAST
    ),
    "prompt_to_prompt": lambda folder: lenses.prompt_to_prompt(
        load(folder / "pipeline"),
        PROMPT,
        PROMPT.replace("blue", "green"),
        reweight={"red": 2.0},
        seed=3,
        num_inference_steps=2,
    ),
    "evaluate_sae": lambda folder: lenses.evaluate_sae(
        load(folder / "pipeline"), _sae(folder, "unet.mid_block"), [PROMPT, "a green ring"], num_inference_steps=1
    ),
    "evaluate_sae of a language model": lambda folder: lenses.evaluate_sae(
        load(folder / "language"), _sae(folder, "layers[1]"), language.PROMPTS[:2]
    ),
    "feature_effect": lambda folder: lenses.feature_effect(
        load(folder / "pipeline"), _sae(folder, "unet.mid_block"), PROMPT, [3, 7], amounts=[0, 4], seed=3, **FAST
    ),
    "top_examples": lambda folder: lenses.top_examples(
        load(folder / "pipeline"), _sae(folder, "unet.mid_block"), [PROMPT, "a green ring"], [3, 7], seed=3, **FAST
    ),
    "top_examples of a language model": lambda folder: lenses.top_examples(
        load(folder / "language"), _sae(folder, "layers[1]"), language.PROMPTS, 7, count=2, progress=False
    ),
    "steering_vector": _direction,
    "steering_vector of a denoiser": lambda folder: lenses.steering_vector(
        load(folder / "pipeline"), ["a red circle"], ["a blue circle"], layers="unet.**.attn2", seed=3, **FAST
    ),
    "steering_sweep": lambda folder: lenses.steering_sweep(
        load(folder / "pipeline"), PROMPT, "unet.mid_block", torch.ones(32), factors=[0, 4], seed=3, **FAST
    ),
    "steering_sweep of a language model": lambda folder: lenses.steering_sweep(
        load(folder / "language"),
        language.PROMPTS[:2],
        vector=_direction(folder),
        factors=[0, 2],
        max_new_tokens=3,
        progress=False,
    ),
    "function_vector": lambda folder: lenses.function_vector(load(folder / "language"), PAIRS, **FEW),
    "evaluate_function_vector": lambda folder: lenses.evaluate_function_vector(
        load(folder / "language"), PAIRS, torch.ones(32), layer=1
    ),
    "causal_tracing": lambda folder: lenses.causal_tracing(
        load(folder / "language"), "A cat sat on the", "cat", layers=[0, -1], samples=2, progress=False
    ),
    "causal_tracing of a pipeline": lambda folder: lenses.causal_tracing(
        load(folder / "pipeline"),
        PROMPT,
        "circle",
        sites="unet.**.attn2",
        metric=lenses.pixel_distance(),
        samples=2,
        **FAST,
    ),
    "prompt_swap": lambda folder: lenses.prompt_swap(
        load(folder / "pipeline"), PROMPT, PROMPT.replace("blue", "green"), lenses.pixel_distance(), window=2, **FAST
    ),
    "image_token_lens": _image_tokens,
    "patchscope_lens": _repeated,
    "patchscope_lens of hidden states": _from_states,
    "patchscope_generate": _texts,
    "run_prompts": _targets,
    "run_prompts by layer": lambda folder: _targets(folder, lens=lenses.logit_lens, layers=[0, -1]),
}
