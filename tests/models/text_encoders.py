"""Small pipelines with random weights for every family of text encoder that diffusers supports.

    small = TEXT_PIPELINES["kandinsky5"]
    small.build()(**small.inputs(), generator=torch.Generator().manual_seed(0))

The pipelines of `models.diffusion` are among them.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
import transformers
from tokenizers.pre_tokenizers import ByteLevel

from models import diffusion
from models.diffusion import SIDE, WIDTH

PROMPT = "a red circle above a blue square"
SEED = 4


@dataclass(frozen=True)
class TextPipeline:
    """How to build and call one pipeline. `output` is the name of its result."""

    build: Callable[[], diffusers.DiffusionPipeline]
    call: dict[str, Any]
    output: str = "images"

    def inputs(self, **changes: Any) -> dict[str, Any]:
        """Return keyword arguments of one call, without `generator`, whose result has its default type."""
        given = {name: value for name, value in self.call.items() if name != "output_type"}
        return {"prompt": PROMPT, **given, "num_inference_steps": 2, **changes}


def byte_tokenizer(cls: type, **special: str) -> Any:
    """Return a tokenizer with one token per byte, of a class that reads GPT-2's files."""
    tokens = [*special.values(), *sorted(ByteLevel.alphabet())]
    ids = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    return cls(vocab=ids, merges=[], model_max_length=77, **special)


@diffusion.seeded
def qwen_encoder(tokenizer: Any) -> transformers.Qwen2_5_VLForConditionalGeneration:
    """A vision-language model."""
    sizes = {"hidden_size": WIDTH, "intermediate_size": WIDTH, "num_hidden_layers": 3, "num_attention_heads": 2}
    rope = {"rope_type": "default", "type": "default", "mrope_section": [2, 2, 4], "rope_theta": 1e6}
    text = {**sizes, "num_key_value_heads": 2, "rope_parameters": rope, "vocab_size": len(tokenizer)}
    text |= {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
    vision = {"depth": 4, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": WIDTH}
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def qwen_tokenizer() -> Any:
    special = {"pad_token": "<|endoftext|>", "eos_token": "<|im_end|>", "unk_token": "<|endoftext|>"}
    return byte_tokenizer(transformers.Qwen2Tokenizer, **special)


@diffusion.seeded
def wide_clip_encoder(tokenizer: Any) -> transformers.CLIPTextModel:
    """OpenCLIP's text tower, as Stable Diffusion 2 has it."""
    sizes = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "hidden_act": "gelu", "num_hidden_layers": 4}
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = transformers.CLIPTextConfig(vocab_size=len(tokenizer), num_attention_heads=2, **sizes, **ends)
    return transformers.CLIPTextModel(config)


def stable_diffusion_2() -> diffusers.StableDiffusionPipeline:
    """The last but one layer of OpenCLIP, whose encoder is published without the last one."""
    scheduler = diffusers.DDIMScheduler(**diffusion.DDIM, prediction_type="v_prediction")
    text = diffusion.text_parts(wide_clip_encoder, diffusion.clip_tokenizer())
    return diffusion.stable_diffusion_family(diffusers.StableDiffusionPipeline, scheduler=scheduler, **text)


def clip_skip() -> diffusers.StableDiffusionPipeline:
    """Told to leave layers out, the pipeline puts an earlier hidden state through the final norm itself."""
    pipe = stable_diffusion_2()
    vars(pipe.text_encoder)["text_model"] = pipe.text_encoder  # where diffusers looks for the norm
    return pipe


def qwen_image() -> diffusers.QwenImagePipeline:
    sizes = {"joint_attention_dim": WIDTH, "axes_dims_rope": (4, 4, 8), "in_channels": 16}
    vae = {"base_dim": 4, "z_dim": 4, "dim_mult": [1, 1, 1], "num_res_blocks": 1, "temperal_downsample": [False, True]}
    vae |= {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}
    return diffusion.quiet_pipeline(
        diffusers.QwenImagePipeline,
        **diffusion.text_parts(qwen_encoder, qwen_tokenizer()),
        vae=diffusion.model(diffusers.AutoencoderKLQwenImage, **vae, seed=1),
        transformer=diffusion.dit(diffusers.QwenImageTransformer2DModel, **sizes, seed=2),
        scheduler=diffusion.flow_scheduler(),
    )


_CHAT = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


@diffusion.seeded
def qwen3_encoder(tokenizer: Any) -> transformers.Qwen3ForCausalLM:
    sizes = {"hidden_size": WIDTH, "intermediate_size": WIDTH, "num_hidden_layers": 4, "num_attention_heads": 2}
    ends = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0, "num_key_value_heads": 1, "head_dim": 16}
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(vocab_size=len(tokenizer), **sizes, **ends))


def _chatting() -> dict[str, Any]:
    tokenizer = qwen_tokenizer()
    tokenizer.chat_template = _CHAT
    return diffusion.text_parts(qwen3_encoder, tokenizer)


def flux2() -> diffusers.Flux2KleinPipeline:
    """Several layers of a language model side by side."""
    sizes = {"in_channels": 16, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16}
    sizes |= {"num_attention_heads": 2, "joint_attention_dim": 2 * WIDTH, "axes_dims_rope": (4, 4, 4, 4)}
    down, up = ("DownEncoderBlock2D",) * 2, ("UpDecoderBlock2D",) * 2
    vae = {"down_block_types": down, "up_block_types": up, "block_out_channels": (8, 16), "layers_per_block": 1}
    return diffusion.quiet_pipeline(
        diffusers.Flux2KleinPipeline,
        **_chatting(),
        vae=diffusion.model(diffusers.AutoencoderKLFlux2, **vae, latent_channels=4, norm_num_groups=4, seed=1),
        transformer=diffusion.model(diffusers.Flux2Transformer2DModel, **sizes, guidance_embeds=False, seed=2),
        scheduler=diffusion.flow_scheduler(),
    )


def z_image() -> diffusers.ZImagePipeline:
    """The embeddings are a list, without padding."""
    sizes = {"in_channels": 4, "dim": 32, "n_layers": 1, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2}
    rope = {"axes_dims": [8, 4, 4], "axes_lens": [256, 32, 32]}
    return diffusion.quiet_pipeline(
        diffusers.ZImagePipeline,
        **_chatting(),
        vae=diffusion.vae(shift_factor=0.1, seed=1),
        transformer=diffusion.model(diffusers.ZImageTransformer2DModel, **sizes, **rope, cap_feat_dim=WIDTH, seed=2),
        scheduler=diffusion.flow_scheduler(),
    )


def kandinsky_prior() -> diffusers.KandinskyV22PriorPipeline:
    """Draws no image, but the embedding of one."""
    sizes = {"hidden_size": WIDTH, "intermediate_size": WIDTH, "projection_dim": WIDTH, "num_hidden_layers": 2}
    config = transformers.CLIPVisionConfig(**sizes, num_attention_heads=2, image_size=16, patch_size=8)
    processor = transformers.CLIPImageProcessorPil(size=16, crop_size=16)
    sizes = {"num_attention_heads": 2, "attention_head_dim": 12, "embedding_dim": WIDTH, "num_layers": 1}
    prior = diffusion.model(diffusers.PriorTransformer, **sizes)
    prior.clip_std.data += 1  # a fresh one gives nothing but the mean
    return diffusion.quiet_pipeline(
        diffusers.KandinskyV22PriorPipeline,
        **diffusion.text_parts(diffusion.clip_encoder, diffusion.clip_tokenizer(), projection=True),
        prior=prior,
        image_encoder=diffusion.model(transformers.CLIPVisionModelWithProjection, config=config, seed=3),
        image_processor=processor,
        scheduler=diffusers.UnCLIPScheduler(variance_type="fixed_small_log", prediction_type="sample"),
    )


def kandinsky3() -> diffusers.Kandinsky3Pipeline:
    """T5, whose padding is set to zero."""
    movq = {"block_out_channels": [32, 32], "down_block_types": ["DownEncoderBlock2D"] * 2, "latent_channels": 4}
    movq |= {"up_block_types": ["UpDecoderBlock2D"] * 2, "norm_num_groups": 4, "norm_type": "spatial"}
    movq |= {"num_vq_embeddings": 12, "vq_embed_dim": 4}
    unet = {"time_embedding_dim": 8, "groups": 2, "attention_head_dim": 4, "layers_per_block": 2}
    unet |= {"block_out_channels": (16, 32), "cross_attention_dim": 8, "encoder_hid_dim": WIDTH}
    return diffusion.quiet_pipeline(
        diffusers.Kandinsky3Pipeline,
        **diffusion.text_parts(diffusion.t5_encoder, diffusion.t5_tokenizer()),
        unet=diffusion.model(diffusers.Kandinsky3UNet, **unet, seed=2),
        scheduler=diffusers.DDPMScheduler(),
        movq=diffusion.model(diffusers.VQModel, **movq, seed=1),
    )


def kandinsky5() -> diffusers.Kandinsky5T2IPipeline:
    """A vision-language model that reads the prompt in a template, and CLIP's pooled vector."""
    sizes = {"in_visual_dim": 4, "out_visual_dim": 4, "in_text_dim": WIDTH, "in_text_dim2": 16, "time_dim": 16}
    sizes |= {"patch_size": (1, 2, 2), "model_dim": 16, "ff_dim": 32, "num_text_blocks": 1, "num_visual_blocks": 2}
    pipe = diffusion.quiet_pipeline(
        diffusers.Kandinsky5T2IPipeline,
        text_encoder=qwen_encoder(qwen_tokenizer()),
        tokenizer=qwen_tokenizer(),
        **diffusion.text_parts(diffusion.clip_encoder, diffusion.clip_tokenizer(), "_2", width=16),
        vae=diffusion.vae(seed=1),
        transformer=diffusion.model(
            diffusers.Kandinsky5Transformer3DModel, **sizes, axes_dims=(1, 1, 2), visual_cond=False, seed=2
        ),
        scheduler=diffusion.flow_scheduler(),
    )
    for parameter in pipe.transformer.parameters():
        if not parameter.any():  # a fresh one begins with blocks that do nothing
            torch.nn.init.normal_(parameter, std=0.5, generator=generator(7))
    pipe.resolutions = [(64, 64)]
    return pipe


def lumina() -> diffusers.LuminaPipeline:
    sizes = {"hidden_size": 32, "num_layers": 2, "num_attention_heads": 2, "num_kv_heads": 1, "multiple_of": 8}
    sizes |= {"sample_size": SIDE // 8, "cross_attention_dim": WIDTH}
    return diffusion.quiet_pipeline(
        diffusers.LuminaPipeline,
        **diffusion.text_parts(diffusion.gemma_encoder, diffusion.gemma_tokenizer()),
        vae=diffusion.vae(seed=1),
        transformer=diffusion.model(diffusers.LuminaNextDiT2DModel, **sizes, seed=2),
        scheduler=diffusion.flow_scheduler(),
    )


def stable_audio() -> diffusers.StableAudioPipeline:
    """T5, through a projection."""
    sizes = {"sample_size": 4, "in_channels": 3, "out_channels": 3, "num_key_value_attention_heads": 2}
    sizes |= {"cross_attention_dim": 4, "cross_attention_input_dim": 4, "time_proj_dim": 8}
    vae = {"encoder_hidden_size": 6, "downsampling_ratios": [1, 2], "decoder_channels": 3, "decoder_input_channels": 3}
    vae |= {"audio_channels": 2, "channel_multiples": [2, 4], "sampling_rate": 4}
    ends = {"min_value": 0, "max_value": 32}
    projection = {"text_encoder_dim": WIDTH, "conditioning_dim": 4, **ends}
    dit = diffusion.model(
        diffusers.StableAudioDiTModel, **sizes, num_layers=2, attention_head_dim=4, global_states_input_dim=8, seed=2
    )
    return diffusion.quiet_pipeline(
        diffusers.StableAudioPipeline,
        **diffusion.text_parts(diffusion.t5_encoder, diffusion.t5_tokenizer()),
        vae=diffusion.model(diffusers.AutoencoderOobleck, **vae, seed=1),
        projection_model=diffusion.model(diffusers.StableAudioProjectionModel, **projection, seed=3),
        transformer=dit,
        scheduler=diffusers.EDMDPMSolverMultistepScheduler(solver_order=2, prediction_type="v_prediction"),
    )


_CLIP_TO_AUDIO = {"projection_dim": 16, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}


@diffusion.seeded
def clap(tokenizer: Any) -> transformers.ClapModel:
    """CLIP for sound."""
    text = {**_CLIP_TO_AUDIO, "num_attention_heads": 2, "vocab_size": len(tokenizer), "num_hidden_layers": 3}
    audio = {"spec_size": 64, "window_size": 4, "num_mel_bins": 64, "depths": [2, 2], "num_attention_heads": [2, 2]}
    audio |= {**_CLIP_TO_AUDIO, "hidden_size": 192, "patch_size": 2, "patch_stride": 2, "patch_embed_input_channels": 4}
    return transformers.ClapModel(transformers.ClapConfig(text_config=text, audio_config=audio, projection_dim=16))


def audioldm2() -> diffusers.AudioLDM2Pipeline:
    """CLAP's pooled vector and T5, from which a language model writes what the UNet reads."""
    special = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    roberta = byte_tokenizer(transformers.RobertaTokenizer, **special)
    unet = {"block_out_channels": (8, 16), "layers_per_block": 1, "sample_size": 32, "norm_num_groups": 4}
    unet |= {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D")}
    unet |= {"up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D")}
    unet |= {"cross_attention_dim": ([None, 16, WIDTH], [None, 16, WIDTH]), "attention_head_dim": 4}
    hifi = {"model_in_dim": 8, "upsample_initial_channel": 8, "upsample_rates": [2, 2], "normalize_before": False}
    hifi |= {"upsample_kernel_sizes": [4, 4], "resblock_kernel_sizes": [3], "resblock_dilation_sizes": [[1, 3]]}
    gpt = transformers.GPT2Config(n_embd=16, n_head=2, n_layer=2, vocab_size=32, n_positions=128)
    projection = {"text_encoder_dim": 16, "text_encoder_1_dim": WIDTH, "langauge_model_dim": 16}
    language_model = diffusion.model(transformers.GPT2LMHeadModel, config=gpt, seed=4)
    language_model.config.max_new_tokens = 3
    return diffusion.quiet_pipeline(
        diffusers.AudioLDM2Pipeline,
        **diffusion.text_parts(clap, roberta),
        **diffusion.text_parts(diffusion.t5_encoder, diffusion.t5_tokenizer(), "_2"),
        projection_model=diffusion.model(diffusers.AudioLDM2ProjectionModel, **projection, seed=3),
        language_model=language_model,
        feature_extractor=transformers.ClapFeatureExtractor(),
        unet=diffusion.model(diffusers.AudioLDM2UNet2DConditionModel, **unet, seed=2),
        vae=diffusion.vae(in_channels=1, out_channels=1, seed=1),
        vocoder=diffusion.model(
            transformers.SpeechT5HifiGan, config=transformers.SpeechT5HifiGanConfig(**hifi), seed=5
        ),
        scheduler=diffusers.DDIMScheduler(**diffusion.DDIM),
    )


_GUIDED = {"guidance_scale": 4.0}
_SQUARE = {"height": SIDE, "width": SIDE}
_TINY = (
    "stable_diffusion",
    "stable_diffusion_xl",
    "stable_diffusion_3",
    "flux",
    "deepfloyd_if",
    "pixart_sigma",
    "sana",
)
TEXT_PIPELINES = {
    name: TextPipeline(diffusion.PIPELINES[name].build, diffusion.PIPELINES[name].inputs()) for name in _TINY
}
TEXT_PIPELINES |= {
    name: TextPipeline(diffusion.PIPELINES[name].build, diffusion.PIPELINES[name].inputs(), "frames")
    for name in ("wan", "cogvideox")
}
TEXT_PIPELINES |= {
    "stable_diffusion_2": TextPipeline(stable_diffusion_2, _GUIDED),
    "clip_skip": TextPipeline(clip_skip, {**_GUIDED, "clip_skip": 1}),
    "qwen_image": TextPipeline(qwen_image, {**_SQUARE, "negative_prompt": "a photo", "true_cfg_scale": 4.0}),
    "kandinsky3": TextPipeline(kandinsky3, {**_SQUARE, **_GUIDED}),
    "kandinsky5": TextPipeline(kandinsky5, {"height": 64, "width": 64, **_GUIDED}, "image"),
    "kandinsky_prior": TextPipeline(kandinsky_prior, _GUIDED, "image_embeds"),
    "flux2": TextPipeline(flux2, {**_SQUARE, "max_sequence_length": 128, "text_encoder_out_layers": (1, 3)}),
    "z_image": TextPipeline(z_image, {**_SQUARE, **_GUIDED, "max_sequence_length": 128}),
    "lumina": TextPipeline(lumina, {**_SQUARE, **_GUIDED, "clean_caption": False}),
    "stable_audio": TextPipeline(stable_audio, {**_GUIDED, "negative_prompt": "a photo"}, "audios"),
    "audioldm2": TextPipeline(audioldm2, {**_GUIDED, "audio_length_in_s": 0.016}, "audios"),
}


@functools.cache
def built(name: str) -> diffusers.DiffusionPipeline:
    """Return one instance of the pipeline for all tests that do not change it."""
    return TEXT_PIPELINES[name].build()


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def denoiser_of(pipe: diffusers.DiffusionPipeline) -> torch.nn.Module:
    """Return the UNet or the transformer of a pipeline."""
    return getattr(pipe, "unet", None) or pipe.transformer


def draw_first(name: str, pipe: diffusers.DiffusionPipeline, **changes: Any) -> Any:
    """Return the first image, video or sound that the bare pipeline makes with `SEED`."""
    return pipe(**TEXT_PIPELINES[name].inputs(**changes), generator=generator(SEED))[0][0]
