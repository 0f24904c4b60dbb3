"""Train the packaged pipelines from scratch: scenes, VAE, then text encoder and UNet together.

    python -m diffsight.pipelines.shapes.train --encoder clip --out shapes-clip
    python -m diffsight.pipelines.shapes.train --encoder t5 --resume shapes-clip --vae-steps 0 --text-steps 1500 \
        --steps 3800 --out shapes-t5
    python -m diffsight.pipelines.shapes.train --encoder flux --out shapes-flux --scenes 16000 --vae-steps 500 \
        --steps 4000

One command trains one pipeline, writes it in the standard diffusers folder format, and prints its measured fidelity.
It runs on a GPU if there is one (minutes), otherwise on the CPU (one to two hours, on one or two cores).

- VAE: reconstruction (L1 + L2, weighted four times higher on the things than on the background, which fills most of an
  image) and a small Kullback-Leibler term. `scaling_factor` is 1 / standard deviation of the latents (Rombach et al.,
  "High-Resolution Image Synthesis with Latent Diffusion Models", 2022, appendix G). The decoder sees latents with noise
  (Yang et al., "Latent Denoising Makes Good Visual Tokenizers", 2025). Things that look different are then far apart in
  latent space, and the denoiser can distinguish colours and shapes before the last timesteps.
- Text encoder and UNet: v-prediction (Salimans & Ho, "Progressive Distillation", 2022, section 4), captions dropped one
  time in ten for classifier-free guidance (Ho & Salimans, 2022), and an exponential moving average of the weights. Six
  in ten timesteps are sampled from 750 to 999, where the layout is decided.
- Every scene has two captions, "A above B" and "B below A". At first nine in ten are of the first kind, so that the
  order of the names is a hint for the places. After two fifths of the training both kinds are equally frequent. If they
  are equally frequent from the start, neither the order of the names nor the relation is informative on its own, and
  for thousands of steps the right things appear in swapped places.
- T5 has no positions, only distances, and in 4,000 steps with images alone it did not learn which thing goes where.
  Like other T5 encoders it is therefore trained on text before images (`--text-steps`): two queries, discarded
  afterwards, read the colour and the shape of the thing in each place from its output.
- The text encoder is narrow and deep on purpose: a wide one resolves colours and relations in its first layer, and a
  lens over its layers then has nothing to show.
"""

import argparse
import json
import random
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, FluxPipeline, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

from diffsight.pipelines.shapes.evaluate import report
from diffsight.pipelines.shapes.flux_training import make_flux_pipeline, train_decoder, train_transformer
from diffsight.pipelines.shapes.scenes import COLORS, SHAPES, SIZE, WORDS, render, sample_scene
from diffsight.pipelines.shapes.word_tokenizer import TOKENS, make_word_tokenizer

LATENT_NOISE = 0.5  # the maximum noise in training the VAE's decoder, in standard deviations of a latent channel


def make_tokenizer(encoder: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per word: start (CLIP only), words, end, padding."""
    special = ["<pad>", "<start>", "<end>", "<unknown>"]
    vocabulary = {word: i for i, word in enumerate(special + WORDS)}
    return make_word_tokenizer(vocabulary, "<start> $A <end>" if encoder == "clip" else "$A <end>")


def make_text_encoder(encoder: str, tokenizer: PreTrainedTokenizerFast) -> torch.nn.Module:
    """Return an untrained text encoder with twelve layers of width 64 and four heads."""
    shared = dict(
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    if encoder == "clip":
        return CLIPTextModel(
            CLIPTextConfig(
                hidden_size=64,
                intermediate_size=192,
                num_hidden_layers=12,
                num_attention_heads=4,
                max_position_embeddings=TOKENS,
                projection_dim=64,
                **shared,
            )
        )
    return T5EncoderModel(
        T5Config(
            d_model=64,
            d_kv=16,
            d_ff=128,
            num_layers=12,
            num_heads=4,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
            relative_attention_num_buckets=16,
            relative_attention_max_distance=TOKENS,
            **shared,
        )
    )


def make_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=SIZE // 8,
        block_out_channels=(64, 128),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=64,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def make_vae() -> AutoencoderKL:
    return AutoencoderKL(
        sample_size=SIZE,
        block_out_channels=(16, 32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
    )


def make_scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def make_data(count: int, seed: int) -> tuple[torch.Tensor, list[str], torch.Tensor]:
    """Return `count` scenes to train on.

    Returns:
        Images, uint8 `(count, 3, 64, 64)`; two captions of each scene, a list of 2 * count: from the first and from the
        second place, and without the background for three in ten scenes; and the things, `(count, 2, 2)`: the indices
        of the colour and the shape in each place, or the number of colours and shapes where there is nothing.
    """
    rng = random.Random(seed)
    images, captions = torch.empty(count, 3, SIZE, SIZE, dtype=torch.uint8), []
    colors, shapes = list(COLORS), list(SHAPES)
    things = torch.tensor([len(colors), len(shapes)]).repeat(count, 2, 1)
    for i in tqdm(range(count), desc="scenes"):
        scene = sample_scene(rng, two=0.8, noun_rate=0.3)
        images[i] = torch.from_numpy(np.array(render(scene, rng))).permute(2, 0, 1)
        background = rng.random() > 0.3
        captions += [scene.told_from(place).caption(background) for place in (0, 1)]
        for place, thing in enumerate(scene.canonical().things):
            things[i, place] = torch.tensor([colors.index(thing.color), shapes.index(thing.shape)])
    return images, captions, things


def updating(parameters: list[torch.nn.Parameter], rate: float, steps: int) -> Callable[[torch.Tensor], None]:
    """Return a function that takes an optimizer step on a loss. It is called `steps` times."""
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=1e-2, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.15)

    def update(loss: torch.Tensor) -> None:
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()

    return update


def train_vae(vae: AutoencoderKL, images: torch.Tensor, steps: int, device: str) -> None:
    """Train the VAE in place on images, uint8 `(count, 3, 64, 64)`, and set its `scaling_factor`."""
    update = updating(list(vae.parameters()), 2e-3, steps)
    bar = tqdm(range(steps), desc="VAE")
    for _ in bar:
        chosen = torch.randint(len(images), (32,))
        x = images[chosen].to(device).float() / 127.5 - 1
        posterior = vae.encode(x).latent_dist
        z = posterior.sample()
        level = torch.rand(len(z), 1, 1, 1, device=device) * LATENT_NOISE * z.detach().std((0, 2, 3), keepdim=True)
        error = vae.decode(z + level * torch.randn_like(z)).sample - x
        drawn = (x - x[..., :1, :1]).abs().amax(1, keepdim=True) > 0.1
        divergence = posterior.kl().mean() / SIZE**2
        loss = ((error.abs() + error.square()) * (1 + 3 * drawn)).mean() + 1e-2 * divergence
        update(loss)
        if bar.n % 100 == 0:
            bar.set_postfix(l1=f"{error.abs().mean().item():.4f}")
    vae.register_to_config(scaling_factor=float(1 / encode_images(vae, images[:2000], device).std()))


@torch.no_grad()
def encode_images(vae: AutoencoderKL, images: torch.Tensor, device: str) -> torch.Tensor:
    """Return the latents of images, `(count, 4, 8, 8)`: the means of the posterior, not scaled."""
    parts = [vae.encode(part.to(device).float() / 127.5 - 1).latent_dist.mean for part in images.split(250)]
    return torch.cat(parts)


class PlaceReader(torch.nn.Module):
    """Read the things in two places from the output of a text encoder, `(batch, tokens, width)`.

    The results are scores of the colours, `(batch, 2, colours + 1)`, and of the shapes, `(batch, 2, shapes + 1)`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.places = torch.nn.Parameter(torch.randn(2, width))
        self.attention = torch.nn.MultiheadAttention(width, 4, batch_first=True)
        self.scores = torch.nn.Sequential(
            torch.nn.LayerNorm(width),
            torch.nn.Linear(width, 2 * width),
            torch.nn.GELU(),
            torch.nn.Linear(2 * width, len(COLORS) + 1 + len(SHAPES) + 1),
        )

    def forward(self, encoded: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        places = self.places.expand(len(encoded), -1, -1)
        return self.scores(self.attention(places, encoded, encoded)[0]).split([len(COLORS) + 1, len(SHAPES) + 1], -1)


def train_on_text(text_encoder: torch.nn.Module, ids: torch.Tensor, things: torch.Tensor, steps: int) -> None:
    """Train the text encoder in place, on captions alone.

    `ids` has the shape `(count, 2, 16)` and `things` `(count, 2, 2)`, see `make_data`."""
    reader = PlaceReader(text_encoder.config.hidden_size).to(ids.device)
    parameters = [*text_encoder.train().parameters(), *reader.parameters()]
    update = updating(parameters, 1e-3, steps)
    bar = tqdm(range(steps), desc="text encoder")
    for _ in bar:
        chosen = torch.randint(len(ids), (64,), device=ids.device)
        tokens = ids[chosen, torch.randint(2, (64,), device=ids.device)]
        scores = reader(text_encoder(tokens)[0])
        loss = sum(F.cross_entropy(s.flatten(0, 1), things[chosen, :, i].flatten()) for i, s in enumerate(scores))
        update(loss)
        if bar.n % 100 == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}")


def train_denoiser(
    pipe: StableDiffusionPipeline, latents: torch.Tensor, ids: torch.Tensor, empty: torch.Tensor, steps: int, out: Path
) -> None:
    """Train the text encoder and the UNet of `pipe` in place, and leave the moving average of their weights in them.

    The pipeline is written to `out` every 1,000 steps.

    Args:
        latents: `(count, 4, 8, 8)`.
        ids: Two captions of each scene, `(count, 2, 16)`, see `make_data`.
        empty: The tokens of an empty caption, `(16,)`.
    """
    text_encoder, unet, scheduler = pipe.text_encoder.train(), pipe.unet.train(), pipe.scheduler
    parameters = [*text_encoder.parameters(), *unet.parameters()]
    update = updating(parameters, 1e-3, steps)
    average = EMAModel(parameters, decay=0.999, foreach=True)
    device = latents.device
    bar = tqdm(range(steps), desc="text encoder and UNet")
    for _ in bar:
        chosen = torch.randint(len(latents), (64,), device=device)
        second = torch.rand(len(chosen), device=device) < min(0.5, 0.1 + bar.n / steps)
        x, tokens = latents[chosen], ids[chosen, second.long()]
        dropped = torch.rand(len(tokens), 1, device=device) < 0.1
        tokens = torch.where(dropped, empty, tokens)
        early = torch.rand(len(x), device=device) < 0.6
        t = torch.where(
            early,
            torch.randint(750, 1000, (len(x),), device=device),
            torch.randint(0, 1000, (len(x),), device=device),
        )
        noise = torch.randn_like(x)
        predicted = unet(scheduler.add_noise(x, noise, t), t, text_encoder(tokens)[0]).sample
        loss = F.mse_loss(predicted, scheduler.get_velocity(x, noise, t))
        update(loss)
        average.step(parameters)
        if bar.n % 100 == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}")
        if bar.n % 1000 == 999:
            average.store(parameters)
            average.copy_to(parameters)
            save_in_half(pipe, out)
            average.restore(parameters)
    average.copy_to(parameters)
    text_encoder.eval(), unet.eval()


def save_in_half(pipe: StableDiffusionPipeline, folder: Path) -> None:
    """Write the pipeline with its weights in half precision.

    Its configurations still say float32, so that it loads as float32 everywhere."""
    pipe.save_pretrained(folder)
    for file in folder.rglob("*.json"):  # leave out the path that the pipeline was loaded from
        settings = json.loads(file.read_text())
        if settings.pop("_name_or_path", None) is not None:
            file.write_text(json.dumps(settings, indent=2) + "\n")
    for file in folder.glob("*/*.safetensors"):
        weights = {name: tensor.half() for name, tensor in load_file(file).items()}
        save_file(weights, file, metadata={"format": "pt"})


def make_pipeline(encoder: str) -> StableDiffusionPipeline:
    """Return a pipeline with random weights and the given kind of text encoder, `clip` or `t5`."""
    tokenizer = make_tokenizer(encoder)
    return StableDiffusionPipeline(
        vae=make_vae(),
        text_encoder=make_text_encoder(encoder, tokenizer),
        tokenizer=tokenizer,
        unet=make_unet(),
        scheduler=make_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def train(
    encoder: str, out: Path, resume: Path | None, seed: int, scenes: int, vae_steps: int, text_steps: int, steps: int
) -> StableDiffusionPipeline | FluxPipeline:
    """Train a pipeline and write it to the folder `out`.

    With `resume`, continue with the pipeline in that folder. If it has the other kind of encoder, continue with its VAE
    and UNet and a new encoder."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(seed)
    images, captions, things = make_data(scenes, seed)
    if encoder == "flux":
        return train_flux(out, resume, images, captions, vae_steps, steps, device)
    pipe = make_pipeline(encoder)
    if resume:
        known = StableDiffusionPipeline.from_pretrained(resume)
        alike = type(known.text_encoder) is type(pipe.text_encoder)
        pipe.register_modules(vae=known.vae, unet=known.unet, **({"text_encoder": known.text_encoder} if alike else {}))
    pipe.to(device)
    if vae_steps:
        train_vae(pipe.vae.train(), images, vae_steps, device)
    latents = encode_images(pipe.vae.eval(), images, device) * pipe.vae.config.scaling_factor
    ids = pipe.tokenizer([*captions, ""], padding="max_length", return_tensors="pt").input_ids.to(device)
    ids, empty = ids[:-1].unflatten(0, (-1, 2)), ids[-1]
    if text_steps:
        train_on_text(pipe.text_encoder, ids, things.to(device), text_steps)
    train_denoiser(pipe, latents, ids, empty, steps, out)
    save_in_half(pipe, out)
    return pipe


def train_flux(
    out: Path,
    resume: Path | None,
    images: torch.Tensor,
    captions: list[str],
    vae_steps: int,
    steps: int,
    device: str,
) -> FluxPipeline:
    """Train shapes-flux and write it to the folder `out`. With `resume`, continue with the pipeline in that folder.

    Its text encoders are those of the other two pipelines. `images` and `captions` are as `make_data` returns them."""
    pipe = FluxPipeline.from_pretrained(resume) if resume else make_flux_pipeline()
    pipe.to(device)
    with torch.autocast(device, torch.bfloat16, cache_enabled=False):  # a cache would keep the initial weights
        if vae_steps:
            train_vae(pipe.vae.train(), crop(images, SIZE // 2), vae_steps, device)
        latents = encode_images(pipe.vae.eval(), images, device).float()
    if vae_steps:
        train_decoder(pipe.vae, images, latents, vae_steps // 2)
        pipe.vae.register_to_config(shift_factor=float(latents.mean()), scaling_factor=float(1 / latents.std()))
    latents = (latents - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor
    train_transformer(pipe, latents, captions, steps, save=lambda: save_in_half(pipe, out), fresh=resume is None)
    save_in_half(pipe, out)
    return pipe


def crop(images: torch.Tensor, size: int) -> torch.Tensor:
    """Cut a window of `size` x `size` pixels out of each image, `(images, 3, height, width)`, at a random place."""
    corners = (torch.randint(side - size + 1, (len(images),)).tolist() for side in images.shape[-2:])
    return torch.stack([image[:, y : y + size, x : x + size] for image, y, x in zip(images, *corners, strict=True)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--encoder", choices=("clip", "t5", "flux"), default="clip")
    parser.add_argument("--out", type=Path, required=True, help="folder for the pipeline")
    parser.add_argument(
        "--resume",
        type=Path,
        help="folder of a pipeline to continue with, or of one with the other encoder whose UNet to start with (add "
        "--vae-steps 0 to keep its VAE)",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scenes", type=int, default=30_000)
    parser.add_argument("--vae-steps", type=int, default=2_300)
    parser.add_argument("--text-steps", type=int, default=0, help="steps of training the text encoder alone, first")
    parser.add_argument("--steps", type=int, default=7_000)
    options = vars(parser.parse_args())
    started = time.time()
    pipe = train(**options)
    print(f"trained in {(time.time() - started) / 60:.0f} minutes")
    pipe.set_progress_bar_config(disable=True)
    print(report(pipe))


if __name__ == "__main__":
    main()
