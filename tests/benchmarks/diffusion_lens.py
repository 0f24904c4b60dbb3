"""The diffusion lens over all layers: diffsight's one call, the loop of nnsight's tutorial, and a loop with hooks.

    pip install nnsight==0.8.1 && python tests/benchmarks/diffusion_lens.py     # without nnsight its row is omitted

It runs on `diffsight/shapes-clip` with 20 steps and, if there is a GPU, on a pipeline of the size of Stable Diffusion
1.5 with random weights in half precision. All ways run in one process, in shuffled rounds. It prints medians, and how
many times longer each loop takes than the one call, in wall time and in processor time.
"""

import argparse
import random
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import diffusers
import numpy as np
import torch
import transformers
from PIL import Image

from diffsight import DiffusionModel, diffusion_lens
from diffsight.pipelines.packaged import FOLDERS

try:
    import nnsight
except ImportError:
    nnsight = None

PROMPT = "a red circle below a blue square on a gray background"
Images = list[Image.Image]


def one_call(pipeline: diffusers.StableDiffusionPipeline, steps: int, batch_size: int | None) -> Callable[[], Images]:
    model = DiffusionModel(pipeline)

    def draw() -> Images:
        settings = {"num_inference_steps": steps, "batch_size": batch_size, "progress": False}
        return list(diffusion_lens(model, PROMPT, seed=0, **settings).images)

    return draw


def hooks(pipeline: diffusers.StableDiffusionPipeline, steps: int) -> Callable[[], Images]:
    encoder = pipeline.text_encoder

    def draw_layer(layer: int | str) -> Image.Image:
        taken, normed = [], []

        def put(module: torch.nn.Module, args: tuple) -> tuple | None:
            normed.append(module)
            return (taken[0],) if len(normed) == 1 else None  # the prompt comes first, then the negative prompt

        handles = [encoder.final_layer_norm.register_forward_pre_hook(put)]
        layers = encoder.encoder.layers
        if layer == "embedding":
            handles.append(layers[0].register_forward_pre_hook(lambda module, args: taken.append(args[0])))
        else:
            handles.append(layers[layer].register_forward_hook(lambda module, args, output: taken.append(output)))
        try:
            generator = torch.Generator().manual_seed(0)
            return pipeline(PROMPT, num_inference_steps=steps, generator=generator).images[0]
        finally:
            for handle in handles:
                handle.remove()

    return lambda: [draw_layer(layer) for layer in ("embedding", *range(len(encoder.encoder.layers)))]


def tutorial(folder: str, steps: int, **arguments: object) -> Callable[[], Images]:
    """Return the loop of nnsight's tutorial `diffusion_lens.ipynb`, with the embedding before the first layer."""
    model = nnsight.DiffusionModel(folder, dispatch=True, **arguments)
    model.pipeline.set_progress_bar_config(disable=True)
    if torch.cuda.is_available() and arguments:
        model.pipeline.to("cuda")
    count = model.text_encoder.config.num_hidden_layers

    def draw() -> Images:
        images = []
        for layer in ("embedding", *range(count)):
            with model.generate(PROMPT, num_inference_steps=steps, seed=0) as tracer:
                if layer == "embedding":
                    hidden = model.text_encoder.encoder.layers[0].input
                else:
                    hidden = model.text_encoder.encoder.layers[layer].output
                model.text_encoder.final_layer_norm.input = hidden
                result = tracer.result.save()
            images.append(result.images[0])
        return images

    return draw


def large() -> diffusers.StableDiffusionPipeline:
    """Return a pipeline of the size of Stable Diffusion 1.5, with random weights in half precision."""
    tokenizer = DiffusionModel("diffsight/shapes-clip").pipeline.tokenizer
    tokenizer.model_max_length = 77
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    sizes = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    blocks = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2}
    down, up = ("DownEncoderBlock2D",) * 4, ("UpDecoderBlock2D",) * 4
    torch.manual_seed(0)
    pipeline = diffusers.StableDiffusionPipeline(
        text_encoder=transformers.CLIPTextModel(transformers.CLIPTextConfig(**sizes, **ends)),
        tokenizer=tokenizer,
        unet=diffusers.UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8),
        vae=diffusers.AutoencoderKL(down_block_types=down, up_block_types=up, **blocks),
        scheduler=diffusers.DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return pipeline.to(torch.float16)


def compare(title: str, ways: dict[str, Callable[[], Images]], rounds: int) -> None:
    """Print how long each way takes, and how many times as long as the first."""
    clock: dict[str, list[float]] = {name: [] for name in ways}
    work: dict[str, list[float]] = {name: [] for name in ways}
    images = {}
    for turn in range(rounds + 1):
        for name in random.sample([*ways], len(ways)):
            started, worked = time.perf_counter(), time.process_time()
            images[name] = ways[name]()
            if turn:  # the first round warms up
                clock[name].append(time.perf_counter() - started)
                work[name].append(time.process_time() - worked)
    first = next(iter(ways))
    print(f"{title}: {len(images[first])} images, {torch.get_num_threads()} threads, {rounds} rounds")
    for name in ways:
        seconds, worked = statistics.median(clock[name]), statistics.median(work[name])
        times = [statistics.median(of[name]) / statistics.median(of[first]) for of in (clock, work)]
        off = max(_difference(a, b) for a, b in zip(images[name], images[first], strict=True))
        print(
            f"  {name:24}{seconds:8.2f} s {times[0]:6.2f} x    processor {worked:8.2f} s {times[1]:6.2f} x    "
            f"largest difference {off} of 255",
            flush=True,
        )


def _difference(a: Image.Image, b: Image.Image) -> int:
    return int(np.abs(np.asarray(a, dtype=int) - np.asarray(b, dtype=int)).max())


def contestants(
    pipeline: diffusers.StableDiffusionPipeline, folder: str, steps: int, batch_size: int | None, **arguments: object
) -> dict[str, Callable[[], Images]]:
    pipeline.set_progress_bar_config(disable=True)
    ways = {"diffsight, one call": one_call(pipeline, steps, batch_size), "loop with hooks": hooks(pipeline, steps)}
    return ways | ({"loop with nnsight": tutorial(folder, steps, **arguments)} if nnsight else {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--threads", type=int, help="(default: PyTorch's own)")
    parser.add_argument("--batch-size", type=int, help="rows in a call (default: all)")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    if options.threads:
        torch.set_num_threads(options.threads)
    folder = str(FOLDERS["diffsight/shapes-clip"])
    pipeline = DiffusionModel("diffsight/shapes-clip").pipeline
    ways = contestants(pipeline, folder, options.steps, options.batch_size)
    compare("diffsight/shapes-clip", ways, options.rounds)
    if not torch.cuda.is_available():
        print("no GPU: skipped the pipeline of the size of Stable Diffusion 1.5")
        return
    with tempfile.TemporaryDirectory() as folder:
        pipeline = large()
        if nnsight:
            pipeline.save_pretrained(Path(folder))
        pipeline.to("cuda")
        ways = contestants(pipeline, folder, options.steps, options.batch_size, torch_dtype=torch.float16)
        compare("Stable Diffusion 1.5's size, float16", ways, options.rounds)


if __name__ == "__main__":
    main()
