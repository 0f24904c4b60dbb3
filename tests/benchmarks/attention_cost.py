"""What attention maps cost beside plain generation: memory at the sizes of FLUX and SD 1.5, time on shapes-clip.

    python tests/benchmarks/attention_cost.py flux      # memory, one attention of FLUX at 1024 x 1024
    python tests/benchmarks/attention_cost.py sd1       # memory, the UNet of SD 1.5 at 512 x 512, 2 and 4 steps
    python tests/benchmarks/attention_cost.py shapes    # time, beside plain generation and a processor by hand

The weights of the large models are random, and their text encoders and autoencoders are small. Set
MALLOC_MMAP_THRESHOLD_=65536 for "flux" and "sd1", so that freed memory does not count.
"""

import argparse
from collections.abc import Callable
from typing import Any

import diffusers
import torch
from attention_peer import PROMPT, diffusion  # the small models of the tests
from diffusers.models.attention_processor import AttnProcessor
from diffusers.models.transformers.transformer_flux import FluxAttention
from measuring import interleaved, measured
from torch.nn import functional as F

from diffsight import DiffusionModel, attention_maps
from diffsight.pipelines.attention.attention_probabilities import AttentionProduct
from diffsight.pipelines.diffusion.attention import find_attentions

WORDS = ["circle", "square"]
TOKENS = [3, 7]  # of these words in CLIP's prompt
DRAWING = {"num_inference_steps": 20, "guidance_scale": 3.0}


def flux(dtype: torch.dtype) -> None:
    """Print the peak of memory of FLUX with one attention of the real size, 24 heads of 128 features, and what the maps
    of two words add to the memory in use, computed as `attention_maps` does. Everything else is narrow."""
    pipe, width = diffusion.flux(), 32
    sizes = {"joint_attention_dim": width, "pooled_projection_dim": width, "in_channels": 16, "guidance_embeds": True}
    heads = {"num_attention_heads": 1, "attention_head_dim": width, "axes_dims_rope": (4, 12, 16)}
    net = diffusion.model(diffusers.FluxTransformer2DModel, **sizes, **heads, num_layers=1, num_single_layers=0, seed=2)
    net.pos_embed.axes_dim = (16, 56, 56)
    net.transformer_blocks[0].attn = diffusion.model(
        FluxAttention, query_dim=width, added_kv_proj_dim=width, heads=24, dim_head=128, context_pre_only=False, seed=3
    )
    pipe.transformer = net
    pipe.to(dtype)
    call = {"height": 256, "width": 256, "max_sequence_length": 512, "num_inference_steps": 1, "output_type": "latent"}
    model, average = DiffusionModel(pipe), torch.rand(4608, len(WORDS))

    def maps() -> None:
        with model.generate(PROMPT, **call) as run:
            product = run.transformer.transformer_blocks[0].attn.attention_product
            _peak(f"{dtype}, maps alone", lambda: read(product))

    def read(product: AttentionProduct) -> torch.Tensor:
        blocks = product.blocks(slice(None), range(512, 4608))
        return torch.cat([probs[0].mean(0) @ average for _, probs in blocks])

    _peak(f"{dtype}, plain", lambda: pipe(PROMPT, **call))
    maps()


def sd1() -> diffusers.StableDiffusionPipeline:
    """Stable Diffusion with the UNet of version 1.5: 8 heads in all layers."""
    pipe = diffusion.stable_diffusion()
    pipe.unet = diffusion.model(diffusers.UNet2DConditionModel, cross_attention_dim=32, sample_size=64, seed=2)
    return diffusers.StableDiffusionPipeline(**pipe.components)


def memory(pipe: diffusers.DiffusionPipeline, counts: list[int], **arguments: Any) -> None:
    """Print the peaks of memory of plain generation, of the search, and of maps with several numbers of steps."""
    pipe.set_progress_bar_config(disable=True)
    model = DiffusionModel(pipe)

    def plain(steps: int) -> None:
        pipe(PROMPT, generator=torch.Generator().manual_seed(0), num_inference_steps=steps, **arguments)

    def maps(steps: int) -> None:
        result = attention_maps(model, PROMPT, WORDS, num_inference_steps=steps, **arguments)
        print(f"{len(result.layers)} layers", end=", ")

    plain(1)  # what is kept from the first call does not count
    least = {steps: _peak(f"plain, {steps} steps", lambda steps=steps: plain(steps)) for steps in counts}
    _peak("search", lambda: find_attentions(model, PROMPT, **arguments), least[counts[0]])
    for steps in counts:
        _peak(f"maps, {steps} steps", lambda steps=steps: maps(steps), least[steps])


def _peak(name: str, call: Callable[[], Any], plain: float = 0.0) -> float:
    _, figures = measured(call)
    print(f"{name}: peak {figures['peak']:.0f} MiB, {figures['peak'] - plain:+.0f}; {figures['cpu']:.0f} s", flush=True)
    return figures["peak"]


class Keeping(AttnProcessor):
    """Keeps all probabilities of a module."""

    def __init__(self) -> None:
        self.kept: list[torch.Tensor] = []

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, *args, **kwargs):
        def keep(*given: torch.Tensor) -> torch.Tensor:
            self.kept.append(type(attn).get_attention_scores(attn, *given))
            return self.kept[-1]

        attn.get_attention_scores = keep
        try:
            return super().__call__(attn, hidden_states, encoder_hidden_states, *args, **kwargs)
        finally:
            del attn.get_attention_scores


def shapes(rounds: int) -> None:
    """Print processor times on shapes-clip: maps against plain generation, and against a processor by hand."""
    models = [DiffusionModel("diffsight/shapes-clip") for _ in range(3)]
    for model in models:
        model.set_progress_bar_config(disable=True)
    bare, ours, by_hand = models

    def draw(pipe: diffusers.DiffusionPipeline) -> None:
        pipe(PROMPT, generator=torch.Generator().manual_seed(0), **DRAWING)

    def processor() -> torch.Tensor:
        own = {}
        for name, module in by_hand.pipeline.unet.named_modules():
            if name.endswith("attn2"):
                module.set_processor(own.setdefault(name, Keeping()))
        draw(by_hand.pipeline)
        maps = []
        for keeping in own.values():
            for probs in keeping.kept:
                heads = probs.chunk(2)[1]  # the conditional half
                side = int(heads.shape[1] ** 0.5)
                found = heads[..., TOKENS].mean(0).T.unflatten(-1, (side, side))[None]
                maps.append(F.interpolate(found, size=(8, 8), mode="bicubic")[0])
        return torch.stack(maps).mean(0)

    def lens() -> torch.Tensor:
        return attention_maps(ours, PROMPT, WORDS, seed=0, **DRAWING).maps

    print(f"largest difference of the maps: {(processor() - lens()).abs().max():.1e}")
    ways = {"bare": lambda: draw(bare.pipeline), "diffsight": lens, "processor": processor}
    ways["all words"] = lambda: attention_maps(ours, PROMPT, seed=0, **DRAWING)
    seconds, noise = interleaved(ways, rounds, of="diffsight")
    print(", ".join(f"{name} {value * 1e3:.1f} ms" for name, value in seconds.items()), f"(noise {noise * 1e3:.1f})")
    for name, other in (
        ("diffsight", "bare"),
        ("all words", "bare"),
        ("processor", "bare"),
        ("diffsight", "processor"),
    ):
        print(f"{name} / {other}: {seconds[name] / seconds[other]:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["flux", "sd1", "shapes"])
    parser.add_argument("--rounds", type=int, default=60)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.what == "shapes":
        shapes(options.rounds)
    elif options.what == "flux":
        flux(torch.float32)
        flux(torch.bfloat16)
    else:
        memory(sd1(), [2, 4], height=128, width=128, guidance_scale=1.0)  # one branch, to save time


if __name__ == "__main__":
    with torch.no_grad():
        main()
