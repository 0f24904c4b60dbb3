"""Small diffusers pipelines with random weights, built from configurations without a model hub.

    small = PIPELINES["stable_diffusion"]
    pipe = small.build()
    image = pipe(**small.inputs(), generator=torch.Generator().manual_seed(0)).images

Every builder returns the same weights each time and leaves torch's global random state alone. The
images mean nothing, but prompt, seed and every layer named in the registry change them, and the
structure (which module runs when, in which shape) is that of the full-size pipeline.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

# diffusers and transformers load a class when it is first asked for: going through the package
# keeps a test that needs one pipeline from importing all of them.
import diffusers
import torch
import transformers
from PIL import Image
from tokenizers.pre_tokenizers import ByteLevel

# Words that become one token each; anything else is spelled out in characters.
WORDS = ("a", "the", "red", "green", "blue", "circle", "square", "above", "below", "photo", "of")

SIDE = 32  # pixels of every image
WIDTH = 32  # features of a token
TOKENS = 16  # T5's length: the pipelines' defaults, up to 512, would only cost time


# Registry


@dataclass(frozen=True)
class SmallPipeline:
    """How to build and call one pipeline, and the names of the parts that tests ask for."""

    build: Callable[[], diffusers.DiffusionPipeline]
    inputs: Callable[[], dict[str, Any]]  # keyword arguments of one call, without `generator`
    denoiser: str = "transformer"
    denoiser_block: str = "transformer.transformer_blocks.0"  # runs in each denoiser call
    text_encoder_layer: str | None = "text_encoder.encoder.block.1"  # its output is used
    decode: str | None = "vae.decode"  # the method that turns latents into pixels
    calls_per_step: int = 1  # denoiser calls for each `scheduler.step`
    steps: int = 3  # `scheduler.step` calls in a run with `inputs()`
    video: bool = False  # the result is in `.frames`, not in `.images`


PIPELINES: dict[str, SmallPipeline] = {}

IMAGE = Image.linear_gradient("L").resize((SIDE, SIDE)).convert("RGB")
MASK = Image.linear_gradient("L").resize((SIDE, SIDE)).point(lambda p: 255 * (p < 128))

STEPS = {"num_inference_steps": 3, "output_type": "pt"}
CALL = {**STEPS, "prompt": "a red circle above a blue square", "guidance_scale": 5.0}
SIZED = {**CALL, "height": SIDE, "width": SIDE, "max_sequence_length": TOKENS}


def _register(call: dict[str, Any], **facts: Any) -> Callable[[Callable], Callable]:
    """Register a builder in `PIPELINES` under its own name."""

    def enter(build: Callable[[], diffusers.DiffusionPipeline]) -> Callable:
        PIPELINES[build.__name__] = SmallPipeline(build, functools.partial(dict, call), **facts)
        return build

    return enter


CLIP_LAYER = "text_encoder.encoder.layers.1"
_UNET_FACTS = {"denoiser": "unet", "denoiser_block": "unet.mid_block"}
_register_unet = functools.partial(_register, text_encoder_layer=CLIP_LAYER, **_UNET_FACTS)


# Tokenizers


def _merges(words: list[list[str]]) -> list[tuple[str, str]]:
    """Return BPE merges, in order, that make one token of each word; a word is a list of symbols."""
    merges = []
    while unfinished := [word for word in words if len(word) > 1]:
        merges.append((unfinished[0][0], unfinished[0][1]))
        # An earlier merge comes first in every later word, so carry it out in all of them.
        words = [_merge(word, merges[-1]) for word in words]
    return merges


def _merge(word: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    for symbol in word:
        if merged and (merged[-1], symbol) == pair:
            merged[-1] += symbol
        else:
            merged.append(symbol)
    return merged


def _numbered(tokens: list[str]) -> dict[str, int]:
    """Return a vocabulary. Two merges may spell the same token, which must have only one number."""
    return {token: i for i, token in enumerate(dict.fromkeys(tokens))}


def clip_tokenizer(pad: str = "<|endoftext|>") -> transformers.CLIPTokenizer:
    """Byte-level BPE in CLIP's layout: bytes, bytes that end a word, merges, start, end."""
    letters = sorted(ByteLevel.alphabet())
    merges = _merges([[*word[:-1], word[-1] + "</w>"] for word in WORDS])
    tokens = [*letters, *(letter + "</w>" for letter in letters), *map("".join, merges)]
    vocab = _numbered([*tokens, "<|startoftext|>", "<|endoftext|>"])
    return transformers.CLIPTokenizer(vocab, merges, pad_token=pad, model_max_length=77)


def t5_tokenizer() -> transformers.T5Tokenizer:
    """Unigram pieces in T5's layout: pad, end, unknown, then words and printable characters."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -3.0)]
    pieces += [(f"▁{word}", -2.0) for word in WORDS]
    pieces += [(chr(code), -5.0) for code in range(33, 127)]
    return transformers.T5Tokenizer(pieces, extra_ids=0, model_max_length=77)


def gemma_tokenizer() -> transformers.GemmaTokenizer:
    """BPE in Gemma's layout: special tokens, the 256 bytes to fall back on, characters, merges."""
    merges = _merges([[*word] for word in WORDS] + [["▁", *word] for word in WORDS])
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *(f"<0x{i:02X}>" for i in range(256))]
    tokens += ["▁", *(chr(code) for code in range(33, 127)), *map("".join, merges)]
    vocab = _numbered(tokens)
    return transformers.GemmaTokenizer(vocab, merges, add_bos_token=True, model_max_length=77)


# Models


def seeded(build: Callable[..., torch.nn.Module]) -> Callable[..., Any]:
    """Wrap a function that builds a model: use a random stream of its own, and return the model in evaluation mode."""

    @functools.wraps(build)
    def seeded(*args: Any, seed: int = 0, **kwargs: Any) -> torch.nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            return build(*args, **kwargs).eval()

    return seeded


# Three, so that layer 1 still matters where the pipeline takes the last but one.
_LAYERS = {"num_hidden_layers": 3, "num_attention_heads": 2}


@seeded
def clip_encoder(
    tokenizer: transformers.CLIPTokenizer, width: int = WIDTH, projection: bool = False
) -> transformers.CLIPTextModel | transformers.CLIPTextModelWithProjection:
    """CLIP's text tower."""
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "projection_dim": width}
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = transformers.CLIPTextConfig(vocab_size=len(tokenizer), **_LAYERS, **sizes, **ends)
    name = "CLIPTextModelWithProjection" if projection else "CLIPTextModel"
    return getattr(transformers, name)(config)


@seeded
def t5_encoder(
    tokenizer: transformers.T5Tokenizer, family: str = "T5"
) -> transformers.T5EncoderModel | transformers.UMT5EncoderModel:
    """T5 v1.1, or with `family="UMT5"` a position bias in each layer."""
    sizes = {"d_model": WIDTH, "d_kv": WIDTH // 2, "d_ff": 2 * WIDTH, "num_heads": 2}
    config = getattr(transformers, f"{family}Config")(
        vocab_size=len(tokenizer), num_layers=3, feed_forward_proj="gated-gelu", **sizes
    )
    return getattr(transformers, f"{family}EncoderModel")(config)


@seeded
def gemma_encoder(tokenizer: transformers.GemmaTokenizer) -> transformers.Gemma2Model:
    """Gemma 2 without its language-model head."""
    sizes = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH}
    heads = {"num_key_value_heads": 1, "head_dim": WIDTH // 2}
    config = transformers.Gemma2Config(vocab_size=len(tokenizer), **_LAYERS, **sizes, **heads)
    return transformers.Gemma2Model(config)


@seeded
def vae(**config: Any) -> diffusers.AutoencoderKL:
    """Images to four channels at half the size."""
    down, up = ("DownEncoderBlock2D",) * 2, ("UpDecoderBlock2D",) * 2
    blocks = {"down_block_types": down, "up_block_types": up, "block_out_channels": (8, 16)}
    return diffusers.AutoencoderKL(**blocks, norm_num_groups=4, sample_size=SIDE, **config)


_BLOCKS = {"block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 4}
# What a ControlNet has to share with the UNet it steers. "attention_head_dim" is the number of
# heads: diffusers keeps the old name.
_UNET = {**_BLOCKS, "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D")}
_UNET |= {"cross_attention_dim": WIDTH, "attention_head_dim": 2}


@seeded
def unet(**config: Any) -> diffusers.UNet2DConditionModel:
    """Stable Diffusion's UNet: attention at full and, in the middle, at half resolution."""
    up = {"up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}
    return diffusers.UNet2DConditionModel(**{"sample_size": SIDE // 2, **_UNET, **up, **config})


@seeded
def controlnet_model() -> diffusers.ControlNetModel:
    """A ControlNet for `unet()`."""
    net = diffusers.ControlNetModel(**_UNET, conditioning_embedding_out_channels=(8, 16))
    # A fresh ControlNet ends in zero convolutions: the control image would change nothing.
    last = net.controlnet_cond_embedding.conv_out
    for conv in (last, *net.controlnet_down_blocks, net.controlnet_mid_block):
        torch.nn.init.normal_(conv.weight, std=0.5)
    return net


@seeded
def dit(cls: type[torch.nn.Module], **config: Any) -> torch.nn.Module:
    """A diffusion transformer of two layers."""
    heads = {"num_attention_heads": 2, "attention_head_dim": WIDTH // 2}
    return cls(**{"num_layers": 2, "in_channels": 4, "out_channels": 4, **heads, **config})


@seeded
def model(cls: type[torch.nn.Module], **config: Any) -> torch.nn.Module:
    """Build a model that only one pipeline has."""
    return cls(**config)


# Parts of pipelines. Two models of one kind in a pipeline have different seeds, and so different weights.


def text_parts(build: Callable[..., Any], tokenizer: Any, suffix: str = "", **config: Any) -> dict:
    """Return a tokenizer and its encoder, under the names that pipelines use."""
    text_encoder = build(tokenizer, **config)
    return {f"tokenizer{suffix}": tokenizer, f"text_encoder{suffix}": text_encoder}


def flow_scheduler(**config: Any) -> diffusers.FlowMatchEulerDiscreteScheduler:
    return diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, **config)


# Stable Diffusion's settings, and no warning about the missing safety checker.
_NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
DDIM = {**_NOISE, "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
_UNCHECKED = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}


def quiet_pipeline(cls: type[diffusers.DiffusionPipeline], /, **components: Any) -> Any:
    """Return a pipeline without a progress bar."""
    pipe = cls(**components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def stable_diffusion_family(cls: type[diffusers.DiffusionPipeline], /, **changes: Any) -> Any:
    """Return a pipeline of Stable Diffusion's family. `changes` replaces or adds components."""
    scheduler = diffusers.DDIMScheduler(**DDIM)
    parts = {"vae": vae(seed=1), "unet": unet(seed=2), "scheduler": scheduler, **_UNCHECKED}
    return quiet_pipeline(cls, **{**parts, **text_parts(clip_encoder, clip_tokenizer()), **changes})


# Pipelines for images


@_register_unet(CALL)
def stable_diffusion() -> diffusers.StableDiffusionPipeline:
    """Stable Diffusion 1: one CLIP encoder."""
    return stable_diffusion_family(diffusers.StableDiffusionPipeline)


def add_image_prompt(pipe: diffusers.StableDiffusionPipeline) -> dict[str, Any]:
    """Give the UNet an IP-Adapter of four tokens, with random weights; return what it is called with."""
    state, generator = {}, torch.Generator().manual_seed(5)
    names = [name for name in pipe.unet.attn_processors if "attn2" in name]
    for number, name in enumerate(names):
        width = pipe.unet.get_submodule(name.removesuffix(".processor")).to_k.out_features
        for part in ("k", "v"):
            state[f"{2 * number + 1}.to_{part}_ip.weight"] = torch.randn(width, WIDTH, generator=generator)
    projection = {"proj.weight": torch.randn(4 * WIDTH, 8, generator=generator)}
    projection |= {"proj.bias": torch.zeros(4 * WIDTH)}
    projection |= {"norm.weight": torch.ones(WIDTH), "norm.bias": torch.zeros(WIDTH)}
    pipe.unet._load_ip_adapter_weights([{"image_proj": projection, "ip_adapter": state}])
    return {"ip_adapter_image_embeds": [torch.randn(2, 1, 8, generator=generator)]}


def with_second_order(pipe: diffusers.StableDiffusionPipeline) -> diffusers.StableDiffusionPipeline:
    """Swap in Heun's scheduler: n steps are 2n - 1 calls of denoiser and `scheduler.step`."""
    pipe.scheduler = diffusers.HeunDiscreteScheduler.from_config(pipe.scheduler.config)
    return pipe


# Of four steps, a strength of 0.75 leaves out the first.
@_register_unet({**CALL, "image": IMAGE, "num_inference_steps": 4, "strength": 0.75})
def img2img() -> diffusers.StableDiffusionImg2ImgPipeline:
    """Stable Diffusion, from an image."""
    return stable_diffusion_family(diffusers.StableDiffusionImg2ImgPipeline)


@_register_unet({**CALL, "image": IMAGE, "mask_image": MASK})
def inpaint() -> diffusers.StableDiffusionInpaintPipeline:
    """With an inpainting UNet, which also sees the mask and the masked image."""
    return stable_diffusion_family(diffusers.StableDiffusionInpaintPipeline, unet=unet(seed=2, in_channels=9))


@_register_unet({**CALL, "image": IMAGE})
def controlnet() -> diffusers.StableDiffusionControlNetPipeline:
    """Stable Diffusion steered by a second image."""
    cls = diffusers.StableDiffusionControlNetPipeline
    return stable_diffusion_family(cls, controlnet=controlnet_model(seed=3))


@_register_unet(CALL)
def latent_consistency() -> diffusers.LatentConsistencyModelPipeline:
    """The UNet takes the guidance scale as an embedding: no unconditional branch."""
    cls, scheduler = diffusers.LatentConsistencyModelPipeline, diffusers.LCMScheduler(**DDIM)
    return stable_diffusion_family(cls, unet=unet(seed=2, time_cond_proj_dim=16), scheduler=scheduler)


@_register_unet(CALL)
def stable_diffusion_xl() -> diffusers.StableDiffusionXLPipeline:
    """Two CLIP encoders side by side, the second also pooled."""
    sizes = {"cross_attention_dim": 16 + 32, "addition_time_embed_dim": 8}
    # The pooled text, and six numbers: original size, corner of the crop, target size.
    sizes |= {"projection_class_embeddings_input_dim": 32 + 6 * 8}
    kinds = {"transformer_layers_per_block": (1, 2), "addition_embed_type": "text_time"}
    return quiet_pipeline(
        diffusers.StableDiffusionXLPipeline,
        **text_parts(clip_encoder, clip_tokenizer(), width=16),
        **text_parts(clip_encoder, clip_tokenizer("!"), "_2", width=32, projection=True, seed=3),
        vae=vae(seed=1),
        unet=unet(**sizes, **kinds, use_linear_projection=True, seed=2),
        scheduler=diffusers.EulerDiscreteScheduler(**_NOISE, steps_offset=1),
        add_watermarker=False,
    )


@_register(SIZED, text_encoder_layer="text_encoder.text_model.encoder.layers.1")
def stable_diffusion_3() -> diffusers.StableDiffusion3Pipeline:
    """Two CLIP encoders and T5."""
    sizes = {"caption_projection_dim": WIDTH, "joint_attention_dim": WIDTH}
    sizes |= {"pooled_projection_dim": 8 + 16, "sample_size": SIDE // 2}
    return quiet_pipeline(
        diffusers.StableDiffusion3Pipeline,
        **text_parts(clip_encoder, clip_tokenizer(), width=8, projection=True),
        **text_parts(clip_encoder, clip_tokenizer("!"), "_2", width=16, projection=True, seed=3),
        **text_parts(t5_encoder, t5_tokenizer(), "_3"),
        vae=vae(shift_factor=0.06, use_quant_conv=False, use_post_quant_conv=False, seed=1),
        transformer=dit(diffusers.SD3Transformer2DModel, **sizes, seed=2),
        scheduler=flow_scheduler(),
    )


@_register(SIZED, text_encoder_layer=CLIP_LAYER)
def flux() -> diffusers.FluxPipeline:
    """FLUX.1 dev: the guidance scale is an embedding, and one call is one step."""
    sizes = {"joint_attention_dim": WIDTH, "pooled_projection_dim": WIDTH, "num_single_layers": 2}
    sizes |= {"in_channels": 16, "out_channels": 16}  # four, packed two by two
    rest = {"axes_dims_rope": (4, 4, 8), "guidance_embeds": True}
    return quiet_pipeline(
        diffusers.FluxPipeline,
        **text_parts(clip_encoder, clip_tokenizer()),
        **text_parts(t5_encoder, t5_tokenizer(), "_2"),
        vae=vae(shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False, seed=1),
        transformer=dit(diffusers.FluxTransformer2DModel, **sizes, **rest, seed=2),
        scheduler=flow_scheduler(use_dynamic_shifting=True),
    )


_TRUE_GUIDANCE = {"negative_prompt": "a photo", "true_cfg_scale": 4.0}


@_register({**SIZED, **_TRUE_GUIDANCE}, text_encoder_layer=CLIP_LAYER, calls_per_step=2)
def two_call_guidance() -> diffusers.FluxPipeline:
    """FLUX called with a negative prompt: the transformer runs once for each guidance branch."""
    return flux()


@_register({**CALL, "clean_caption": False}, **_UNET_FACTS, decode=None)
def deepfloyd_if() -> diffusers.IFPipeline:
    """The first stage of DeepFloyd IF: pixels, and a learned variance beside the noise."""
    down = ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D")
    up = ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D")
    blocks = {"down_block_types": down, "up_block_types": up}
    blocks |= {"mid_block_type": "UNetMidBlock2DSimpleCrossAttn"}
    blocks |= {"attention_head_dim": 8}  # in these blocks really the channels of a head
    text = {"encoder_hid_dim": WIDTH, "encoder_hid_dim_type": "text_proj"}
    text |= {"addition_embed_type": "text", "addition_embed_type_num_heads": 2}
    sizes = {"sample_size": SIDE, "in_channels": 3, "out_channels": 6}
    return quiet_pipeline(
        diffusers.IFPipeline,
        **text_parts(t5_encoder, t5_tokenizer()),
        unet=unet(**blocks, **text, **sizes, resnet_time_scale_shift="scale_shift", seed=2),
        scheduler=diffusers.DDPMScheduler(variance_type="learned_range", thresholding=True),
        watermarker=None,
        **_UNCHECKED,
    )


@_register({**SIZED, "use_resolution_binning": False, "clean_caption": False})
def pixart_sigma() -> diffusers.PixArtSigmaPipeline:
    """T5, and a transformer that predicts a variance which the pipeline drops."""
    sizes = {"cross_attention_dim": WIDTH, "caption_channels": WIDTH, "sample_size": SIDE // 2}
    return quiet_pipeline(
        diffusers.PixArtSigmaPipeline,
        **text_parts(t5_encoder, t5_tokenizer()),
        vae=vae(seed=1),
        transformer=dit(diffusers.PixArtTransformer2DModel, **sizes, out_channels=8, seed=2),
        scheduler=diffusers.DPMSolverMultistepScheduler(),
    )


@_register(
    {**SIZED, "use_resolution_binning": False, "complex_human_instruction": None},
    text_encoder_layer="text_encoder.layers.1",
)
def sana() -> diffusers.SanaPipeline:
    """A language model as text encoder, linear attention, a deep-compression autoencoder."""
    half = {"block_types": ("ResBlock", "EfficientViTBlock"), "block_out_channels": (8, 16)}
    half |= {"layers_per_block": (1, 1), "qkv_multiscales": ((), (5,))}
    halves = {f"{name}_{key}": half[key] for name in ("encoder", "decoder") for key in half}
    vae_sizes = {"latent_channels": 4, "attention_head_dim": 8}
    sizes = {"cross_attention_dim": WIDTH, "caption_channels": WIDTH, "sample_size": SIDE // 2}
    heads = {"num_cross_attention_heads": 2, "cross_attention_head_dim": WIDTH // 2}
    return quiet_pipeline(
        diffusers.SanaPipeline,
        **text_parts(gemma_encoder, gemma_tokenizer()),
        vae=model(diffusers.AutoencoderDC, **halves, **vae_sizes, seed=1),
        transformer=dit(diffusers.SanaTransformer2DModel, **sizes, **heads, seed=2),
        scheduler=flow_scheduler(),
    )


@_register(STEPS, **_UNET_FACTS, text_encoder_layer=None, decode=None)
def ddpm() -> diffusers.DDPMPipeline:
    """Unconditional: no text encoder, no autoencoder."""
    down, up = ("DownBlock2D", "AttnDownBlock2D"), ("AttnUpBlock2D", "UpBlock2D")
    blocks = {**_BLOCKS, "down_block_types": down, "up_block_types": up}
    net = model(diffusers.UNet2DModel, sample_size=SIDE, **blocks)
    return quiet_pipeline(diffusers.DDPMPipeline, unet=net, scheduler=diffusers.DDPMScheduler())


# Pipelines for video


@_register(
    {**SIZED, "num_frames": 5},
    denoiser_block="transformer.blocks.0",
    calls_per_step=2,
    video=True,
)
def wan() -> diffusers.WanPipeline:
    """Runs the transformer once for each guidance branch."""
    sizes = {"base_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}
    sizes |= {"z_dim": 4, "latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}
    widths = {"text_dim": WIDTH, "freq_dim": 16, "ffn_dim": WIDTH}
    return quiet_pipeline(
        diffusers.WanPipeline,
        **text_parts(t5_encoder, t5_tokenizer(), family="UMT5"),
        vae=model(diffusers.AutoencoderKLWan, **sizes, seed=1),
        transformer=dit(diffusers.WanTransformer3DModel, **widths, seed=2),
        scheduler=flow_scheduler(),
    )


@_register({**SIZED, "num_frames": 9}, video=True)
def cogvideox() -> diffusers.CogVideoXPipeline:
    """Text and image in one sequence."""
    blocks = {"block_out_channels": (8,) * 4, "layers_per_block": 1, "norm_num_groups": 2}
    sizes = {"text_embed_dim": WIDTH, "max_text_seq_length": TOKENS, "time_embed_dim": 8}
    return quiet_pipeline(
        diffusers.CogVideoXPipeline,
        **text_parts(t5_encoder, t5_tokenizer()),
        vae=model(diffusers.AutoencoderKLCogVideoX, **blocks, latent_channels=4, seed=1),
        transformer=dit(diffusers.CogVideoXTransformer3DModel, **sizes, seed=2),
        scheduler=diffusers.CogVideoXDDIMScheduler(snr_shift_scale=3.0),
    )


@_register({**SIZED, "num_frames": 9}, video=True)
def ltx() -> diffusers.LTXPipeline:
    """The latents are one flat sequence of tokens."""
    blocks = {"block_out_channels": (8,) * 4, "decoder_block_out_channels": (8,) * 4}
    blocks |= {"layers_per_block": (1,) * 5, "decoder_layers_per_block": (1,) * 5}
    blocks |= {"latent_channels": 4, "patch_size": 1}
    sizes = {"cross_attention_dim": WIDTH, "caption_channels": WIDTH}
    return quiet_pipeline(
        diffusers.LTXPipeline,
        **text_parts(t5_encoder, t5_tokenizer()),
        vae=model(diffusers.AutoencoderKLLTXVideo, **blocks, seed=1),
        transformer=dit(diffusers.LTXVideoTransformer3DModel, **sizes, seed=2),
        scheduler=flow_scheduler(),
    )


# The same, with a scheduler of second order. Heun's steps twice in every inference step but the last.
ALL_PIPELINES: dict[str, SmallPipeline] = {
    **PIPELINES,
    "second_order": SmallPipeline(
        lambda: with_second_order(stable_diffusion()),
        PIPELINES["stable_diffusion"].inputs,
        text_encoder_layer=CLIP_LAYER,
        steps=5,
        **_UNET_FACTS,
    ),
}
