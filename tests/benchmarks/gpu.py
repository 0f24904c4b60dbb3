"""Runs on a GPU: pipelines of the sizes of SD 1.5, SDXL and FLUX with random weights, in at most five minutes.

    pip install nnsight==0.8.1 && python tests/benchmarks/gpu.py        # nnsight's column is left out without it
    python tests/benchmarks/gpu.py --small                              # small pipelines, for a try on a CPU

For each pipeline it prints how long these take, in milliseconds and as a share of the bare call: an unread run, a read
in every step (against a hook and nnsight), and the diffusion lens in one call against its loop. Then the peak memory of
reads and of `run.record` above that of the bare call, and the synchronisations that a run adds. For the first pipeline
it also prints what nnsight takes, and a run of a compiled denoiser. Weights are random; times do not depend on them.
"""

import argparse
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable

import diffusers
import torch
import transformers

from diffsight import DiffusionModel, diffusion_lens

try:
    import nnsight
except ImportError:
    nnsight = None

PROMPT, STEPS, ROUNDS, LENS_LAYERS = "a red circle below a blue square", 4, 5, 4
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.float16 if DEVICE == "cuda" else torch.float32


def clip(tokenizer: object, width: int, layers: int, projected: bool = False) -> transformers.PreTrainedModel:
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers}
    kind = transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel
    config = transformers.CLIPTextConfig(**sizes, **ends, num_attention_heads=width // 64, projection_dim=width)
    return made(kind, config)


def made(cls: type[torch.nn.Module], *args: object, **config: object) -> torch.nn.Module:
    """Return a module that is built where it is used, in its type: the random weights of FLUX take long on a CPU."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(DTYPE)
    try:
        with torch.device(DEVICE):
            return cls(*args, **config).eval()
    finally:
        torch.set_default_dtype(before)


def autoencoder(channels: int, width: int) -> diffusers.AutoencoderKL:
    down, up = ("DownEncoderBlock2D",) * 4, ("UpDecoderBlock2D",) * 4
    blocks = (width, 2 * width, 4 * width, 4 * width)
    return diffusers.AutoencoderKL(
        down_block_types=down,
        up_block_types=up,
        block_out_channels=blocks,
        layers_per_block=2,
        latent_channels=channels,
        shift_factor=0.0,  # FLUX needs one
    )


def stable_diffusion(small: bool) -> diffusers.DiffusionPipeline:
    """Return a pipeline of the size of Stable Diffusion 1.5."""
    tokenizer = clip_tokenizer()
    width, blocks = (64, (32, 32, 64, 64)) if small else (768, (320, 640, 1280, 1280))
    return diffusers.StableDiffusionPipeline(
        text_encoder=clip(tokenizer, width, 12),
        tokenizer=tokenizer,
        unet=made(
            diffusers.UNet2DConditionModel,
            sample_size=8 if small else 64,
            cross_attention_dim=width,
            attention_head_dim=8,
            block_out_channels=blocks,
        ),
        vae=autoencoder(4, 32 if small else 128),
        scheduler=diffusers.DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def stable_diffusion_xl(small: bool) -> diffusers.DiffusionPipeline:
    """Return a pipeline of the size of Stable Diffusion XL."""
    tokenizer = clip_tokenizer()
    widths, blocks = ((64, 64), (32, 64, 64)) if small else ((768, 1280), (320, 640, 1280))
    return diffusers.StableDiffusionXLPipeline(
        text_encoder=clip(tokenizer, widths[0], 12),
        text_encoder_2=clip(tokenizer, widths[1], 4 if small else 32, projected=True),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=made(
            diffusers.UNet2DConditionModel,
            sample_size=8 if small else 128,
            block_out_channels=blocks,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 1, 2) if small else (1, 2, 10),
            attention_head_dim=(2, 4, 4) if small else (5, 10, 20),
            cross_attention_dim=sum(widths),
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=widths[1] + 6 * 256,
            use_linear_projection=True,
        ),
        vae=autoencoder(4, 32 if small else 128),
        scheduler=diffusers.EulerDiscreteScheduler(),
    )


def flux(small: bool) -> diffusers.DiffusionPipeline:
    """Return a pipeline of the size of FLUX.1, with the T5 cut to two layers: it runs once and is not measured."""
    tokenizer = clip_tokenizer()
    heads, double, single, width = (2, 2, 2, 64) if small else (24, 19, 38, 4096)
    t5 = transformers.T5Config(vocab_size=1000, d_model=width, d_kv=64, d_ff=2 * width, num_layers=2, num_heads=8)
    return diffusers.FluxPipeline(
        text_encoder=clip(tokenizer, 64 if small else 768, 12),
        tokenizer=tokenizer,
        text_encoder_2=made(transformers.T5EncoderModel, t5),
        tokenizer_2=tokenizer,
        transformer=made(
            diffusers.FluxTransformer2DModel,
            in_channels=64,
            num_layers=double,
            num_single_layers=single,
            num_attention_heads=heads,
            joint_attention_dim=width,
            pooled_projection_dim=64 if small else 768,
        ),
        vae=autoencoder(16, 32 if small else 128),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    )


def clip_tokenizer() -> transformers.PreTrainedTokenizerBase:
    """Return the tokenizer of a packaged pipeline, padded to the length that CLIP has."""
    tokenizer = DiffusionModel("diffsight/shapes-clip").pipeline.tokenizer
    tokenizer.model_max_length = 77
    return tokenizer


def milliseconds(call: Callable[[], object], rounds: int = ROUNDS) -> float:
    call()  # warms up
    times = []
    for _ in range(rounds):
        synchronize()
        started = time.perf_counter()
        call()
        synchronize()
        times.append((time.perf_counter() - started) * 1e3)
    return statistics.median(times)


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def peak(call: Callable[[], object]) -> float:
    """Return the peak memory of a call on the GPU, in MiB."""
    if DEVICE != "cuda":
        return 0.0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def synchronizations(call: Callable[[], object]) -> int:
    """Return how often a call waits for the GPU, as far as PyTorch notices."""
    if DEVICE != "cuda":
        return 0
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            call()
        return sum("synchroniz" in str(one.message) for one in seen)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def ways(pipeline: diffusers.DiffusionPipeline, size: int, denoiser: str) -> dict[str, Callable[[], object]]:
    """Return the ways in which a pipeline is called."""
    model = DiffusionModel(pipeline)
    settings = {"num_inference_steps": STEPS, "height": size, "width": size, "output_type": "latent"}
    inner = getattr(pipeline, denoiser)
    point = "mid_block" if hasattr(inner, "mid_block") else "transformer_blocks.1"

    def bare() -> None:
        pipeline(PROMPT, generator=torch.Generator().manual_seed(0), **settings)

    def hook() -> None:
        handle = inner.get_submodule(point).register_forward_hook(lambda module, args, output: None)
        bare()
        handle.remove()

    def read() -> None:
        with model.generate(PROMPT, seed=0, **settings) as run:
            for _ in run.steps:
                run[f"{denoiser}.{point}"].output

    def record() -> None:
        with model.generate(PROMPT, seed=0, **settings) as run:
            run.record(f"{denoiser}.{point}", device="cpu")

    def lens(batch_size: int | None) -> Callable[[], object]:
        layers = [*range(0, 12, 12 // LENS_LAYERS)]
        options = {**settings, "output_type": "pil", "layers": layers, "encoder": "text_encoder", "progress": False}
        return lambda: diffusion_lens(model, PROMPT, batch_size=batch_size, **options)

    found = {
        "bare": bare,
        "unread run": lambda: model.generate(PROMPT, seed=0, **settings).result,
        "hook in every step": hook,
        "read in every step": read,
        "record": record,
        "lens, one call": lens(None),
        "lens, a loop": lens(1),
    }
    return found


def with_nnsight(folder: str, size: int) -> Callable[[], object]:
    """Return a run of nnsight that reads the same point of the pipeline of SD 1.5's size, which is in a folder."""
    model = nnsight.DiffusionModel(folder, dispatch=True, torch_dtype=DTYPE)
    model.pipeline.to(DEVICE)
    model.pipeline.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": STEPS, "height": size, "width": size, "output_type": "latent"}

    def read() -> None:
        with model.generate(PROMPT, seed=0, **settings) as tracer:
            for _ in tracer.iter[:STEPS]:
                model.unet.mid_block.output.save()

    return read


def measure(
    name: str, build: Callable[[bool], diffusers.DiffusionPipeline], size: int, denoiser: str, small: bool
) -> None:
    torch.manual_seed(0)
    pipeline = build(small).to(DEVICE, DTYPE)
    pipeline.set_progress_bar_config(disable=True)
    calls = ways(pipeline, size, denoiser)
    if nnsight is not None and build is stable_diffusion:
        with tempfile.TemporaryDirectory() as folder:
            pipeline.save_pretrained(folder)
            calls["read in every step, nnsight"] = with_nnsight(folder, size)
    bare = milliseconds(calls["bare"])
    print(f"\n{name}, {STEPS} steps, {size} pixels: bare {bare:.1f} ms", flush=True)
    for way, call in calls.items():
        if way == "bare":
            continue
        try:
            took = milliseconds(call, 2 if way.startswith("lens") else ROUNDS)
        except Exception as error:  # the other rows are worth having
            print(f"  {way:28} failed: {type(error).__name__}: {error}", flush=True)
            continue
        added, waits = peak(call) - peak(calls["bare"]), synchronizations(call) - synchronizations(calls["bare"])
        print(
            f"  {way:28}{took:10.1f} ms {took / bare:6.3f} x   peak {added:+8.1f} MiB   synchronisations {waits:+d}",
            flush=True,
        )
    if build is not stable_diffusion:  # compiling the larger ones takes minutes
        return
    getattr(pipeline, denoiser).compile()
    compiled, unread = milliseconds(calls["bare"], 2), milliseconds(calls["unread run"], 2)
    print(f"  compiled: bare {compiled:.1f} ms, unread run {unread:.1f} ms", flush=True)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="small pipelines, for a try on a CPU")
    small = parser.parse_args().small
    warnings.filterwarnings("ignore")
    diffusers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    print(torch.cuda.get_device_name() if DEVICE == "cuda" else "CPU", torch.__version__)
    for name, build, size, denoiser in (
        ("SD 1.5's size", stable_diffusion, 512, "unet"),
        ("SDXL's size", stable_diffusion_xl, 1024, "unet"),
        ("FLUX's size", flux, 1024, "transformer"),
    ):
        measure(name, build, 64 if small else size, denoiser, small)
        if DEVICE == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
