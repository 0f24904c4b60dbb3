"""Builds and trains the parts that only shapes-flux has.

    pipe = make_flux_pipeline()
    train_transformer(pipe, latents, captions, steps=4000, save=lambda: save_in_half(pipe, folder))

- The text encoders are the trained ones of shapes-clip and shapes-t5, and stay frozen. All captions are encoded once
  before training starts. FLUX uses the pooled output of CLIP, which transformers reads at the end token. It takes the
  highest id to be the end token, unless the configuration names an id other than 2. The end token is therefore moved
  to the end of the vocabulary, where OpenAI's CLIP has it.
- The transformer learns the velocity `noise - latents` of straight paths (flow matching: Lipman et al. 2022; Liu et
  al., "Rectified Flow", 2022). Times follow a logit-normal distribution (Esser et al., "Scaling Rectified Flow
  Transformers", 2024, section 3.1), shifted towards noise, where the layout is decided.
- One caption in ten is dropped, so that classifier-free guidance works (`true_cfg_scale` with a negative prompt).
- The matrices of the blocks are trained with Muon (Jordan et al. 2024), which needs about half as many steps as AdamW;
  everything else is trained with AdamW. A moving average of the weights is kept.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from diffusers.training_utils import EMAModel
from tqdm.auto import tqdm
from transformers import CLIPTextModel, PreTrainedTokenizerFast, T5EncoderModel

from diffsight.pipelines.shapes.evaluate import draw_scenes, sample_scenes, shares
from diffsight.pipelines.shapes.flux_defaults import CALL
from diffsight.pipelines.shapes.scenes import SIZE
from diffsight.pipelines.shapes.word_tokenizer import TOKENS, make_word_tokenizer

SHIFT = 2.0  # shift of the training times towards noise
BATCH = 32
_FOLDER = Path(__file__).parent


def make_flux_pipeline() -> FluxPipeline:
    """Return a FluxPipeline with the trained text encoders and a random transformer and VAE."""
    clip = CLIPTextModel.from_pretrained(_FOLDER / "clip/text_encoder")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(_FOLDER / "clip/tokenizer")
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),  # with 2, as in training, shapes are less exact
        vae=make_vae(),
        text_encoder=clip,
        tokenizer=_with_end_last(tokenizer, clip),
        text_encoder_2=T5EncoderModel.from_pretrained(_FOLDER / "t5/text_encoder"),
        tokenizer_2=PreTrainedTokenizerFast.from_pretrained(_FOLDER / "t5/tokenizer"),
        transformer=make_transformer(),
    )


def make_transformer() -> FluxTransformer2DModel:
    """Return a transformer with three double and three single blocks of width 192, with four heads."""
    transformer = FluxTransformer2DModel(
        in_channels=16,  # four latent channels, packed two by two
        num_layers=3,
        num_single_layers=3,
        num_attention_heads=4,
        attention_head_dim=48,
        joint_attention_dim=64,
        pooled_projection_dim=64,
        guidance_embeds=False,
        axes_dims_rope=(8, 20, 20),
    )
    torch.nn.init.zeros_(transformer.proj_out.weight)
    return transformer


def make_vae() -> AutoencoderKL:
    """Return a VAE that halves the image twice: 64 x 64 pixels become 16 x 16 latents of four channels."""
    vae = AutoencoderKL(
        sample_size=SIZE,
        block_out_channels=(16, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
    )
    with torch.no_grad():  # almost no noise at first, otherwise the decoder sees little else for hundreds of steps
        vae.quant_conv.bias[vae.config.latent_channels :] = -6
    return vae


def train_decoder(vae: AutoencoderKL, images: torch.Tensor, latents: torch.Tensor, steps: int) -> None:
    """Train the decoder of the VAE in place, on whole images. `train_vae` trains on windows of images.

    Args:
        vae: a VAE whose encoder is trained.
        images: uint8, `(images, 3, 64, 64)`.
        latents: latents of the images from the encoder, not scaled, `(images, 4, 16, 16)`.
        steps: batches of 16 to train.
    """
    parameters = [*vae.post_quant_conv.parameters(), *vae.decoder.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps, pct_start=0.1)
    spread = latents.std()
    for _ in tqdm(range(steps), desc="decoder"):
        chosen = torch.randint(len(latents), (16,))
        x, z = images[chosen].to(latents.device).float() / 127.5 - 1, latents[chosen.to(latents.device)]
        level = 0.2 * spread * torch.rand(len(z), 1, 1, 1, device=z.device)
        with torch.autocast(z.device.type, torch.bfloat16):
            decoded = vae.decode(z + level * torch.randn_like(z)).sample
        error = decoded.float() - x
        drawn = (x - x[..., :1, :1]).abs().amax(1, keepdim=True) > 0.1
        loss = ((error.abs() + error.square()) * (1 + 3 * drawn)).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()


def _with_end_last(tokenizer: PreTrainedTokenizerFast, encoder: CLIPTextModel) -> PreTrainedTokenizerFast:
    """Return the tokenizer with `<end>` as its last token, and reorder the encoder's embedding to match."""
    words = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    end = words.index("<end>")
    order = [i for i in range(len(words)) if i != end] + [end]
    vocabulary = {words[old]: new for new, old in enumerate(order)}
    embedding = encoder.get_input_embeddings()
    embedding.weight.data = embedding.weight.data[order]
    moved = make_word_tokenizer(vocabulary, "<start> $A <end>")
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(encoder.config, name, getattr(moved, name))
    encoder.eos_token_id = moved.eos_token_id  # CLIPTextModel keeps its own copy
    return moved


@torch.no_grad()
def encode_captions(pipe: FluxPipeline, captions: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Encode every different caption once.

    Returns:
        The index of each caption's encoding, `(captions,)`; the encodings by T5, `(different captions, 16, 64)`; and
        the pooled encodings by CLIP, `(different captions, 64)`. The last encodings belong to the empty caption.
    """
    different = [*dict.fromkeys(captions), ""]
    numbers = {caption: number for number, caption in enumerate(different)}
    embeds, pooled = [], []
    for start in tqdm(range(0, len(different), 500), desc="captions"):
        one, other, _ = pipe.encode_prompt(different[start : start + 500], None, max_sequence_length=TOKENS)
        embeds.append(one)
        pooled.append(other)
    return torch.tensor([numbers[caption] for caption in captions]), torch.cat(embeds), torch.cat(pooled)


def optimizers(transformer: FluxTransformer2DModel, steps: int) -> tuple[list, list]:
    """Return Muon for the matrices of the blocks and AdamW for the rest, and the schedule of each: a short warm-up, a
    constant rate, and a linear decay over the last three tenths."""
    named = dict(transformer.named_parameters())
    matrices = [p for name, p in named.items() if "blocks." in name and ".norm" not in name and p.ndim == 2]
    rest = [p for p in named.values() if all(p is not matrix for matrix in matrices)]
    both = [
        torch.optim.Muon(matrices, lr=2e-3, weight_decay=1e-2, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=1e-3, weight_decay=1e-2, betas=(0.9, 0.98)),
    ]

    def rate(step: int) -> float:
        return min(1.0, (step + 1) / 50, (steps - step) / (0.3 * steps))

    return both, [torch.optim.lr_scheduler.LambdaLR(optimizer, rate) for optimizer in both]


def sample_times(count: int) -> torch.Tensor:
    """Draw times in (0, 1), 1 being noise: logit-normal, shifted by SHIFT."""
    times = torch.randn(count).sigmoid()
    return SHIFT * times / (1 + (SHIFT - 1) * times)


def train_transformer(
    pipe: FluxPipeline,
    latents: torch.Tensor,
    captions: Sequence[str],
    steps: int,
    save: Callable[[], None],
    fresh: bool = True,
) -> None:
    """Train the transformer of `pipe` in place and leave the moving average of its weights in it.

    Every 250 steps, `save` is called with the average in place. Every 500 steps, the share of 50 captions that are
    drawn correctly is printed.

    Args:
        pipe: a pipeline whose other parts are trained.
        latents: scaled latents, `(images, 4, 16, 16)`.
        captions: two for each image, one after the other.
        steps: batches of 32 to train.
        save: writes the pipeline to disk.
        fresh: whether training begins. If so, captions that name the thing in the first place first are more frequent
            for 400 steps, for the reason given at the top of `train.py`.
    """
    device, side = latents.device, latents.shape[-1]
    transformer = pipe.transformer.train()
    numbers, embeds, pooled = encode_captions(pipe, captions)
    numbers = numbers.unflatten(0, (-1, 2)).to(device)
    packed = pipe._pack_latents(latents, *latents.shape)
    places = pipe._prepare_latent_image_ids(len(latents), side // 2, side // 2, device, latents.dtype)
    text_places = torch.zeros(TOKENS, 3, device=device)
    parameters = list(transformer.parameters())
    average = EMAModel(parameters, decay=0.998, foreach=True)
    both, schedules = optimizers(transformer, steps)
    losses: list[float] = []
    bar = tqdm(range(steps), desc="transformer")
    for step in bar:
        chosen = torch.randint(len(packed), (BATCH,), device=device)
        second = torch.rand(BATCH, device=device) < (min(0.5, 0.1 + step / 1000) if fresh else 0.5)
        number = numbers[chosen, second.long()]
        number[torch.rand(BATCH, device=device) < 0.1] = len(embeds) - 1
        x = packed[chosen]
        time = sample_times(BATCH).to(device)
        noise = torch.randn_like(x)
        with torch.autocast(device.type, torch.bfloat16):
            velocity = transformer(
                hidden_states=torch.lerp(x, noise, time[:, None, None]),
                encoder_hidden_states=embeds[number],
                pooled_projections=pooled[number],
                timestep=time,
                img_ids=places,
                txt_ids=text_places,
            ).sample
        loss = F.mse_loss(velocity.float(), noise - x)
        for optimizer in both:
            optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for part in (*both, *schedules):
            part.step()
        average.step(parameters)
        losses.append(loss.item())
        if step % 50 == 49:
            bar.set_postfix(loss=f"{sum(losses[-50:]) / 50:.4f}")
        if step % 250 == 249:
            average.store(parameters)
            average.copy_to(parameters)
            save()
            if step % 500 == 499:
                recent = sum(losses[-500:]) / 500
                print(f"\nstep {step + 1}: loss {recent:.4f}, {share_right(pipe):.0%} of 50 captions right", flush=True)
            average.restore(parameters)
    average.copy_to(parameters)
    transformer.eval()


def share_right(pipe: FluxPipeline, count: int = 50, **arguments) -> float:
    """Return the share of `count` captions of two things that the pipeline draws correctly in 20 steps."""
    pipe.transformer.eval()
    pipe.set_progress_bar_config(disable=True)
    asked = sample_scenes(count, seed=1)
    right = shares(asked, draw_scenes(pipe, asked, **{"num_inference_steps": 20, **CALL, **arguments}))["scene"]
    pipe.transformer.train()
    return right
